"""The probes: their answers are right, the default policy finds them, and a broken one does not."""

import dataclasses

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces
from policy_setup import global_randomness
from torch import nn

import ppo.assembly
from ppo import Categorical, DiagonalGaussian, Evaluation, PolicyConfig, PPOAgent, PPOConfig
from ppo.errors import SpaceError
from ppo.policies import make_policy
from ppo.probes import PROBES, find_probes, run_probes
from ppo.probes.environments import Endless, EndlessAfterStart, MaskedOrder, TMaze

SOLVED = [
    "constant-reward",
    "seen-reward",
    "delayed-reward",
    "paying-action",
    "matching-action",
    "truncation",
    "final-observation",
    "bound",
    "bound-squashed",
    "bound-beta",
    "nested-observation",
    "hybrid-action",
    "mask",
    "mask-by-method",
    "mask-in-observation",
    "memory",
    "memory-and-mask",
]
NAMES = [probe.name for probe in PROBES]


def find(name):
    (probe,) = find_probes([name])
    return probe


def test_every_probe_is_trained_here_or_waits():
    assert sorted(SOLVED) == sorted(NAMES)
    assert len(set(NAMES)) == len(NAMES)


# The answers are right: nothing is trained


def play(env, choose, episodes=400):
    """Mean return of a function from (observation, info, what it remembers) to an action."""
    env.reset(seed=0)
    returns = []
    for _ in range(episodes):
        obs, info = env.reset()
        total, over, memory = 0.0, False, {}
        while not over:
            assert env.observation_space.contains(obs)
            action = choose(obs, info, memory)
            assert env.action_space.contains(action)
            obs, reward, terminated, truncated, info = env.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def by_sign(obs, info, memory):
    return np.int64(obs[0] > 0)


def bounds(obs, info, memory):
    return np.array([3.0 if obs[0] > 0 else -1.0], np.float32)


def both_leaves(obs, info, memory):
    return np.int64((obs["sign"][0] > 0) == (obs["pair"][0] == 4))


def hybrid(obs, info, memory):
    return {"push": (obs / 2).astype(np.float32), "side": np.int64(obs[0] > 0)}


def last_or_first(sign, mask):
    legal = np.flatnonzero(mask)
    return legal[-1] if sign > 0 else legal[0]


def masked_order(obs, info, memory):
    return last_or_first(obs[0], info["action_mask"])


def masked_order_observed(obs, info, memory):
    return last_or_first(obs["sign"][0], obs["action_mask"])


def remembering(obs, info, memory):
    memory.setdefault("cue", obs[0])
    return np.int64(memory["cue"] > 0)


def remembering_doors(obs, info, memory):
    side = 2 * remembering(obs, info, memory)
    return side + np.argmax(info["action_mask"][side : side + 2])


BEST = {
    "paying-action": lambda obs, info, memory: np.int64(1),
    "matching-action": by_sign,
    "bound": bounds,
    "bound-squashed": bounds,
    "bound-beta": bounds,
    "nested-observation": both_leaves,
    "hybrid-action": hybrid,
    "mask": masked_order,
    "mask-in-observation": masked_order_observed,
    "memory": remembering,
    "memory-and-mask": remembering_doors,
}


@pytest.mark.parametrize("name", BEST)
def test_the_best_policy_gets_what_is_expected_and_is_right(name):
    probe = find(name)
    measured = play(probe.env(), BEST[name])
    assert measured == pytest.approx(probe.answer.expected[0], abs=1e-6)
    assert probe.answer.right((measured,))


def test_masks_told_by_a_method_are_those_of_the_next_step():
    env = find("mask-by-method").env()

    def choose(obs, info, memory):
        assert info == {}
        return last_or_first(obs[0], env.action_masks())

    assert play(env, choose) == 1.0


def test_the_three_ways_to_tell_a_mask_are_one_task():
    envs = [find(name).env() for name in ("mask", "mask-by-method", "mask-in-observation")]
    (_, told), _, (seen, _) = (env.reset(seed=3) for env in envs)
    for _ in range(3):
        np.testing.assert_array_equal(told["action_mask"], envs[1].action_masks())
        np.testing.assert_array_equal(told["action_mask"], seen["action_mask"])
        legal = np.flatnonzero(envs[1].action_masks())[0]
        (*_, told), _, (seen, *_) = (env.step(legal) for env in envs)


