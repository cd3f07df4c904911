import math
import random
import statistics

import gymnasium
import numpy as np
import pytest
import torch
from environments import CountingEnv, FaultyEnv, ImageEnv, Recorder, WalkEnv, WithSpaces, crash
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ppo import (
    EvaluationResult,
    Policy,
    PolicyConfig,
    PPOAgent,
    PPOConfig,
    RolloutCollector,
    evaluate,
    make_policy,
)
from ppo.errors import EnvCreationError, EnvError, SpaceError


class OfLength(CountingEnv):
    """Episodes of one length, each step paid 1: the return is the length."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0, *rest


class Patient(CountingEnv):
    """Pays what the action says: action 1 is worth 1."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(action), *rest


def policy_for(env=CountingEnv, **options):
    made = env()
    config = PolicyConfig(hidden_sizes=(8,), **options)
    return make_policy(made.observation_space, made.action_space, config)


def of_lengths(*lengths):
    return [lambda length=length: OfLength(length) for length in lengths]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    episodes=st.integers(1, 12),
)
def test_every_environment_plays_a_share_fixed_in_advance(lengths, episodes):
    result = evaluate(policy_for(), of_lengths(*lengths), episodes)
    shares = [episodes // len(lengths) + (i < episodes % len(lengths)) for i in range(len(lengths))]
    wanted = [length for length, n in zip(lengths, shares, strict=True) for _ in range(n)]
    assert result.episode_lengths == tuple(wanted)
    assert result.episode_returns == tuple(map(float, wanted))


class Remembering(nn.Module):
    """Does as action what it remembers: how many steps of this episode it has seen, at most 1."""

    state_size = 1

    def act(self, obs, *, noise=None, generator=None, deterministic=False, state=None):
        return state.squeeze(-1).long(), torch.ones_like(state)

    def evaluate(self, obs, actions, *, sequences=None):
        raise NotImplementedError

    def value(self, obs, *, state=None):
        raise NotImplementedError


def test_memory_goes_on_in_every_episode_and_begins_anew_with_the_next():
    result = evaluate(Remembering(), [lambda: Patient(5)], 4)
    assert result.episode_returns == (4.0,) * 4  # all but the first step of each


def test_short_episodes_are_not_counted_more_often_than_long_ones():
    # Whoever counts the first 20 to finish sees 18 short ones.
    result = evaluate(policy_for(), of_lengths(1, 100), 20)
    assert result.mean_return == pytest.approx(50.5)


class Lottery(CountingEnv):
    """Half of the episodes take one step and pay nothing, half take forty and pay 1."""

    finished = []  # noqa: RUF012  (by all of them, in the order in which they end)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.length = 40 if self.np_random.random() < 0.5 else 1
        self.count = 0
        return obs, info

    def step(self, action):
        obs, *_ = super().step(action)
        self.count += 1
        over, won = self.count >= self.length, self.length > 1
        if over:
            self.finished.append(float(won))
        return obs, float(over and won), over, False, {}


def test_the_mean_is_that_of_the_episodes_whatever_they_take():
    result = evaluate(policy_for(), Lottery, 480)
    # Five standard errors of a fair coin are 0.11.
    assert result.mean_return == pytest.approx(0.5, abs=0.11)


def test_episodes_that_end_first_are_another_sample_than_those_that_are_counted():
    naive, ours = [], []
    for seed in range(60):
        Lottery.finished.clear()
        result = evaluate(policy_for(), Lottery, 8, seed=seed)
        naive.append(statistics.fmean(Lottery.finished[:8]))
        ours.append(result.mean_return)
    # 480 coins each.
    assert statistics.fmean(ours) == pytest.approx(0.5, abs=0.11)
    assert statistics.fmean(naive) < 0.3


def test_each_episode_counts_once_and_its_return_is_its_own():
    # The first is worth 1, the second 2, ...: what is counted twice or left out shows in the sum.
    class Numbered(OfLength):
        def reset(self, *, seed=None, options=None):
            self.number = getattr(self, "number", 0) + 1
            return super().reset(seed=seed, options=options)

        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, float(self.number), *rest

    makes = [lambda length=length: Numbered(length) for length in (1, 3, 8)]
    result = evaluate(policy_for(), makes, 8)
    assert result.episode_returns == (1, 2, 3, 3, 6, 9, 8, 16)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_mode_gives_the_same_episodes(mode):
    env = SyncVectorEnv(of_lengths(1, 4, 7), autoreset_mode=mode)
    result = evaluate(policy_for(), env, 8)
    assert result.episode_lengths == (1, 1, 1, 4, 4, 4, 7, 7)
    assert result.episode_returns == (1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 7.0, 7.0)


@pytest.mark.parametrize("ending", ["terminated", "truncated", "both"])
def test_every_kind_of_end_is_an_end(ending):
    result = evaluate(policy_for(), lambda: OfLength(3, ending), 5)
    assert result.episode_lengths == (3,) * 5


@pytest.mark.parametrize("episodes", [1, 2, 3])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_fewer_episodes_than_environments_is_no_trouble(episodes, mode):
    assert (
        len(evaluate(policy_for(), CountingEnv, episodes, num_envs=8).episode_returns) == episodes
    )
    vector = SyncVectorEnv(of_lengths(2, 3, 4, 5, 6), autoreset_mode=mode)
    assert evaluate(policy_for(), vector, episodes).episode_lengths == (2, 3, 4)[:episodes]


def test_no_more_environments_are_made_than_there_are_episodes():
    made = []

    def make():
        made.append(CountingEnv())
        return made[-1]

    evaluate(policy_for(), make, 3, num_envs=8)
    assert len(made) == 3


def test_the_return_is_what_the_environment_paid_undiscounted():
    result = evaluate(policy_for(), lambda: CountingEnv(4, "terminated"), 6)
    for total in result.episode_returns:
        # Rewards are n + tag for n = 1 ... 4.
        assert (total - 10) / 4 == int((total - 10) / 4)


def test_the_result_sums_up():
    result = EvaluationResult((1.0, 2.0, 6.0), (3, 4, 5))
    assert result.mean_return == 3.0
    assert result.std_return == pytest.approx(statistics.pstdev([1, 2, 6]))
    assert str(result) == "3.0 ± 2.2 over 3 episodes"


# Determinism


@pytest.mark.parametrize("env", [CountingEnv, WalkEnv, "CartPole-v1"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_seed_decides_everything(env, deterministic):
    policy = policy_for(env if callable(env) else lambda: gymnasium.make(env))
    one, same, other = (
        evaluate(policy, env, 6, deterministic=deterministic, seed=seed) for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other


def test_a_seed_may_be_a_sequence_or_none():
    policy = policy_for()
    root = np.random.SeedSequence(5, spawn_key=(1, 2))
    assert evaluate(policy, CountingEnv, 3, seed=root) == evaluate(
        policy, CountingEnv, 3, seed=root
    )
    assert evaluate(policy, CountingEnv, 3, seed=None) != evaluate(
        policy, CountingEnv, 3, seed=None
    )


def test_an_episode_does_not_depend_on_how_many_are_played():
    few = evaluate(policy_for(WalkEnv), WalkEnv, 3, num_envs=1, deterministic=False)
    many = evaluate(policy_for(WalkEnv), WalkEnv, 7, num_envs=1, deterministic=False)
    assert many.episode_returns[:3] == few.episode_returns


def test_the_mode_is_taken_unless_sampling_is_asked_for():
    policy = policy_for(Patient)
    with torch.no_grad():
        policy.action_head.linear.weight.zero_()
        policy.action_head.linear.bias.copy_(torch.tensor([0.0, math.log(3.0)]))
    greedy = evaluate(policy, lambda: Patient(10), 40)
    assert set(greedy.episode_returns) == {10.0}
    sampled = evaluate(policy, lambda: Patient(10), 40, deterministic=False)
    assert len(set(sampled.episode_returns)) > 1
    # 400 draws of probability 3/4: five standard deviations are 0.11.
    assert sampled.mean_return / 10 == pytest.approx(0.75, abs=0.11)


def test_environments_side_by_side_sample_apart():
    policy = policy_for(Patient)
    result = evaluate(policy, lambda: Patient(60), 4, num_envs=4, deterministic=False)
    assert len(set(result.episode_returns)) > 1


def test_nothing_of_the_policy_moves():
    policy = policy_for(WalkEnv).train()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    evaluate(policy, WalkEnv, 5, deterministic=False)
    assert all(torch.equal(tensor, before[n]) for n, tensor in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    assert policy.training
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert np.array_equal(np.random.get_state()[1], state[2][1])  # noqa: NPY002


class Normalised(nn.Module):
    """A policy with a layer that learns from whatever passes it in training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 2)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return self.head(self.norm(obs)).argmax(-1)


def test_layers_with_running_statistics_do_not_learn_from_an_evaluation():
    policy = Normalised().train()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    evaluate(policy, CountingEnv, 4)
    assert all(torch.equal(tensor, before[n]) for n, tensor in policy.state_dict().items())
    assert policy.training


@pytest.mark.parametrize("root", [True, False])
def test_every_layer_is_afterwards_in_the_mode_it_was_in(root):
    # Whoever trains with a frozen layer in evaluation mode must find it there again, and a layer
    # in training mode inside of a policy in evaluation mode must not learn meanwhile either.
    policy = Normalised().train(root)
    policy.norm.train(not root)
    modes = [module.training for module in policy.modules()]
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    evaluate(policy, CountingEnv, 4)
    assert [module.training for module in policy.modules()] == modes
    assert all(torch.equal(tensor, before[n]) for n, tensor in policy.state_dict().items())
    with pytest.raises(EnvError):
        evaluate(policy, lambda: FaultyEnv(crash, step=2), 4)
    assert [module.training for module in policy.modules()] == modes


class Torch(nn.Module):
    """A policy of its own kind: no noise of ours, a generator."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        assert obs.dtype == torch.float32
        assert not torch.is_grad_enabled()
        probs = self.head(obs / 1000).softmax(-1)
        if deterministic:
            return probs.argmax(-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

    def evaluate(self, obs, actions):
        raise AssertionError

    def value(self, obs):
        raise AssertionError


@pytest.mark.parametrize("deterministic", [True, False])
def test_any_module_that_acts_can_be_evaluated(deterministic):
    policy = Torch()
    assert isinstance(policy, Policy)
    results = [
        evaluate(policy, lambda: Patient(20), 4, deterministic=deterministic) for _ in range(2)
    ]
    assert results[0] == results[1]


TRAINED = PPOConfig(
    num_envs=3, num_steps=8, num_epochs=2, minibatch_size=8, policy=PolicyConfig(hidden_sizes=(8,))
)


def everything(agent):
    """All that training moves."""
    tensors = {f"policy.{name}": t for name, t in agent.policy.state_dict().items()}
    tensors |= {f"optimizer.{name}": t for name, t in agent._learner.state_dict().items()}
    tensors |= {f"scaler.{name}": t for name, t in agent._reward_scaler.state_dict().items()}
    tensors["minibatches"] = agent._generator.get_state()
    tensors["acting"] = agent._act_generator.get_state()
    moved = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    numpys = np.random.get_state()  # noqa: NPY002
    return moved | {
        "counts": (agent.steps, agent.updates, agent.goal, agent._learn_calls, len(agent._recent)),
        "modes": [module.training for module in agent.policy.modules()],
        "global": (random.getstate(), torch.get_rng_state().tolist(), numpys[1].tolist()),
    }


def by_the_agent(agent, env, deterministic):
    return agent.evaluate(env, 3, deterministic=deterministic)


def by_the_function(agent, env, deterministic):
    return evaluate(agent.policy, env, 3, deterministic=deterministic)


@pytest.mark.parametrize("how", [by_the_agent, by_the_function])
@pytest.mark.parametrize("env", [WalkEnv, "CartPole-v1"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_after_an_evaluation_as_if_there_had_been_none(how, env, num_workers):
    config = TRAINED.replace(num_workers=num_workers)
    alone = PPOAgent(config=config, seed=1).learn(env, 48).learn(env, 48)

    def between_updates(report):
        how(agent, env, False)

    agent = PPOAgent(config=config, seed=1)
    agent.learn(env, 48, callback=between_updates)
    for deterministic in (True, False):
        before = everything(agent)
        how(agent, env, deterministic)
        assert everything(agent) == before
    agent.learn(env, 48, callback=between_updates)
    assert everything(agent) == everything(alone)


def test_an_evaluation_that_fails_moves_nothing_either():
    agent = PPOAgent(config=TRAINED).learn(CountingEnv, 48)
    before = everything(agent)
    with pytest.raises(EnvError):
        agent.evaluate(lambda: FaultyEnv(crash, step=2), 4, deterministic=False)
    assert everything(agent) == before


# Environments


def test_the_callers_environment_is_used_and_left_open():
    env = Recorder(CountingEnv(3))
    result = evaluate(policy_for(), env, 2, num_envs=1)
    assert result.episode_lengths == (3, 3)
    assert len(env.actions) >= 6
    assert env.closed == 0


def test_the_callers_vector_environment_is_left_open():
    env = SyncVectorEnv(of_lengths(2, 3), autoreset_mode=AutoresetMode.SAME_STEP)
    for _ in range(2):
        assert evaluate(policy_for(), env, 2).episode_lengths == (2, 3)
    assert not env.closed


def test_environments_made_here_are_closed():
    made = []

    def make():
        made.append(Recorder(CountingEnv(3)))
        return made[-1]

    evaluate(policy_for(), make, 4)
    assert [env.closed for env in made] == [1] * 4


def test_environments_made_here_are_closed_after_an_error_too():
    made = []

    def make():
        made.append(Recorder(FaultyEnv(crash, step=2)))
        return made[-1]

    with pytest.raises(EnvError, match="environment 0"):
        evaluate(policy_for(), make, 4)
    assert [env.closed for env in made] == [1] * 4


def test_an_environment_in_the_middle_of_an_episode_starts_anew():
    env = OfLength(5)
    env.reset(seed=0)
    env.step(0)
    assert evaluate(policy_for(), env, 1).episode_lengths == (5,)


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt from its spec")
def test_an_environment_without_a_spec_plays_all_episodes_itself():
    env = Recorder(OfLength(2))
    assert evaluate(policy_for(), env, 6).episode_lengths == (2,) * 6
    assert len(env.seeds) >= 6


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt from its spec")
def test_other_episodes_are_played_than_in_a_training_with_the_same_seed():
    trained, played = Recorder(OfLength(2)), Recorder(OfLength(2))
    policy = policy_for()
    with RolloutCollector(trained, seed=3) as collector:
        collector.collect(policy, 20)
    evaluate(policy, played, 10, seed=3)
    assert len(trained.seeds) >= len(played.seeds) >= 10
    assert not set(trained.seeds) & set(played.seeds)


def test_arguments_reach_an_environment_given_by_id():
    policy = policy_for(lambda: gymnasium.make("CartPole-v1"))
    paid = evaluate(policy, "CartPole-v1", 2, env_kwargs={"sutton_barto_reward": True})
    assert paid.episode_returns == (-1.0, -1.0)


def test_images_are_evaluated():
    policy = policy_for(ImageEnv, cnn_features=8)
    assert len(evaluate(policy, ImageEnv, 2).episode_returns) == 2


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.Box(-0.5, 0.5, (2, 2), np.float64),
        spaces.Box(0.0, np.inf, (1,), np.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_environments_get_legal_actions_only(space, deterministic):
    class Strict(WithSpaces):
        def step(self, action):
            assert self.action_space.contains(action)
            return super().step(action)

    policy = policy_for(lambda: Strict(action_space=space), log_std_init=1.5)
    evaluate(policy, lambda: Strict(action_space=space), 4, deterministic=deterministic)


class Silent(VectorEnv):
    """Does not say how it resets."""

    metadata = {}  # noqa: RUF012
    num_envs = 2
    single_observation_space = CountingEnv.observation_space
    single_action_space = CountingEnv.action_space

    def __init__(self):
        self.inner = SyncVectorEnv(of_lengths(2, 3), autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, *, seed=None, options=None):
        return self.inner.reset(seed=seed, options=options)

    def step(self, actions):
        return self.inner.step(actions)


def test_a_vector_environment_that_does_not_say_how_it_resets_is_asked():
    with pytest.raises(EnvCreationError, match="autoreset_mode"):
        evaluate(policy_for(), Silent(), 2)
    result = evaluate(policy_for(), Silent(), 4, autoreset_mode="same_step")
    assert result.episode_lengths == (2, 2, 3, 3)


# Errors


@pytest.mark.parametrize("episodes", [0, -1, 1.5, "3"])
def test_a_number_of_episodes_that_is_none_is_an_error(episodes):
    with pytest.raises((ValueError, TypeError), match="episodes"):
        evaluate(policy_for(), CountingEnv, episodes)


@pytest.mark.parametrize("num_envs", [0, -1])
def test_a_number_of_environments_that_is_none_is_an_error(num_envs):
    with pytest.raises(ValueError, match="num_envs"):
        evaluate(policy_for(), CountingEnv, 3, num_envs=num_envs)


def test_an_unknown_environment_is_an_error():
    with pytest.raises(EnvCreationError, match="NoSuchEnv"):
        evaluate(policy_for(), "NoSuchEnv-v0", 3)
    with pytest.raises(TypeError, match="env must be"):
        evaluate(policy_for(), 3, 3)


def test_a_policy_for_other_spaces_is_an_error():
    with pytest.raises(SpaceError):
        evaluate(policy_for(), "CartPole-v1", 1)
    with pytest.raises(SpaceError):
        evaluate(policy_for(), WalkEnv, 1)


def test_an_agent_evaluates_with_its_own_seed():
    config = PPOConfig(num_envs=2, num_steps=8, policy=PolicyConfig(hidden_sizes=(4,)))
    results = [
        PPOAgent(policy_for(), config=config, seed=seed).evaluate(CountingEnv, 4)
        for seed in (0, 0, 1)
    ]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("policy", [None, "policy.safetensors", torch.nn.Linear(4, 2)], ids=str)
def test_what_is_no_policy_is_named(policy):
    kind = type(policy).__name__
    with pytest.raises(TypeError, match=f"methods act, got {kind} without act; make_policy"):
        evaluate(policy, "CartPole-v1", episodes=1)
    with RolloutCollector("CartPole-v1", num_envs=1, seed=0) as collector:
        with pytest.raises(TypeError, match=f"got {kind} without act, evaluate, value"):
            collector.collect(policy, 2)
        good = make_policy(collector.observation_space, collector.action_space)
        assert len(collector.collect(good, 2).rewards) == 2  # and nothing is lost
