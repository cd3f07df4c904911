import copy
import dataclasses
import itertools
import math
import random

import gymnasium
import numpy as np
import pytest
import torch
from collecting import tensors_of
from environments import (
    CountingEnv,
    FaultyEnv,
    ImageEnv,
    RandomSpacesEnv,
    Recorder,
    WalkEnv,
    WithSpaces,
    crash,
    infinite_reward,
    nan_obs,
    nan_reset_obs,
)
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from processes import run_script
from torch import nn

from ppo import (
    ActorCritic,
    Evaluation,
    Linear,
    PolicyConfig,
    PPOAgent,
    PPOConfig,
    PPOError,
    Report,
    RewardScaler,
    RolloutCollector,
    assembly,
    gae,
    make_policy,
    normalize,
    ppo_loss,
    revalue,
)
from ppo.checkpoint import read_checkpoint
from ppo.errors import (
    CheckpointError,
    ConfigError,
    EnvCreationError,
    EnvError,
    NonFiniteError,
    SpaceError,
)

SMALL = PPOConfig(
    num_envs=2,
    num_steps=16,
    num_epochs=2,
    minibatch_size=16,
    learning_rate=1e-3,
    policy=PolicyConfig(hidden_sizes=(8,)),
)
METRICS = {
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "explained_variance",
    "grad_norm",
    "learning_rate",
    "steps_per_second",
    "episode_return",
    "episode_length",
}
ROLLOUT = SMALL.num_envs * SMALL.num_steps


class OwnPolicy(nn.Module):
    """The least that the protocol asks for, for two observed numbers and two actions."""

    def __init__(self, num_inputs=2):
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = nn.Linear(num_inputs, 2), nn.Linear(num_inputs, 1)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        probs = self.actor(obs / 1000).softmax(-1)
        if deterministic:
            return probs.argmax(-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

    def evaluate(self, obs, actions):
        log_p = self.actor(obs / 1000).log_softmax(-1)
        chosen = log_p.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        return Evaluation(chosen, -(log_p.exp() * log_p).sum(-1), self.value(obs))

    def value(self, obs):
        return self.critic(obs / 1000).squeeze(-1)


class Float64Env(CountingEnv):
    """Observes in float64, as MuJoCo does."""

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float64)

    def observe(self):
        return super().observe().astype(np.float64)


class ScaledEnv(CountingEnv):
    """Pays in another currency."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.scale * reward, *rest


def fingerprint(agent):
    """Everything that training moves, to the bit."""
    state = {
        "policy": agent.policy.state_dict(),
        "optimizer": agent._learner.state_dict(),
        "scaler": agent._reward_scaler.state_dict() if agent._reward_scaler else {},
        "generators": {
            "minibatches": agent._generator.get_state(),
            "acting": agent._act_generator.get_state(),
        },
    }
    tensors = {
        f"{group}.{name}": tensor.numpy().tobytes()
        for group, tensors in state.items()
        for name, tensor in tensors.items()
    }
    return tensors | {"steps": agent.steps, "updates": agent.updates}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def train(env=CountingEnv, steps=3 * ROLLOUT, config=SMALL, seed=0, policy=None, **learn):
    """A trained agent and what it reported, timing apart."""
    agent, reports = PPOAgent(policy, config=config, seed=seed), []
    agent._logger = reports.append
    agent.learn(env, steps, **learn)
    return agent, [summary(report) for report in reports]


def summary(report):
    metrics = {k: repr(v) for k, v in report.metrics.items() if k != "steps_per_second"}
    return report.steps, report.updates, report.episodes, metrics


def rollout_for(agent, env=CountingEnv, num_steps=16, num_envs=2, seed=0):
    with RolloutCollector(env, num_envs=num_envs, seed=seed) as collector:
        return collector.collect(agent.policy, num_steps)


def vector(mode, length=3, ending=None, count=2):
    return SyncVectorEnv([lambda: CountingEnv(length, ending)] * count, autoreset_mode=mode)


# Reproducibility


@pytest.mark.parametrize("policy", ["MlpPolicy", SMALL, ActorCritic, nn.Linear(4, 2)], ids=str)
def test_what_is_no_policy_is_refused_with_the_place_for_settings(policy):
    with pytest.raises(TypeError, match=r"policy must be an nn\.Module .* settings go to config="):
        PPOAgent(policy)


def test_settings_in_a_dictionary_are_refused_with_what_makes_a_config_of_them():
    with pytest.raises(TypeError, match=r"config must be a PPOConfig, got dict; PPOConfig\.from_d"):
        PPOAgent(config={"gamma": 0.9})


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_a_seed_that_is_none_is_named(seed):
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        PPOAgent(seed=seed)


@pytest.mark.parametrize("env", [CountingEnv, WalkEnv, "CartPole-v1"])
def test_the_same_seed_gives_the_same_agent_to_the_bit(env):
    (one, reports), (other, same_reports) = train(env), train(env)
    assert_same(fingerprint(one), fingerprint(other))
    assert reports == same_reports


def test_different_seeds_give_different_agents():
    agents = [train(seed=seed)[0] for seed in (0, 1)]
    weights = [agent.policy.value_head.weight for agent in agents]
    assert not torch.equal(*weights)
    assert rollout_for(agents[0]).obs.shape == (16, 2, 2)


def test_the_next_seed_shares_no_episode():
    episodes = []
    for seed in (0, 1):
        _, reports = train(seed=seed)
        episodes.append({ep.episode_return for report in reports for ep in report[2]})
    # Returns hold the tag, drawn from a thousand, times the length.
    assert len(episodes[0] & episodes[1]) < len(episodes[0]) / 2


@pytest.mark.parametrize("env", [WalkEnv, "CartPole-v1"])
def test_worker_processes_change_nothing(env):
    config = SMALL.replace(num_envs=3)
    alone, reports = train(env, config=config)
    crowd, same_reports = train(env, config=config.replace(num_workers=2))
    assert_same(fingerprint(alone), fingerprint(crowd))
    assert reports == same_reports


@pytest.mark.parametrize("make_policy_of_own", [lambda: None, OwnPolicy])
def test_nothing_a_user_does_beside_training_changes_it(tmp_path, make_policy_of_own):
    undisturbed, reports = train(policy=make_policy_of_own())

    def disturb(report):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.manual_seed(report.steps)
        agent.act(np.ones(2, np.float32))
        agent.evaluate(CountingEnv, episodes=3)
        agent.evaluate(CountingEnv, episodes=3, deterministic=False)
        agent.save(tmp_path / "in_between.safetensors")

    torch.manual_seed(99)
    agent, same_reports = PPOAgent(make_policy_of_own(), config=SMALL), []
    agent._logger = lambda report: same_reports.append(summary(report))
    agent.learn(CountingEnv, 3 * ROLLOUT, callback=disturb, progress=True)
    assert_same(fingerprint(undisturbed), fingerprint(agent))
    assert reports == same_reports


def test_a_policy_put_in_the_place_of_another_is_trained(tmp_path):
    agent, _ = train(WalkEnv)
    old, moments = agent.policy, agent._learner.state_dict()
    fixed = copy.deepcopy(old.state_dict())
    new = make_policy(old.observation_space, old.action_space, SMALL.policy, seed=9)
    before = copy.deepcopy(new.state_dict())
    agent.policy = new
    with RolloutCollector(WalkEnv, num_envs=SMALL.num_envs, seed=0) as collector:
        agent.update(collector.collect(new, SMALL.num_steps))
    assert all(not torch.equal(p, before[name]) for name, p in new.named_parameters())
    assert all(torch.equal(t, fixed[name]) for name, t in old.state_dict().items())
    assert agent._learner.state_dict().keys() == moments.keys()
    agent.policy = old
    agent.save(tmp_path / "agent")
    assert PPOAgent.load(tmp_path / "agent")._learner.state_dict()["actor.step"] == 0


def test_a_policy_may_be_put_into_an_agent_that_has_none():
    given = make_policy(WalkEnv.observation_space, WalkEnv.action_space, SMALL.policy, seed=9)
    built, late = PPOAgent(copy.deepcopy(given), config=SMALL), PPOAgent(config=SMALL)
    late.policy = given
    for agent in (built, late):
        agent.learn(WalkEnv, ROLLOUT)
    assert late.policy is given
    assert_same(fingerprint(built), fingerprint(late))


def test_numbers_of_any_kind_are_taken_and_can_be_saved(tmp_path):
    agent = PPOAgent(config=SMALL, seed=np.int64(3))
    agent.learn(CountingEnv, np.int32(1)).learn(CountingEnv, 1.5e1)
    agent.save(tmp_path / "agent")
    loaded = PPOAgent.load(tmp_path / "agent")
    assert (loaded.seed, loaded.goal) == (3, ROLLOUT + 15)


@pytest.mark.parametrize("steps", [math.inf, math.nan, 0.5, 0])
def test_a_number_of_steps_that_is_none_is_named(steps):
    with pytest.raises(ValueError, match="steps must be at least 1 and finite, got"):
        PPOAgent(config=SMALL).learn(CountingEnv, steps)


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device 'foo' is unknown"):
        PPOAgent(device="foo")


def test_no_global_generator_is_touched():
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    agent, _ = train(WalkEnv)
    agent.act(np.ones(2, np.float32), deterministic=False)
    agent.evaluate(WalkEnv, episodes=2, deterministic=False)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2][1])  # noqa: NPY002


LEARNS = """
import sys, tempfile
from torch import nn
from ppo import PolicyConfig, PPOAgent, PPOConfig
nn.Linear(1, 1, device="meta")  # in PyTorch 2.6 this imports sympy by itself
before = set(sys.modules)
config = PPOConfig(num_envs=2, num_steps=16, num_epochs=2, minibatch_size=8, num_workers=0)
for memory in (None, "lstm", "gru"):
    agent = PPOAgent(config=config.replace(policy=PolicyConfig(memory=memory)))
    with tempfile.TemporaryDirectory() as folder:
        agent.learn("CartPole-v1", steps=32).save(folder + "/agent.safetensors")
        PPOAgent.load(folder + "/agent.safetensors")