def coin(obs, info, memory):
    # Not from the environment's generator: it would then know what comes.
    return np.int64(COIN.integers(2))


COIN = np.random.default_rng(7)


def only_the_sign(obs, info, memory):
    return np.int64(obs["sign"][0] > 0)


def only_the_class(obs, info, memory):
    return np.int64(obs["pair"][0] == 4)


def only_the_side(obs, info, memory):
    return {"push": np.zeros(1, np.float32), "side": np.int64(obs[0] > 0)}


def only_the_push(obs, info, memory):
    return {"push": (obs / 2).astype(np.float32), "side": np.int64(1)}


def open_door(obs, info, memory):
    """On whichever side: a policy with masks and without memory."""
    side = 2 * coin(obs, info, memory)
    return side + np.argmax(info["action_mask"][side : side + 2])


def cued_door(obs, info, memory):
    """Open or not: a policy with memory and without masks."""
    return 2 * remembering(obs, info, memory)


WORSE = [
    ("paying-action", lambda obs, info, memory: np.int64(0), 0.0, "flipped sign"),
    ("matching-action", coin, 0.5, "observation is ignored"),
    ("matching-action", lambda *said: 1 - by_sign(*said), 0.0, "flipped sign"),
    ("bound", lambda *said: bounds(*said) * np.float32(0.9), -0.2, "bound is not reached"),
    ("bound", lambda *said: np.ones(1, np.float32), -2.0, "observation is ignored"),
    ("nested-observation", only_the_sign, 0.5, "leaf is lost"),
    ("nested-observation", only_the_class, 0.5, "leaf is lost"),
    ("hybrid-action", only_the_side, 0.5, "one leaf is learned"),
    ("hybrid-action", only_the_push, 0.5, "one leaf is learned"),
    ("memory", coin, 0.5, "as without memory"),
    ("memory-and-mask", open_door, 0.5, "as without memory"),
    ("memory-and-mask", cued_door, -0.88, "illegal actions"),
]


@pytest.mark.parametrize(("name", "choose", "expected", "words"), WORSE)
def test_a_worse_policy_gets_less_and_is_told_why(name, choose, expected, words):
    answer = find(name).answer
    measured = play(find(name).env(), choose, 1_000)
    assert measured == pytest.approx(expected, abs=0.06)
    assert not answer.right((measured,))
    assert words in answer.explain((measured,))


def test_the_best_that_ignores_masks_is_far_from_the_best_that_respects_them():
    def blindfold(obs, info, memory):
        return np.int64(3 if obs[0] > 0 else 0)

    def first(obs, info, memory):
        return np.flatnonzero(info["action_mask"])[0]

    answer = find("mask").answer
    ignoring, unseeing = play(MaskedOrder(), blindfold), play(MaskedOrder(), first)
    assert ignoring < 0.2
    assert "illegal" in answer.explain((-1.0,))
    assert 0.4 < unseeing < 0.8
    assert "not the best" in answer.explain((unseeing,))
    assert not answer.right((ignoring,))
    assert not answer.right((unseeing,))


@pytest.mark.parametrize("seed", range(5))
def test_an_illegal_action_costs_one_and_ends_the_episode(seed):
    for name in ("mask", "mask-by-method", "mask-in-observation", "memory-and-mask"):
        env = find(name).env()
        env.reset(seed=seed)
        while env.mask.all():
            env.reset()
        _, reward, terminated, truncated, _ = env.step(np.flatnonzero(~env.mask)[0])
        assert (reward, terminated, truncated) == (-1.0, True, False)


def test_what_a_corridor_shows_says_nothing_of_its_cue():
    shown = {-1.0: set(), 1.0: set()}
    env = TMaze()
    env.reset(seed=0)
    for _ in range(200):
        obs, _ = env.reset()
        assert obs[0] == env.sign
        path, over = [], False
        while not over:
            obs, _, over, _, _ = env.step(0)
            path.append(tuple(obs))
        assert path[-2] == (0.0, 1.0)
        shown[env.sign].add(tuple(path))
    assert shown[-1.0] == shown[1.0]
    assert {len(path) for path in shown[1.0]} == {3, 4, 5, 6}