print(*{"sympy", "torch._dynamo", "torch._inductor"} & sys.modules.keys() - before)
"""


def test_learning_and_loading_do_not_wait_for_torchs_compilers_to_be_imported():
    assert run_script(None, LEARNS) == (0, "\n", "")


# learn


@pytest.mark.parametrize("steps", ["1000", None, [64], True])
def test_steps_that_are_no_number_are_an_error_that_says_so(steps):
    with pytest.raises(TypeError, match=r"steps is .*wanted a number"):
        PPOAgent(config=SMALL).learn(CountingEnv, steps)


@pytest.mark.parametrize("steps", [0, -1, -100, float("nan")])
def test_a_number_of_steps_that_trains_nothing_is_an_error(steps):
    agent = PPOAgent(config=SMALL)
    with pytest.raises(ValueError, match="steps must be"):
        agent.learn(CountingEnv, steps)
    assert agent.policy is None
    assert agent.steps == 0


def test_learn_returns_the_agent_after_at_least_one_update():
    agent = PPOAgent(config=SMALL)
    assert agent.learn(CountingEnv, 1) is agent
    assert (agent.steps, agent.updates) == (ROLLOUT, 1)


def test_steps_are_rounded_up_to_whole_rollouts_and_add_up():
    agent = PPOAgent(config=SMALL).learn(CountingEnv, 2 * ROLLOUT)
    assert (agent.steps, agent.updates) == (2 * ROLLOUT, 2)
    agent.learn(CountingEnv, ROLLOUT + 1)
    assert (agent.steps, agent.updates) == (4 * ROLLOUT, 4)


def test_a_vector_environment_brings_its_own_number_of_environments():
    env = vector(AutoresetMode.SAME_STEP, count=5)
    agent = PPOAgent(config=SMALL).learn(env, 1)
    assert agent.steps == 5 * SMALL.num_steps
    env.reset()  # not closed


def test_a_second_call_plays_other_episodes():
    seen = []
    agent = PPOAgent(config=SMALL)
    for _ in range(2):
        agent.learn(CountingEnv, 2 * ROLLOUT, callback=lambda report: seen.append(report.episodes))
    first, second = ({ep.episode_return for ep in seen[i] + seen[i + 1]} for i in (0, 2))
    assert len(first & second) < len(first) / 2


def test_a_second_call_may_have_another_number_of_environments():
    agent = PPOAgent(config=SMALL)
    for count in (2, 5, 1):
        agent.learn(vector(AutoresetMode.SAME_STEP, count=count), 1)
    assert agent.steps == 8 * SMALL.num_steps


def test_returns_of_a_call_do_not_go_on_into_the_next():
    # Episodes longer than a call; the tag of each is in its first reward.
    class Watched(CountingEnv):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            paid.append(reward)
            return obs, reward, *rest

    paid, expected = [], []
    agent = PPOAgent(config=SMALL.replace(num_envs=1))
    for _ in range(2):
        agent.learn(lambda: Watched(length=1000), 1)
        total = 0.0
        for reward in paid[-SMALL.num_steps :]:
            total = SMALL.gamma * total + reward
            expected.append(total)
    assert agent._reward_scaler.moments.mean.item() == pytest.approx(np.mean(expected))
    assert agent._reward_scaler.moments.std.item() == pytest.approx(np.std(expected))


def test_rows_that_only_reset_are_no_steps():
    # Episodes of 3 steps and a row for the reset: 12 of 16 rows are transitions.
    agent, reports = train(vector(AutoresetMode.NEXT_STEP), steps=48)
    assert [report[0] for report in reports] == [24, 48]
    assert agent.policy.normalizer.count == 48


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_mode_trains(mode):
    agent, reports = train(vector(mode, length=None))
    assert agent.steps >= 3 * ROLLOUT
    assert all(1 <= episode.episode_length <= 6 for report in reports for episode in report[2])


def test_a_rollout_of_nothing_but_resets_is_survived():
    # One row each: every second one only resets.
    env = vector(AutoresetMode.NEXT_STEP, length=1)
    agent = PPOAgent(config=SMALL.replace(num_steps=1)).learn(env, 6)
    assert agent.steps == 6
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


@pytest.mark.parametrize("minibatch_size", [1, 15, 10_000])
def test_any_size_of_minibatch_trains(minibatch_size):
    agent, _ = train(config=SMALL.replace(minibatch_size=minibatch_size, num_epochs=1))
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_one_environment_and_one_step_train():
    agent, _ = train(config=SMALL.replace(num_envs=1, num_steps=1), steps=10)
    assert (agent.steps, agent.updates) == (10, 10)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


@pytest.mark.parametrize("mode", ["rollout", "minibatch", "none"])
def test_every_way_to_normalise_advantages_trains(mode):
    _, reports = train(config=SMALL.replace(normalize_advantages=mode))
    assert len({r[3]["policy_loss"] for r in reports}) == 3


def test_without_normalisation_advantages_stay_in_units_of_reward():
    losses = {}
    for mode in ("rollout", "minibatch", "none"):
        config = SMALL.replace(
            normalize_advantages=mode, normalize_rewards=False, num_epochs=1, minibatch_size=10_000
        )
        losses[mode] = float(train(config=config, steps=1)[1][0][3]["policy_loss"])
    # Ratio 1: the loss is minus the mean advantage, 0 if normalised, hundreds here if not.
    assert losses["rollout"] == pytest.approx(0.0, abs=1e-5)
    assert losses["minibatch"] == pytest.approx(0.0, abs=1e-5)
    assert losses["none"] < -10.0


@pytest.mark.parametrize("mode", ["rollout", "minibatch"])
def test_rows_that_only_reset_take_no_part_in_normalising_advantages(mode):
    config = SMALL.replace(normalize_advantages=mode, num_epochs=1, minibatch_size=10_000)
    _, reports = train(vector(AutoresetMode.NEXT_STEP, length=None), config=config)
    for report in reports:
        assert float(report[3]["policy_loss"]) == pytest.approx(0.0, abs=1e-5)


def test_rows_that_only_reset_count_nowhere_in_an_update():
    agents = [train()[0] for _ in range(2)]
    rollout = rollout_for(agents[0], vector(AutoresetMode.NEXT_STEP))
    assert not rollout.valid.all()
    rubbish = {
        name: torch.where(rollout.valid, getattr(rollout, name), 1e6)
        for name in ("rewards", "values", "next_values", "log_probs")
    }
    rollouts = [rollout, dataclasses.replace(rollout, **rubbish)]
    metrics = [agent.update(r) for agent, r in zip(agents, rollouts, strict=True)]
    assert repr(metrics[0]) == repr(metrics[1])
    assert_same(*map(fingerprint, agents))


def test_the_callers_environment_is_used_and_not_closed():
    env = Recorder(CountingEnv())
    PPOAgent(config=SMALL.replace(num_envs=1)).learn(env, 1)
    assert len(env.actions) == SMALL.num_steps
    assert env.closed == 0


def test_the_configured_environment_comes_with_its_arguments_and_wrappers():
    config = SMALL.replace(
        env="CartPole-v1",
        env_kwargs={"sutton_barto_reward": True},
        wrappers=[{"TimeLimit": {"max_episode_steps": 3}}],
    )
    agent = PPOAgent(config=config).learn("CartPole-v1", 1)
    result = agent.evaluate("CartPole-v1", episodes=2)
    assert result.episode_lengths == (3, 3)
    assert result.episode_returns == (0.0, 0.0)
    plain = agent.evaluate(gymnasium.make("CartPole-v1"), episodes=1)
    assert plain.episode_lengths[0] > 3


# Reports


def test_a_report_says_how_far_and_how_well():
    reports = []
    agent = PPOAgent(config=SMALL, logger=reports.append)
    seen = []
    agent.learn(CountingEnv, 2 * ROLLOUT, callback=seen.append)
    agent.learn(CountingEnv, 1, callback=seen.append)
    assert seen == reports
    assert [(r.steps, r.goal, r.updates) for r in seen] == [
        (ROLLOUT, 2 * ROLLOUT, 1),
        (2 * ROLLOUT, 2 * ROLLOUT, 2),
        (3 * ROLLOUT, 2 * ROLLOUT + 1, 3),
    ]
    for report in seen:
        assert isinstance(report, Report)
        assert set(report.metrics) == METRICS
        assert all(type(value) is float for value in report.metrics.values())
        assert report.episodes
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.steps = 0


def test_returns_and_lengths_are_means_over_the_last_hundred_episodes():
    seen = []
    PPOAgent(config=SMALL).learn(CountingEnv, 14 * ROLLOUT, callback=seen.append)
    episodes = list(itertools.chain.from_iterable(report.episodes for report in seen))
    assert len(episodes) > 100
    for name in ("episode_return", "episode_length"):
        wanted = np.mean([getattr(episode, name) for episode in episodes[-100:]])
        assert seen[-1].metrics[name] == pytest.approx(wanted)


def test_before_the_first_episode_ends_its_return_is_nan():
    seen = []
    PPOAgent(config=SMALL).learn(lambda: CountingEnv(length=1000), 1, callback=seen.append)
    assert seen[0].episodes == ()
    assert math.isnan(seen[0].metrics["episode_return"])
    assert math.isnan(seen[0].metrics["episode_length"])


def test_what_is_to_be_called_must_be_a_function():
    agent = PPOAgent(config=SMALL)
    with pytest.raises(TypeError, match=r"callback is 5 \(int\), wanted a function"):
        agent.learn(CountingEnv, 1, callback=5)
    assert (agent.policy, agent.goal) == (None, 0)
    with pytest.raises(TypeError, match=r"logger is 'log.txt' \(str\), wanted a function"):
        PPOAgent(logger="log.txt")


def test_a_callback_that_returns_false_stops_and_nothing_else_does():
    answers = iter([None, 0, "", True, False, None])
    agent = PPOAgent(config=SMALL).learn(
        CountingEnv, 100 * ROLLOUT, callback=lambda report: next(answers)
    )
    assert agent.updates == 5
    agent.learn(CountingEnv, 1)
    assert agent.updates == 6


def test_an_error_in_a_callback_reaches_the_user_and_loses_nothing():
    def fail(report):
        raise KeyboardInterrupt

    agent = PPOAgent(config=SMALL)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(CountingEnv, 10 * ROLLOUT, callback=fail)
    assert agent.steps == ROLLOUT
    agent.learn(CountingEnv, 1)
    assert agent.steps == 2 * ROLLOUT


def test_the_progress_bar_shows_only_when_asked(capsys):
    PPOAgent(config=SMALL).learn(CountingEnv, 1, progress=False)
    PPOAgent(config=SMALL).learn(CountingEnv, 1)  # stderr is no terminal here
    assert capsys.readouterr() == ("", "")
    PPOAgent(config=SMALL).learn(CountingEnv, 1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "return" in err


# Schedules


def learning_rates(agent, env, steps):
    """Learning rate of every update, with the share of the training that was done before it."""
    rates, before = [], [agent.steps]

    def record(report):
        rates.append((before[0] / report.goal, report.metrics["learning_rate"]))
        before[0] = report.steps

    agent.learn(env, steps, callback=record)
    return rates


def test_the_learning_rate_follows_its_schedule(tmp_path):
    schedule = Linear(1e-3, 1e-4)
    agent = PPOAgent(config=SMALL.replace(learning_rate=schedule))
    rates = learning_rates(agent, CountingEnv, 4 * ROLLOUT - 1)
    assert rates[0] == (0.0, 1e-3)
    assert len(rates) == 4
    # A second call continues from where the first one ended, not from the start.
    rates += learning_rates(agent, CountingEnv, 4 * ROLLOUT)
    assert rates[4][0] == pytest.approx(0.5)
    agent.save(tmp_path / "agent.safetensors")
    loaded = PPOAgent.load(tmp_path / "agent.safetensors")
    rates += learning_rates(loaded, CountingEnv, 8 * ROLLOUT)
    assert rates[8][0] == pytest.approx(0.5)
    for progress, rate in rates:
        assert rate == pytest.approx(schedule(progress), rel=1e-12)


def test_a_learning_rate_never_goes_below_its_end():
    config = SMALL.replace(learning_rate=Linear(1e-3, 0.0))
    rates = learning_rates(PPOAgent(config=config), vector(AutoresetMode.NEXT_STEP), 100)
    assert all(0.0 < rate <= 1e-3 for _, rate in rates)


def test_clip_range_and_entropy_coefficient_follow_their_schedules():
    seen = []
    config = SMALL.replace(clip_range=Linear(0.2, 0.1), entropy_coef=Linear(0.0, 1.0))
    agent = PPOAgent(config=config).learn(CountingEnv, 1)
    improve = agent._learner.improve

    def spy(*args, **kwargs):
        seen.append((kwargs["clip_range"], kwargs["entropy_coef"]))
        return improve(*args, **kwargs)

    agent._learner.improve = spy
    agent.learn(CountingEnv, 3 * ROLLOUT)
    assert seen == [pytest.approx(pair) for pair in [(0.175, 0.25), (0.15, 0.5), (0.125, 0.75)]]


def test_the_options_of_the_config_reach_the_learner():
    seen = []
    config = SMALL.replace(
        learning_rates={"critic": Linear(1e-2, 0.0)},
        clip_range_high=Linear(0.4, 0.2),
        dual_clip=3.0,
        adaptive_kl=1.0,
        normalize_advantages="minibatch",
    )
    agent = PPOAgent(config=config).learn(CountingEnv, 1)
    settings = agent._learner._settings
    for name in ("dual_clip", "adaptive_kl", "num_epochs", "normalize_advantages", "optimizer"):
        assert getattr(settings, name) == getattr(config, name), name
    improve = agent._learner.improve

    def spy(*args, **kwargs):
        seen.append((kwargs["learning_rates"]["critic"], kwargs["clip_range_high"]))
        return improve(*args, **kwargs)

    agent._learner.improve = spy
    agent.learn(CountingEnv, ROLLOUT)
    assert seen == [pytest.approx((0.005, 0.3))]


def test_a_report_says_the_learning_rate_as_it_was_adapted():
    config = SMALL.replace(adaptive_kl=1e3, learning_rate=1e-4)
    rates = [rate for _, rate in learning_rates(PPOAgent(config=config), CountingEnv, 4 * ROLLOUT)]
    assert rates == pytest.approx([1e-4 * 1.5**number for number in range(4)])


@pytest.mark.parametrize("own", [False, True])
def test_a_rate_for_a_group_that_is_not_there_is_an_error_before_anything_is_played(own):
    config = SMALL.replace(
        learning_rates={"critic": 1e-2}, policy=PolicyConfig(hidden_sizes=(8,), shared=True)
    )
    if own:
        with pytest.raises(ConfigError, match="learning_rates has 'critic'"):
            PPOAgent(OwnPolicy(), config=config)
        return
    agent = PPOAgent(config=config)
    for _ in range(2):  # the agent is as fresh as it was
        with pytest.raises(ConfigError, match="learning_rates has 'critic'"):
            agent.learn(CountingEnv, 1)
        assert agent.policy is None
        assert agent.steps == 0


def test_updates_in_a_loop_of_ones_own_keep_the_first_learning_rate():
    # Nobody has said when the training ends.
    env = CountingEnv()
    policy = make_policy(env.observation_space, env.action_space)
    agent = PPOAgent(policy, config=SMALL.replace(learning_rate=Linear(1e-3, 0.0)))
    rates = [agent.update(rollout_for(agent))["learning_rate"] for _ in range(3)]
    assert rates == [1e-3, 1e-3, 1e-3]


# update


@pytest.mark.parametrize("env", [CountingEnv, WalkEnv, "CartPole-v1"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_first_ratio_is_one(env, shared, num_workers):
    config = SMALL.replace(
        num_epochs=1,
        minibatch_size=10_000,
        num_workers=num_workers,
        policy=PolicyConfig(hidden_sizes=(8,), shared=shared, output_gain=1.0),
    )
    _, reports = train(env, config=config)
    for report in reports:
        assert float(report[3]["approx_kl"]) == pytest.approx(0.0, abs=1e-6)
        assert float(report[3]["clip_fraction"]) == 0.0


class WatchedActorCritic(ActorCritic):
    """Writes down the number of observations its normaliser knew in each evaluation."""

    def evaluate(self, obs, actions):
        self.counts.append(int(self.normalizer.count))
        return super().evaluate(obs, actions)


def test_the_observation_normaliser_rests_while_the_policy_learns():
    agent = PPOAgent(config=SMALL).learn(CountingEnv, 1)
    policy = agent.policy
    policy.__class__, policy.counts = WatchedActorCritic, []
    watched = PPOAgent(policy, config=SMALL)
    watched.learn(CountingEnv, 3 * ROLLOUT)
    per_update = 1 + SMALL.num_epochs * 2  # of the collector, and of each minibatch
    wanted = [ROLLOUT * number for number in (1, 2, 3) for _ in range(per_update)]
    assert policy.counts == wanted
    assert policy.normalizer.count == 4 * ROLLOUT


def test_the_observation_normaliser_knows_exactly_what_was_collected():
    agent = PPOAgent(config=SMALL).learn(CountingEnv, 1)
    before = agent.policy.normalizer.mean.clone()
    rollout = rollout_for(agent)
    agent.update(rollout)
    new = rollout.obs.flatten(0, 1).double().mean(0)
    torch.testing.assert_close(agent.policy.normalizer.mean, (before + new) / 2)
    assert (rollout.obs[..., 0] % 1 == 0).all()  # raw counts


def test_normalised_rewards_make_the_unit_of_reward_irrelevant():
    # A power of two is exact in floating point.
    agents = [train(lambda scale=scale: ScaledEnv(scale))[0] for scale in (1.0, 64.0)]
    weights = [agent.policy.state_dict() for agent in agents]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name
    config = SMALL.replace(normalize_rewards=False)
    plain = [train(lambda s=s: ScaledEnv(s), config=config)[0] for s in (1.0, 64.0)]
    assert not torch.equal(*(agent.policy.value_head.weight for agent in plain))
    assert plain[0]._reward_scaler is None


def test_update_needs_a_policy():
    agent = PPOAgent(config=SMALL)
    trained, _ = train()
    with pytest.raises(PPOError, match="policy"):
        agent.update(rollout_for(trained))


def test_update_leaves_the_rollout_as_it_was():
    agent, _ = train()
    rollout = rollout_for(agent)
    before = {name: tensor.clone() for name, tensor in tensors_of(rollout).items()}
    agent.update(rollout)
    after = tensors_of(rollout)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_rollout_from_elsewhere_is_learned_from():
    agent = PPOAgent(config=SMALL).learn(CountingEnv, 1)
    agent.update(rollout_for(agent, num_steps=5))
    assert agent.steps == ROLLOUT + 10


def test_rollouts_may_come_from_different_numbers_of_environments():
    agent = PPOAgent(config=SMALL).learn(CountingEnv, 1)
    scaler = RewardScaler(SMALL.gamma, SMALL.num_envs)
    scaler.load_state_dict(agent._reward_scaler.state_dict())
    # Episodes go on from one rollout to the next, unless the environments are others.
    for num_envs in (2, 5, 5, 1):
        rollout = rollout_for(agent, num_steps=2, num_envs=num_envs)
        agent.update(rollout)
        if num_envs != scaler.num_envs:
            scaler.reset(num_envs)
        scaler(rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid)
        for name, tensor in scaler.state_dict().items():
            assert torch.equal(agent._reward_scaler.state_dict()[name], tensor), name
    assert agent.steps == ROLLOUT + 2 * 13


@pytest.mark.parametrize("env", [CountingEnv, WalkEnv])
@pytest.mark.parametrize(
    ("advantages_per", "normalize_rewards", "recompute", "memory"),
    [
        ("rollout", False, False, None),
        ("rollout", True, False, None),
        ("minibatch", False, False, None),
        ("minibatch", True, True, None),
        ("none", True, False, None),
        ("none", False, True, None),
        ("rollout", True, True, "lstm"),
        ("minibatch", False, False, "gru"),
    ],
)
def test_a_loop_of_public_names_computes_the_same_update(
    env, advantages_per, normalize_rewards, recompute, memory
):
    config = SMALL.replace(
        normalize_advantages=advantages_per,
        normalize_rewards=normalize_rewards,
        recompute_advantages=recompute,
        entropy_coef=0.01,
        max_grad_norm=0.1,
        policy=dataclasses.replace(SMALL.policy, memory=memory, memory_steps=3),
    )
    agent = PPOAgent(config=config, seed=1)
    with RolloutCollector(env, num_envs=2, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space, config.policy)
        agent = PPOAgent(policy, config=config)
        mine = make_policy(collector.observation_space, collector.action_space, config.policy)
        optimizer = torch.optim.Adam(mine.parameters(), eps=config.adam_eps)
        scaler = RewardScaler(config.gamma, collector.num_envs)
        generator = torch.Generator()
        generator.set_state(agent._generator.get_state())
        for _ in range(3):
            rollout = collector.collect(agent.policy, config.num_steps)
            agent.update(rollout)

            rewards = rollout.rewards
            if normalize_rewards:
                rewards = scaler(rewards, rollout.terminated, rollout.truncated)
            for epoch in range(config.num_epochs):
                if recompute and epoch:
                    rollout = revalue(mine, rollout)
                advantages, returns = gae(
                    rewards,
                    rollout.values,
                    rollout.next_values,
                    rollout.terminated,
                    rollout.truncated,
                    gamma=config.gamma,
                    gae_lambda=config.gae_lambda,
                )
                if advantages_per == "rollout":
                    advantages = normalize(advantages)
                batch = rollout.flatten(advantages=advantages, returns=returns)
                for mini in batch.minibatches(config.minibatch_size, generator):
                    new = mine.evaluate(mini.obs, mini.actions, **mini.context)
                    loss = ppo_loss(
                        new.log_probs,
                        mini.log_probs,
                        normalize(mini.advantages)
                        if advantages_per == "minibatch"
                        else mini.advantages,
                        new.values,
                        mini.returns,
                        new.entropy,
                        clip_range=0.2,
                        value_coef=config.value_coef,
                        entropy_coef=0.01,
                    )
                    optimizer.zero_grad()
                    loss.total.backward()
                    for group in mine.parameter_groups().values():
                        nn.utils.clip_grad_norm_(group, config.max_grad_norm)
                    optimizer.param_groups[0]["lr"] = 1e-3
                    optimizer.step()
            mine.update_normalizer(batch.obs)
    for (name, ours), theirs in zip(
        agent.policy.state_dict().items(), mine.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=name)


def test_a_custom_policy_learns_by_the_same_call():
    agent, reports = train(policy=OwnPolicy())
    fresh = OwnPolicy()
    assert not torch.equal(agent.policy.actor.weight, fresh.actor.weight)
    assert float(reports[0][3]["approx_kl"]) < 1e-3
    assert int(agent.act(np.ones(2, np.float32))) in (0, 1)


# Errors leave the agent as it was


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"fault": nan_obs, "step": 10}, NonFiniteError),
        ({"fault": infinite_reward, "step": 10}, NonFiniteError),
        ({"fault": nan_reset_obs, "reset": 1}, NonFiniteError),
        ({"fault": crash, "step": 10}, EnvError),
    ],
)
def test_a_broken_environment_leaves_the_agent_as_it_was(num_workers, fault, error):
    agent, _ = train(config=SMALL.replace(num_workers=num_workers))
    before = fingerprint(agent)
    with pytest.raises(error, match="environment"):
        agent.learn(lambda: FaultyEnv(**fault), 1)
    assert_same(without_sums(fingerprint(agent)), without_sums(before))
    agent.learn(CountingEnv, 1)
    assert agent.steps == 4 * ROLLOUT
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def without_sums(state):
    """Without the returns so far of the episodes that went on; theirs are gone with them."""
    return {name: value for name, value in state.items() if name != "scaler.returns"}


@pytest.mark.parametrize("field", ["rewards", "values", "next_values", "log_probs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rollout_that_is_not_finite_is_refused_and_nothing_moves(field, value):
    agent, _ = train()
    rollout = rollout_for(agent)
    bad = getattr(rollout, field).clone()
    bad[2, 1] = value
    terminated = rollout.terminated.clone()
    terminated[2, 1] = False  # where an episode terminated, next_values counts for nothing
    broken = dataclasses.replace(rollout, terminated=terminated, **{field: bad})
    before = fingerprint(agent)
    with pytest.raises(NonFiniteError):
        agent.update(broken)
    assert_same(fingerprint(agent), before)
    agent.update(rollout)
    assert agent.updates == 4


def test_a_non_finite_rollout_is_blamed_on_the_field_that_is():
    agent, _ = train()
    rollout = rollout_for(agent)
    for field in ("rewards", "values", "log_probs"):
        bad = getattr(rollout, field).clone()
        bad[2, 1] = torch.nan
        with pytest.raises(NonFiniteError, match=rf"{field}.*step 2.*environment 1"):
            agent.update(dataclasses.replace(rollout, **{field: bad}))


def test_a_learning_rate_that_explodes_is_an_error_and_nothing_moves():
    agent, _ = train()
    rollout = rollout_for(agent)
    before = fingerprint(agent)
    agent.config = agent.config.replace(learning_rate=1e38)
    with pytest.raises(NonFiniteError, match="learning_rate"):
        agent.update(rollout)
    before["generators.minibatches"] = fingerprint(agent)["generators.minibatches"]
    assert_same(fingerprint(agent), before)


def test_an_environment_with_other_spaces_is_refused():
    agent, _ = train()
    before = fingerprint(agent)
    for other in (WalkEnv, "CartPole-v1", lambda: WithSpaces(action_space=spaces.Discrete(3))):
        with pytest.raises(SpaceError, match="spaces"):
            agent.learn(other, 1)
    assert_same(fingerprint(agent), before)
    agent.learn(CountingEnv, 1)


def test_a_policy_for_other_spaces_is_refused_and_can_still_be_trained_on_its_own():
    env = CountingEnv()
    agent = PPOAgent(make_policy(env.observation_space, env.action_space), config=SMALL)
    with pytest.raises(SpaceError):
        agent.learn("CartPole-v1", 1)
    agent.learn(CountingEnv, 1)
    assert agent.steps == ROLLOUT


def test_an_environment_that_cannot_be_made_leaves_a_fresh_agent_fresh():
    agent = PPOAgent(config=SMALL)
    with pytest.raises(EnvCreationError, match="NoSuchEnv"):
        agent.learn("NoSuchEnv-v0", 1)
    with pytest.raises(SpaceError):
        agent.learn(lambda: WithSpaces(action_space=spaces.Text(2)), 1)
    with pytest.raises(TypeError):
        agent.learn(3, 1)
    assert agent.policy is None
    agent.learn(CountingEnv, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda agent, path: agent.act(np.zeros(2)),
        lambda agent, path: agent.evaluate(CountingEnv),
        lambda agent, path: agent.save(path),
    ],
)
def test_an_agent_that_never_learned_says_so(call, tmp_path):
    path = tmp_path / "agent.safetensors"
    with pytest.raises(PPOError, match="learn"):
        call(PPOAgent(), path)
    assert list(tmp_path.iterdir()) == []


# act


ACTION_SPACES = [
    spaces.Discrete(3),
    spaces.Discrete(4, start=-2),
    spaces.Discrete(2, start=5),
    spaces.Box(-1.0, 1.0, (2,), np.float32),
    spaces.Box(0.0, np.inf, (1,), np.float64),
    spaces.Box(-0.1, 0.1, (2, 3), np.float32),
    spaces.Box(np.float32([-1, 0]), np.float32([0, np.inf]), dtype=np.float32),
    spaces.Box(-1.0, 1.0, (), np.float32),
]


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_actions_are_what_the_environment_takes(space):
    config = SMALL.replace(policy=PolicyConfig(hidden_sizes=(8,), log_std_init=1.5))
    agent, _ = train(lambda: WithSpaces(action_space=space), steps=1, config=config)
    obs = agent.observation_space.sample()
    for deterministic in (True, False):
        action = agent.act(obs, deterministic=deterministic)
        assert space.contains(action), action
        batch = agent.act(np.stack([obs] * 40), deterministic=deterministic)
        assert batch.shape == (40, *space.shape)
        assert batch.dtype == space.dtype
        assert all(space.contains(batch[row, ...]) for row in range(40))
        same = np.unique(batch.reshape(40, -1), axis=0)
        assert len(same) == 1 if deterministic else len(same) > 1


def test_one_observation_and_a_batch_of_it_get_the_same_action():
    agent, _ = train(WalkEnv)
    obs = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32) * 100
    batch = agent.act(obs)
    for row, action in zip(obs, batch, strict=True):
        np.testing.assert_allclose(agent.act(row), action, rtol=1e-5, atol=1e-6)
    assert agent.act(obs[:0]).shape == (0, 2)


@pytest.mark.parametrize("policy", [None, OwnPolicy()])
def test_observations_may_come_in_any_container_and_number_type(policy):
    agent, _ = train(policy=policy)
    wanted = agent.act(np.array([2.0, 3.0], np.float32))
    for obs in ([2.0, 3.0], (2, 3), np.array([2, 3]), np.array([2.0, 3.0])):
        assert agent.act(obs) == wanted
    assert agent.act(torch.tensor([2.0, 3.0])) == wanted


def test_what_an_environment_in_float64_observes_can_be_acted_on():
    agent = PPOAgent(OwnPolicy(), config=SMALL).learn(Float64Env, 1)
    obs, _ = Float64Env().reset(seed=0)
    assert obs.dtype == np.float64
    assert agent.action_space.contains(agent.act(obs))


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 3), (4, 2, 2), (0,)])
def test_an_observation_of_another_shape_is_refused(shape):
    agent, _ = train()
    with pytest.raises(ValueError, match="shape"):
        agent.act(np.zeros(shape, np.float32))


def test_an_observation_with_its_info_is_told_to_be_taken_apart():
    agent, _ = train(CountingEnv)
    env = CountingEnv()
    for given in (env.reset(), env.step(env.action_space.sample())):
        with pytest.raises(ValueError, match=r"came with an info.*obs, info = env.reset\(\)"):
            agent.act(given)


def test_an_observation_is_not_changed_by_acting_on_it():
    agent, _ = train()
    obs = np.array([2.0, 3.0], np.float32)
    agent.act(obs)
    assert obs.tolist() == [2.0, 3.0]
    frozen = obs.copy()
    frozen.flags.writeable = False
    agent.act(frozen)


def test_evaluation_moves_nothing_and_depends_on_its_seed_alone():
    agent, _ = train(WalkEnv)
    agent.policy.train()
    before = fingerprint(agent)
    results = [
        agent.evaluate(WalkEnv, episodes=5, deterministic=deterministic, seed=seed)
        for deterministic in (True, False)
        for seed in (0, 0, 1)
    ]
    assert_same(fingerprint(agent), before)
    assert agent.policy.training
    assert results[0] == results[1] != results[2]
    assert results[3] == results[4] != results[5]
    assert results[0] != results[3]


# Saving


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.safetensors"


CONFIGS = {
    "default": SMALL,
    "plain": SMALL.replace(
        normalize_rewards=False,
        policy=PolicyConfig(hidden_sizes=(8,), normalize_observations=False),
    ),
    "shared": SMALL.replace(policy=PolicyConfig(hidden_sizes=(8,), shared=True)),
    "schedules": SMALL.replace(
        learning_rate=Linear(1e-3, 0.0), clip_range=Linear(0.2, 0.1), target_kl=0.01
    ),
    "adaptive": SMALL.replace(
        adaptive_kl=1.0,
        learning_rates={"critic": Linear(1e-2, 0.0)},
        clip_range_high=Linear(0.3, 0.2),
        dual_clip=3.0,
        weight_decay=0.1,
    ),
    "momentum": SMALL.replace(optimizer="SGD", optimizer_kwargs={"momentum": 0.9}),
    "nadam": SMALL.replace(optimizer="NAdam", optimizer_kwargs={"betas": [0.8, 0.99]}),
    "factored": SMALL.replace(optimizer="Adafactor", learning_rates={"critic": Linear(1e-2, 0.0)}),
    "bare": SMALL.replace(optimizer="SGD"),
}


@pytest.mark.parametrize("env", [CountingEnv, WalkEnv, "CartPole-v1"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_loaded_agent_goes_on_exactly_as_the_saved_one(env, config, path):
    agent, _ = train(env, config=config, seed=3)
    agent.save(path)
    loaded = PPOAgent.load(path)
    assert_same(fingerprint(loaded), fingerprint(agent))
    for name in ("config", "seed", "steps", "updates", "goal"):
        assert getattr(loaded, name) == getattr(agent, name), name
    assert loaded.observation_space == agent.observation_space
    assert loaded.action_space == agent.action_space

    reports = []
    for one in (agent, loaded):
        one._logger = lambda report: reports.append(summary(report))
        one.learn(env, 2 * ROLLOUT)
    assert_same(fingerprint(loaded), fingerprint(agent))
    assert reports[:2] == reports[2:]


def test_a_loaded_agent_draws_the_actions_the_saved_one_would_have(path):
    agent, _ = train(WalkEnv)
    obs = np.ones(2, np.float32)
    agent.act(obs, deterministic=False)
    agent.save(path)
    loaded = PPOAgent.load(path)
    wanted = [agent.act(obs, deterministic=False) for _ in range(3)]
    assert np.array_equal([loaded.act(obs, deterministic=False) for _ in range(3)], wanted)


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_a_loaded_agent_acts_and_knows_its_spaces(space, path):
    agent, _ = train(lambda: WithSpaces(action_space=space), steps=1)
    agent.save(path)
    loaded = PPOAgent.load(path)
    assert loaded.action_space == space
    obs = agent.observation_space.sample()
    assert np.array_equal(loaded.act(obs), agent.act(obs))
    loaded.learn(lambda: WithSpaces(action_space=space), 1)


def test_saving_again_writes_the_same(path, tmp_path):
    agent, _ = train()
    agent.save(path)
    first = read_checkpoint(path)
    PPOAgent.load(str(path)).save(str(tmp_path / "again.safetensors"))
    again = read_checkpoint(tmp_path / "again.safetensors")
    assert again[1] == first[1]
    for group, tensors in first[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(again[0][group][name], tensor), name


def test_a_custom_policy_is_handed_to_load(path):
    agent, _ = train(policy=OwnPolicy())
    agent.save(path)
    policy = OwnPolicy()
    policy.load_state_dict({n: 0.0 * t for n, t in policy.state_dict().items()})
    loaded = PPOAgent.load(path, policy=policy)
    assert loaded.policy is policy
    assert_same(fingerprint(loaded), fingerprint(agent))
    for one in (agent, loaded):
        one.learn(CountingEnv, ROLLOUT)
    assert_same(fingerprint(loaded), fingerprint(agent))


def test_a_custom_policy_that_is_not_handed_to_load_is_asked_for(path):
    train(policy=OwnPolicy())[0].save(path)
    with pytest.raises(CheckpointError, match="policy="):
        PPOAgent.load(path)
    with pytest.raises(CheckpointError, match="policy="):
        PPOAgent.load(path, policy=OwnPolicy(num_inputs=3))
    PPOAgent.load(path, policy=OwnPolicy())


def frozen(agent):
    return [name for name, p in agent.policy.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize("at_the_update", [False, True])
@pytest.mark.parametrize("at_the_save", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_loaded_policy_is_frozen_where_the_saved_one_was(path, at_the_update, at_the_save, own):
    env = CountingEnv()
    policy = (
        OwnPolicy() if own else make_policy(env.observation_space, env.action_space, SMALL.policy)
    )
    part = policy.critic if own else policy.actor_body
    part.requires_grad_(not at_the_update)
    agent, _ = train(policy=policy)
    part.requires_grad_(not at_the_save)
    agent.save(path)
    loaded = PPOAgent.load(path, policy=OwnPolicy() if own else None)
    assert frozen(loaded) == frozen(agent)
    assert bool(frozen(agent)) is at_the_save
    assert_same(fingerprint(loaded), fingerprint(agent))
    before = {name: loaded.policy.state_dict()[name].clone() for name in frozen(loaded)}
    for one in (agent, loaded):
        one.learn(CountingEnv, ROLLOUT)
    assert_same(fingerprint(loaded), fingerprint(agent))
    for name, tensor in before.items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name


@pytest.mark.parametrize("optimizer", ["adam", "AdamW", "NAdam", "Adafactor"])
def test_a_released_body_goes_on_from_a_file_with_its_own_step_count(path, optimizer):
    env = CountingEnv()
    policy = make_policy(env.observation_space, env.action_space, SMALL.policy)
    policy.actor_body.requires_grad_(False)
    agent = PPOAgent(policy, config=SMALL.replace(optimizer=optimizer)).learn(CountingEnv, ROLLOUT)
    policy.actor_body.requires_grad_(True)
    agent.learn(CountingEnv, ROLLOUT)
    state = agent._learner.state_dict()
    if optimizer != "Adafactor":  # which keeps a state of every parameter anyway
        first, *_, last = state["actor.step"].tolist()
        assert 0.0 < first == last / 2
        assert state["critic.step"].tolist() == last
    agent.save(path)
    loaded = PPOAgent.load(path)
    assert_same(fingerprint(loaded), fingerprint(agent))
    for one in (agent, loaded):
        one.learn(CountingEnv, ROLLOUT)
    assert_same(fingerprint(loaded), fingerprint(agent))


def test_a_custom_policy_is_frozen_as_the_file_says_and_not_as_it_was_handed_over(path):
    train(policy=OwnPolicy())[0].save(path)
    handed = OwnPolicy().requires_grad_(False)
    assert frozen(PPOAgent.load(path, policy=handed)) == []


def test_a_logger_can_be_given_to_load(path):
    train()[0].save(path)
    reports = []
    PPOAgent.load(path, logger=reports.append).learn(CountingEnv, 1)
    assert len(reports) == 1


def test_an_agent_with_non_finite_weights_is_not_saved(path):
    agent, _ = train()
    agent.save(path)
    before = path.read_bytes()
    with torch.no_grad():
        agent.policy.value_head.bias.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="finite"):
        agent.save(path)
    assert path.read_bytes() == before


def test_settings_that_no_file_can_hold_are_named_before_the_training():
    with pytest.raises(PPOError, match=r"env_kwargs\.mask is array"):
        SMALL.replace(env_kwargs={"mask": np.ones(2)})


# Workers


class Remembering:
    """Collectors as they are asked for."""

    def __init__(self, monkeypatch):
        self.asked = []
        original = assembly.RolloutCollector

        def make(*args, num_workers, **kwargs):
            self.asked.append(num_workers)
            return original(*args, num_workers=0, **kwargs)

        monkeypatch.setattr(assembly, "RolloutCollector", make)


@pytest.mark.parametrize(
    ("policy", "workers"),
    [
        (PolicyConfig(), "auto"),
        (PolicyConfig(hidden_sizes=()), "auto"),
        (PolicyConfig(hidden_sizes=(256, 256)), 0),
        (PolicyConfig(activation="gelu"), 0),
    ],
)
def test_workers_are_chosen_by_where_the_policy_can_act(monkeypatch, policy, workers):
    remembering = Remembering(monkeypatch)
    agent = PPOAgent(config=PPOConfig(num_envs=2, num_steps=4, num_epochs=1, policy=policy))
    agent.learn("CartPole-v1", 8).learn("CartPole-v1", 8)
    agent.learn(lambda: gymnasium.make("CartPole-v1"), 8)
    assert remembering.asked == [workers, workers, 0]


@pytest.mark.parametrize(
    ("observations", "actions", "workers"),
    [
        (spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-1.0, 1.0), ["auto"]),
        (spaces.Box(0, 255, (36, 36), np.uint8), spaces.MultiBinary(2), ["auto"]),
        (spaces.Discrete(3), spaces.Discrete(2), ["auto", 0]),
        (spaces.Dict(at=spaces.Box(-1.0, 1.0)), spaces.Discrete(2), ["auto", 0]),
        (spaces.Box(-1.0, 1.0, (3,)), spaces.MultiBinary(2), ["auto", 0]),
    ],
    ids=str,
)
def test_light_environments_are_not_shared_out_where_the_policy_is_asked_at_every_step(
    monkeypatch, observations, actions, workers
):
    def make():
        return RandomSpacesEnv(observations, actions)

    monkeypatch.setitem(gymnasium.registry, "Some-v0", EnvSpec("Some-v0", make))
    remembering = Remembering(monkeypatch)
    small = PolicyConfig(cnn_features=4)
    agent = PPOAgent(config=PPOConfig(num_envs=2, num_steps=4, num_epochs=1, policy=small))
    agent.learn("Some-v0", 8)
    assert remembering.asked == workers


def test_stacks_of_images_are_shared_out_and_stacks_of_numbers_are_not(monkeypatch):
    remembering = Remembering(monkeypatch)
    policy = PolicyConfig(cnn_features=4, frame_stack=2)
    config = PPOConfig(num_envs=2, num_steps=4, num_epochs=1, policy=policy)
    for name, make in (("Pictures-v0", ImageEnv), ("Numbers-v0", CountingEnv)):
        monkeypatch.setitem(gymnasium.registry, name, EnvSpec(name, entry_point=make))
        PPOAgent(config=config).learn(name, 8)
    assert remembering.asked == ["auto", "auto", 0]


def test_a_policy_of_the_users_is_not_shared_out_for_what_the_config_stacks(monkeypatch):
    monkeypatch.setitem(
        gymnasium.registry, "Numbers-v0", EnvSpec("Numbers-v0", entry_point=CountingEnv)
    )
    remembering = Remembering(monkeypatch)
    stacked = PolicyConfig(frame_stack=2)
    config = PPOConfig(num_envs=2, num_steps=4, num_epochs=1, policy=stacked)
    PPOAgent(OwnPolicy(), config=config).learn("Numbers-v0", 8)
    assert remembering.asked == [0]


def test_a_number_of_workers_is_taken_as_it_is(monkeypatch):
    remembering = Remembering(monkeypatch)
    agent = PPOAgent(config=PPOConfig(num_envs=2, num_steps=4, num_epochs=1, num_workers=3))
    agent.learn(lambda: gymnasium.make("CartPole-v1"), 8)
    assert remembering.asked == [3]


@pytest.mark.parametrize(
    ("env", "options"),
    [
        (CountingEnv, {}),
        (CountingEnv, {"memory": "lstm"}),
        (CountingEnv, {"memory": "gru"}),
        (CountingEnv, {"memory": "attention"}),
        (ImageEnv, {"cnn_features": 4}),
    ],
    ids=["vector", "lstm", "gru", "attention", "image"],
)
def test_a_policy_in_double_precision_collects_and_learns(env, options):
    config = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, policy=PolicyConfig(**options))
    agent = PPOAgent(config=config, seed=0)
    agent.learn(env, 16)
    before = copy.deepcopy(agent.policy.double())
    agent.learn(env, 32)
    for one, start in zip(agent.policy.parameters(), before.parameters(), strict=True):
        assert one.dtype == torch.float64
        assert not torch.equal(one, start)