def discounted(env, gamma, steps=300):
    """Discounted reward from each state that is met, if nothing cuts the episode off."""
    obs, _ = env.reset()
    states, rewards, over = [], [], False
    while not over and len(states) < steps:
        states.append(float(obs[0]))
        obs, reward, over, _, _ = env.step(env.action_space.sample())
        rewards.append(reward)
    totals = [0.0]
    for reward in reversed(rewards):
        totals.insert(0, reward + gamma * totals[0])
    met = {}
    for state, total in zip(states, totals, strict=False):
        met.setdefault(state, total)
    return met


UNCUT = {
    "truncation": lambda: Endless(10**9),
    "final-observation": lambda: EndlessAfterStart(10**9),
}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in BEST and "mask" not in n])
def test_the_values_expected_are_the_discounted_rewards_to_come(name):
    probe = find(name)
    env = UNCUT.get(name, probe.env)()
    env.reset(seed=0)
    met = {}
    for _ in range(20):
        met |= discounted(env, probe.config.gamma)
    assert set(met) == set(probe.answer.at)
    assert [met[at] for at in probe.answer.at] == pytest.approx(probe.answer.expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_that_is_listed_is_wrong_and_recognised(name):
    answer = find(name).answer
    assert answer.right(answer.expected)
    for numbers, meaning in answer.mistakes.items():
        assert len(numbers) == len(answer.expected)
        assert not answer.right(numbers)
        assert answer.explain(numbers) == meaning
    assert not answer.right(tuple(np.subtract(answer.expected, 1.0)))
    assert not answer.right(tuple(np.full(len(answer.expected), np.nan)))


@pytest.mark.parametrize("name", NAMES)
def test_an_environment_depends_on_its_seed_alone_and_travels_to_workers(name):
    def episode(env):
        obs, info = env.reset(seed=11)
        env.action_space.seed(5)
        seen = [(obs, info)]
        for _ in range(6):
            *result, info = env.step(env.action_space.sample())
            seen.append((*result, info))
            if result[2] or result[3]:
                seen.append(env.reset())
        return repr(seen)

    factory = find(name).env
    assert episode(factory()) == episode(cloudpickle.loads(cloudpickle.dumps(factory))())


# The default policy solves them


@pytest.mark.parametrize("name", SOLVED)
def test_the_default_policy_solves_it(name):
    result = find(name).run()
    assert (result.name, result.outcome) == (name, "solved"), str(result)
    assert result.measured
    assert result.explanation == ""
    assert result.seconds < 30.0


@pytest.mark.parametrize("memory", ["gru", "attention"])  # the default is an LSTM
def test_every_memory_solves_the_maze_with_locked_doors(memory):
    config = PolicyConfig(hidden_sizes=(16,), memory=memory, memory_size=16, memory_window=8)
    result = find("memory-and-mask").run(lambda *spaces: make_policy(*spaces, config))
    assert result.outcome == "solved", str(result)


def test_a_result_depends_on_its_seed_alone():
    before = global_randomness()
    probe = dataclasses.replace(find("seen-reward"), steps=128)
    for make in (None, own_policy):
        one, same, other = (probe.run(make, seed=seed).measured for seed in (0, 0, 1))
        assert one == same != other
    assert global_randomness() == before


# Broken ones do not


class OwnPolicy(nn.Module):
    """A policy for vectors and Discrete or Box actions, that can be broken in many ways."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        if observation_space.shape is None or action_space.shape is None:
            raise SpaceError("vectors only")
        self.discrete = isinstance(action_space, spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.body = nn.Sequential(nn.Linear(observation_space.shape[0], 16), nn.Tanh())
        self.actor, self.critic = nn.Linear(16, outputs), nn.Linear(16, 1)
        self.log_std = nn.Parameter(torch.full((outputs,), -0.5))

    def distribution(self, obs):
        outputs = self.actor(self.body(obs))
        return Categorical(outputs) if self.discrete else DiagonalGaussian(outputs, self.log_std)

    def draw_noise(self, rng, num_steps):
        family = Categorical if self.discrete else DiagonalGaussian
        return family.draw_noise(rng, (num_steps, self.actor.out_features))

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        distribution = self.distribution(obs)
        return distribution.mode() if deterministic else distribution.sample(noise)

    def evaluate(self, obs, actions):
        distribution = self.distribution(obs)
        value = self.critic(self.body(obs)).squeeze(-1)
        return Evaluation(distribution.log_prob(actions), distribution.entropy(), value)

    def value(self, obs):
        return self.critic(self.body(obs)).squeeze(-1)


def own_policy(observation_space, action_space):
    return OwnPolicy(observation_space, action_space)


class Blind(OwnPolicy):
    def evaluate(self, obs, actions):
        return super().evaluate(torch.zeros_like(obs), actions)

    def act(self, obs, **options):
        return super().act(torch.zeros_like(obs), **options)


class DeafCritic(OwnPolicy):
    """No gradient reaches the critic."""

    def evaluate(self, obs, actions):
        evaluation = super().evaluate(obs, actions)
        return evaluation._replace(values=evaluation.values.detach())


class TwoMinds(OwnPolicy):
    """The value of the next state is asked by another method, which answers the opposite."""

    def value(self, obs):
        return -super().value(obs)


class Shuffled(OwnPolicy):
    """Actions are judged by the observations of other rows."""

    def evaluate(self, obs, actions):
        return super().evaluate(obs.roll(1, 0), actions)


class WrongBounds(OwnPolicy):
    """Squashed to [-1, 1], whatever the bounds."""

    def distribution(self, obs):
        return DiagonalGaussian(self.actor(self.body(obs)).tanh(), self.log_std)

    def act(self, obs, **options):
        return super().act(obs, **options).clamp(-1.0, 1.0)


class FrozenActor(OwnPolicy):
    def __init__(self, *given):
        super().__init__(*given)
        with torch.no_grad():
            self.actor.weight.zero_()
            self.actor.bias.copy_(torch.tensor([1.0, 0.0]))
        self.actor.requires_grad_(False)


BROKEN = [
    ("constant-reward", DeafCritic, "the critic does not learn"),
    ("seen-reward", Blind, "the critic does not see"),
    ("delayed-reward", Blind, "the critic does not see"),
    ("paying-action", FrozenActor, "flipped sign"),
    ("matching-action", Blind, "the observation is ignored"),
    ("matching-action", Shuffled, "the observation is ignored"),
    ("truncation", TwoMinds, "the critic does not learn"),
    ("bound", WrongBounds, "the bound is not reached"),
    ("bound", Blind, "the observation is ignored"),
]


@pytest.mark.parametrize("name", ["seen-reward", "matching-action", "truncation", "bound"])
def test_a_policy_of_ones_own_solves_what_it_is_made_for(name):
    assert find(name).run(own_policy).outcome == "solved"


@pytest.mark.parametrize(("name", "broken", "words"), BROKEN)
def test_a_broken_policy_fails_and_is_told_why(name, broken, words):
    result = find(name).run(broken)
    assert result.outcome == "failed"
    assert "expected" in result.measured
    assert words in result.explanation
    assert result.error is None


gae = ppo.assembly.gae


def truncation_as_termination(rewards, values, next_values, terminated, truncated, **rest):
    never = torch.zeros_like(truncated)
    return gae(rewards, values, next_values, terminated | truncated, never, **rest)


def first_observation_of_the_next_episode(
    rewards, values, next_values, terminated, truncated, **rest
):
    following = torch.cat([values[1:], next_values[-1:]])
    return gae(rewards, values, following, terminated, truncated, **rest)


def no_discount(*data, gamma, gae_lambda):
    return gae(*data, gamma=1.0, gae_lambda=gae_lambda)


def no_future(*data, gamma, gae_lambda):
    return gae(*data, gamma=0.0, gae_lambda=gae_lambda)


def opposite(*data, **rest):
    estimate = gae(*data, **rest)
    return estimate._replace(advantages=-estimate.advantages)


def opposite_returns(*data, **rest):
    estimate = gae(*data, **rest)
    return estimate._replace(returns=-estimate.returns)


WRONG = [
    ("constant-reward", opposite_returns, "flipped sign"),
    ("seen-reward", opposite_returns, "flipped sign"),
    ("delayed-reward", no_discount, "not discounted"),
    ("delayed-reward", no_future, "does not come back in time"),
    ("paying-action", opposite, "flipped sign"),
    ("matching-action", opposite, "flipped sign"),
    ("truncation", truncation_as_termination, "truncation is taken for termination"),
    ("final-observation", truncation_as_termination, "truncation is taken for termination"),
    ("final-observation", first_observation_of_the_next_episode, "next episode"),
]


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG)
def test_a_wrong_algorithm_fails_and_is_told_why(name, wrong, words, monkeypatch):
    monkeypatch.setattr(ppo.assembly, "gae", wrong)
    result = find(name).run()
    assert result.outcome == "failed"
    assert words in result.explanation


def test_a_policy_that_was_not_trained_fails_every_probe_it_can_play():
    for name in SOLVED:
        probe = find(name)
        for seed in range(5):
            result = probe.judge(probe_policy(probe, seed))
            assert result.outcome == "failed", (name, seed, result)


def probe_policy(probe, seed):
    env = probe.env()
    return make_policy(env.observation_space, env.action_space, probe.config.policy, seed=seed)


@pytest.mark.parametrize(("name", "words"), [("memory", "without memory"), ("mask", "illegal")])
def test_a_policy_without_memory_or_masks_is_found_out_where_it_is_judged(name, words):
    probe = find(name)
    config = probe.config.replace(policy=PolicyConfig(hidden_sizes=(16,)))
    env = probe.env()
    policy = make_policy(env.observation_space, env.action_space, config.policy)
    if name == "memory":
        policy = PPOAgent(policy, config=config).learn(probe.env, 4_000).policy
    else:
        masked = policy.act
        policy.act = lambda obs, *, action_mask=None, **options: masked(obs, **options)
    result = probe.judge(policy)
    assert result.outcome == "failed"
    assert words in result.explanation


# What is not applicable, and what is wrong in itself


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("memory", "keeps no state"),
        ("mask", "takes no masks"),
        ("memory-and-mask", "keeps no state: its state_size is 0 or missing; .* takes no masks"),
        ("nested-observation", "vectors only"),
        ("hybrid-action", "vectors only"),
        ("bound-beta", "distribution='beta'"),
        ("bound-squashed", "distribution='squashed'"),
    ],
)
def test_a_probe_for_what_a_policy_has_not_is_not_applicable(name, words):
    result = find(name).run(own_policy)
    assert result.outcome == "not applicable"
    assert result.measured == ""
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(result.explanation))
    assert str(result).startswith(f"{name}: not applicable (")


def test_the_settings_given_are_trained_with_but_for_those_of_the_question():
    trained = []

    class Noted(OwnPolicy):
        def evaluate(self, obs, actions):
            trained.append(len(obs))
            return super().evaluate(obs, actions)

    config = find("truncation").config.replace(num_envs=2, num_steps=50, minibatch_size=100)
    config = config.replace(gamma=0.99, normalize_rewards=True)
    assert find("truncation").run(Noted, config=config).outcome == "solved"
    assert set(trained) == {100, 128}  # 128 rows are judged


def test_a_probe_of_an_option_asks_for_it():
    config = PPOConfig(policy=PolicyConfig(distribution="gaussian"))
    assert find("bound-beta").run(config=config).outcome == "not applicable"


def test_no_policy_at_all_is_a_failure_and_not_the_default_one():
    (result,) = run_probes(lambda *spaces: None, names=["constant-reward"])
    assert result.outcome == "failed"
    assert "returned None" in result.explanation


@pytest.mark.parametrize("method", ["__init__", "evaluate", "act"])
def test_what_a_policy_raises_is_its_failure(method, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("not yet written")

    policy = type("Unfinished", (OwnPolicy,), {method: broken})
    result = find("paying-action").run(policy)
    assert result.outcome == "failed"
    assert "not yet written" in result.explanation
    assert "not yet written" in str(result.error)


def test_probes_are_run_in_their_order_and_by_name():
    results = run_probes(own_policy, names=["memory", "constant-reward"])
    assert [(result.name, result.outcome) for result in results] == [
        ("constant-reward", "solved"),
        ("memory", "not applicable"),
    ]
    assert find_probes() == PROBES
    with pytest.raises(ValueError, match="no probe 'memry'; there are constant-reward, "):
        run_probes(names=["memry"])


def test_a_probe_says_what_it_tests():
    for probe in PROBES:
        assert probe.tests.endswith(".")
        assert probe.answer.otherwise
        assert probe.answer.describe(probe.answer.expected)
