"""A run that was interrupted and goes on is, bit for bit, the run that was not."""

import json
import pathlib
import random
import signal
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from environments import AliasingEnv, CountingEnv
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from processes import run_script
from small_policies import OwnPolicy

from ppo import PolicyConfig, PPOAgent, PPOConfig
from ppo.checkpoint import read_checkpoint, write_checkpoint
from ppo.cli.commands import main
from ppo.cli.runs import RunFolder
from ppo.errors import PPOError

STEPS = 21  # per rollout and environment: episodes go over its border
CONFIG = PPOConfig(
    num_envs=3,
    num_steps=STEPS,
    num_epochs=2,
    minibatch_size=32,
    learning_rate={"linear": [1e-3, 0.0]},
    normalize_rewards=True,
    policy=PolicyConfig(hidden_sizes=(8,)),
)
LSTM = PolicyConfig(hidden_sizes=(8,), memory="lstm", memory_size=8, memory_steps=8)
ROLLOUT = STEPS * CONFIG.num_envs
GOAL = 5 * ROLLOUT
AFTER = 2  # updates before the interruption


def everything(agent):
    """All that a further update depends on, and what it has led to."""
    return {
        "policy": agent.policy.state_dict(),
        "optimizer": agent._learner.state_dict(),
        "scaler": agent._reward_scaler.state_dict() if agent._reward_scaler else {},
        "generators": {
            "minibatches": agent._generator.get_state(),
            "acting": agent._act_generator.get_state(),
        },
    }, (agent.steps, agent.updates, agent.goal, agent._learn_calls, list(agent._recent))


def assert_same(agent, other):
    (tensors, counts), (other_tensors, other_counts) = everything(agent), everything(other)
    assert counts == other_counts
    for part, group in tensors.items():
        assert group.keys() == other_tensors[part].keys()
        for name, tensor in group.items():
            assert torch.equal(tensor, other_tensors[part][name]), f"{part} {name}"


def rows(reports):
    """What reports say, but for the time: NaN is the same as NaN."""
    return [
        {"goal": r.goal, "updates": r.updates, "episodes": r.episodes}
        | {name: repr(x) for name, x in r.metrics.items() if name != "steps_per_second"}
        for r in reports
    ]


def uninterrupted(env, path, config=CONFIG, policy=None, seed=3, updates=AFTER):
    """Train to the end, saving in passing."""
    reports = []

    def note(report):
        reports.append(report)
        if report.updates == updates:
            agent.save(path)

    agent = PPOAgent(policy, config=config, seed=seed)
    agent.learn(env, GOAL, callback=note)
    return agent, reports


def resumed(env, path, policy=None, **changes):
    """Train to the same end from the file; returns the agent and its reports."""
    reports = []
    agent = PPOAgent.load(path, policy=policy)
    agent.config = agent.config.replace(**changes)
    agent.learn(env, agent.goal - agent.steps, callback=reports.append)
    return agent, reports


def check(env, tmp_path, config=CONFIG, make_policy=lambda: None, **changes):
    path = tmp_path / "agent.safetensors"
    agent, reports = uninterrupted(env, path, config, make_policy())
    again, later = resumed(env, path, make_policy(), **changes)
    assert_same(agent, again)
    assert rows(reports)[AFTER:] == rows(later)
    return PPOAgent.load(path, policy=make_policy())


# The matrix


@pytest.mark.parametrize("workers", [(0, 0), (2, 3)], ids=["in process", "2 to 3 workers"])
@pytest.mark.parametrize("policy", [CONFIG.policy, LSTM], ids=["mlp", "lstm"])
@pytest.mark.parametrize(
    "env", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "InvertedPendulum-v5", "Hopper-v5"]
)
def test_a_resumed_run_is_the_uninterrupted_one(env, policy, workers, tmp_path):
    before, after = workers
    config = CONFIG.replace(policy=policy, num_workers=before)
    saved = check(env, tmp_path, config, num_workers=after)
    # It was interrupted in the middle of episodes.
    assert any(mark.episode_length > 0 for mark in saved.left_off.bookmarks)


# What else an episode may depend on


class NoisyEnv(CountingEnv):
    """Draws from its own generator in every step; ends at random."""

    def step(self, action):
        reward = super().step(action)[1]
        self.tag += self.np_random.normal()
        reward += 10.0 * float(action) + self.np_random.normal()
        return self.observe(), reward, bool(self.np_random.random() < 0.05), False, {}


class GlobalNoiseEnv(CountingEnv):
    """Draws from a generator that no seed of reset reaches."""

    def step(self, action):
        self.tag += random.random()
        return super().step(action)


class SecretlyNoisyEnv(CountingEnv):
    """Draws its rewards from a generator that no seed of reset reaches; its observations not."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + random.random(), *rest


class SeenThroughNoiseEnv(CountingEnv):
    """Its observations are blurred by a generator of everyone's; its rewards are not."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs + np.float32(random.random()), *rest


class StatefulEnv(GlobalNoiseEnv):
    """Cannot be played again, but put into any state."""

    def get_state(self):
        rng = self.np_random.bit_generator.state
        arrays = {"count": np.array(self.count), "tag": np.float64(self.tag)}
        return {**arrays, "rest": (self.episode_length, self.episode_ending, rng)}

    def set_state(self, state):
        self.count, self.tag = int(state["count"]), float(state["tag"])
        self.episode_length, self.episode_ending, rng = state["rest"]
        self.np_random.bit_generator.state = rng
        restored.append(self.count)


class MaskedEnv(NoisyEnv):
    """Forbids one action or the other, as a count of its steps has it."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs, info | {"action_mask": self.mask()}

    def step(self, action):
        assert self.mask()[action]
        obs, *rest, info = super().step(action)
        return obs, *rest, info | {"action_mask": self.mask()}

    def mask(self):
        kind = (int(self.count) + self.episode_length) % 3
        return np.array([(1, 1), (0, 1), (1, 0)][kind], np.int8)


class NestedEnv(NoisyEnv):
    """Dictionaries go in and come out."""

    observation_space = spaces.Dict({"vector": CountingEnv.observation_space})
    action_space = spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (3,), np.float32)))

    def step(self, action):
        return super().step(float(action[0]) + 0.1 * float(action[1].sum()))

    def observe(self):
        return {"vector": super().observe()}


restored = []


@pytest.fixture(autouse=True)
def _nothing_restored():
    restored.clear()


def windy():
    return gymnasium.make("LunarLander-v3", enable_wind=True, disable_env_checker=True)


@pytest.mark.parametrize(
    "env", [windy, NoisyEnv, MaskedEnv, NestedEnv, lambda: AliasingEnv(length=50)]
)
def test_so_it_is_with_noise_wind_masks_and_nested_spaces(env, tmp_path):
    check(env, tmp_path)


@pytest.mark.parametrize("distribution", ["squashed", "beta", "gsde"])
def test_so_it_is_for_every_kind_of_action_noise(distribution, tmp_path):
    policy = PolicyConfig(hidden_sizes=(8,), distribution=distribution)
    check("Pendulum-v1", tmp_path, CONFIG.replace(policy=policy), num_workers=2)


def test_so_it_is_for_optimizers_and_rates_that_have_a_state_of_their_own(tmp_path):
    options = {"optimizer": "SGD", "optimizer_kwargs": {"momentum": 0.9}, "adaptive_kl": 0.01}
    check(NoisyEnv, tmp_path, CONFIG.replace(**options))


@pytest.mark.parametrize("memory", [None, "gru"])
def test_so_it_is_for_stacked_frames(memory, tmp_path):
    policy = PolicyConfig(hidden_sizes=(8,), frame_stack=4, memory=memory, memory_size=8)
    check(NoisyEnv, tmp_path, CONFIG.replace(policy=policy), num_workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_it_is_for_a_policy_of_ones_own_that_draws_by_itself(workers, tmp_path):
    check(
        "CartPole-v1",
        tmp_path,
        make_policy=lambda: OwnPolicy(num_actions=2),
        num_workers=workers,
    )


def test_so_it_is_for_an_environment_of_the_callers_own(tmp_path):
    check(gymnasium.make("CartPole-v1"), tmp_path)


class Fragile(NoisyEnv):
    """Raises in its fourth step of an episode, or goes on: its seed decides."""

    def step(self, action):
        if self.count == 3 and int(self.tag) % 2:
            raise RuntimeError("the physics exploded")
        return super().step(action)


@pytest.mark.filterwarnings("ignore:restarted:RuntimeWarning")
@pytest.mark.parametrize("workers", [(0, 0), (2, 3)], ids=["in process", "2 to 3 workers"])
def test_so_it_is_where_environments_raise_and_are_made_anew(workers, tmp_path):
    path = tmp_path / "agent.safetensors"
    config = CONFIG.replace(num_workers=workers[0], on_fault="restart", max_restarts=1000)
    agent, reports = uninterrupted(Fragile, path, config)
    again, later = resumed(Fragile, path, num_workers=workers[1])
    assert_same(agent, again)
    counts, counts_later = (
        [report.metrics.pop("restarts") for report in some] for some in (reports, later)
    )
    assert rows(reports)[AFTER:] == rows(later)
    # They are counted anew with every call of `learn`.
    assert [count - counts[AFTER - 1] for count in counts[AFTER:]] == counts_later
    assert counts[0] > 0
    assert counts_later[0] > 0


def test_so_it_is_where_every_rollout_is_a_single_step(tmp_path):
    check(NoisyEnv, tmp_path, CONFIG.replace(num_steps=1))


@pytest.mark.parametrize("updates", [1, 4])
def test_so_it_is_wherever_it_was_interrupted(updates, tmp_path):
    path = tmp_path / "agent.safetensors"
    agent, reports = uninterrupted(NoisyEnv, path, updates=updates)
    again, later = resumed(NoisyEnv, path)
    assert_same(agent, again)
    assert rows(reports)[updates:] == rows(later)


def test_a_run_may_be_interrupted_again_and_again(tmp_path):
    path = tmp_path / "agent.safetensors"
    agent, _ = uninterrupted(NoisyEnv, path, updates=1)
    for _ in range(3):
        again = PPOAgent.load(path)
        again.learn(NoisyEnv, again.goal - again.steps, callback=lambda report: False)
        again.save(path)
    again, _ = resumed(NoisyEnv, path)
    assert_same(agent, again)


def test_calls_after_the_resumed_one_are_those_of_the_uninterrupted_run(tmp_path):
    path = tmp_path / "agent.safetensors"
    agent, _ = uninterrupted(NoisyEnv, path)
    again, _ = resumed(NoisyEnv, path)
    for one in (agent, again):
        one.learn(NoisyEnv, ROLLOUT)
    assert_same(agent, again)


# Without a file


def test_an_interrupted_call_goes_on_in_the_same_agent(tmp_path):
    agent, _ = uninterrupted(NoisyEnv, tmp_path / "agent.safetensors")
    again = PPOAgent(config=CONFIG, seed=3)
    again.learn(NoisyEnv, GOAL, callback=lambda report: report.updates < AFTER)
    again.learn(NoisyEnv, GOAL - again.steps)
    # Schedules ran to the same goal.
    assert_same(agent, again)


def test_a_callback_that_raises_interrupts_no_less_exactly(tmp_path):
    def stop(report):
        if report.updates == AFTER:
            raise KeyboardInterrupt

    agent, _ = uninterrupted(NoisyEnv, tmp_path / "agent.safetensors")
    again = PPOAgent(config=CONFIG, seed=3)
    with pytest.raises(KeyboardInterrupt):
        again.learn(NoisyEnv, GOAL, callback=stop)
    again.learn(NoisyEnv, GOAL - again.steps)
    assert_same(agent, again)


def test_a_finished_call_leaves_nothing_to_go_on_with(tmp_path):
    agent, _ = uninterrupted(NoisyEnv, tmp_path / "agent.safetensors")
    assert agent.left_off is None
    agent.save(tmp_path / "final.safetensors")
    assert PPOAgent.load(tmp_path / "final.safetensors").left_off is None


def test_a_call_that_broke_off_in_a_rollout_begins_new_episodes():
    class Breaking(CountingEnv):
        def step(self, action):
            steps.append(action)
            if len(steps) == ROLLOUT + 5:
                raise OSError("out of order")
            return super().step(action)

    steps = []
    agent = PPOAgent(config=CONFIG)
    with pytest.raises(PPOError, match="out of order"):
        agent.learn(Breaking, GOAL)
    assert agent.left_off is None
    assert agent.learn(Breaking, ROLLOUT).steps == 2 * ROLLOUT


def stop(report):
    return False


def test_environments_of_another_kind_begin_with_episodes_of_their_own():
    agent = PPOAgent(config=CONFIG)
    agent.learn(lambda: NoisyEnv(length=900), GOAL, callback=stop)
    seen = []
    agent.learn(lambda: CountingEnv(length=STEPS), ROLLOUT, callback=seen.append)
    assert [episode.episode_length for episode in seen[0].episodes] == [STEPS] * 3


def test_an_environment_of_the_same_kind_that_does_something_else_is_found_out():
    agent = PPOAgent(config=CONFIG)
    agent.learn("LunarLander-v3", GOAL, callback=stop)
    with pytest.warns(UserWarning, match="3 of 3 environments begin new episodes: .*LunarLander"):
        agent.learn(windy, ROLLOUT)
    assert agent.steps == 2 * ROLLOUT


def test_another_number_of_environments_begins_new_episodes():
    agent = PPOAgent(config=CONFIG)
    agent.learn(NoisyEnv, GOAL, callback=stop)
    agent.config = CONFIG.replace(num_envs=2)
    seen = []
    agent.learn(NoisyEnv, ROLLOUT, callback=lambda report: seen.extend(report.episodes))
    assert {episode.env_index for episode in seen} == {0, 1}


# Environments that cannot be played again


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("env", [GlobalNoiseEnv, SecretlyNoisyEnv, SeenThroughNoiseEnv])
def test_an_environment_that_cannot_be_played_again_is_said_so_once(env, workers, tmp_path):
    path = tmp_path / "agent.safetensors"
    random.seed(1)
    uninterrupted(lambda: env(length=100), path)
    with pytest.warns(UserWarning, match=f"3 of 3 .* begin new episodes: {env.__name__}") as said:
        again, _ = resumed(lambda: env(length=100), path, num_workers=workers)
    assert len(said) == 1
    assert again.steps == GOAL
    assert {episode.episode_length for episode in again._recent} <= {100}


def test_what_is_known_of_an_episode_that_is_lost_is_forgotten():
    class Watched(GlobalNoiseEnv):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            paid.append(reward)
            return obs, reward, *rest

    paid = []
    agent = PPOAgent(config=CONFIG.replace(num_envs=1, policy=LSTM))
    agent.learn(lambda: Watched(length=1000), GOAL, callback=stop)
    with pytest.warns(UserWarning, match="1 of 1 environments begin new episodes"):
        agent.learn(lambda: Watched(length=1000), GOAL, callback=stop)
    assert agent.left_off.bookmarks[0].episode_length == STEPS
    total = 0.0
    for reward in paid[-STEPS:]:
        total = CONFIG.gamma * total + float(np.float32(reward))
    assert everything(agent)[0]["scaler"]["returns"].item() == pytest.approx(total)


def test_episodes_that_can_be_played_again_go_on_beside_those_that_cannot(tmp_path):
    def make(kind):
        return lambda: kind(length=200)

    class Same(CountingEnv):
        def step(self, action):
            if broken:
                self.tag += 1.0
            return super().step(action)

    broken = []
    path = tmp_path / "agent.safetensors"
    envs = [make(CountingEnv), make(Same), make(CountingEnv)]
    uninterrupted(envs, path)
    broken.append(True)
    with pytest.warns(UserWarning, match="1 of 3 environments begin new episodes: .*Same"):
        again, _ = resumed(envs, path)
    lengths = [mark.episode_length for mark in PPOAgent.load(path).left_off.bookmarks]
    assert lengths == [AFTER * STEPS] * 3
    state = everything(again)[0]["scaler"]["returns"]
    assert len(state) == 3


def test_a_vector_environment_begins_new_episodes_and_says_so(tmp_path):
    def make():
        return SyncVectorEnv([NoisyEnv] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)

    path = tmp_path / "agent.safetensors"
    uninterrupted(make(), path)
    with pytest.warns(UserWarning, match="SyncVectorEnv cannot be put into the middle") as said:
        again, _ = resumed(make(), path)
    assert len(said) == 1
    assert again.steps >= GOAL


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: env,
        lambda env: gymnasium.wrappers.TimeLimit(gymnasium.wrappers.OrderEnforcing(env), 30),
    ],
    ids=["bare", "limited in time"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_offers_its_state_is_put_back_by_it(wrap, workers, tmp_path):
    # Two runs cannot be compared: it draws from a generator of everyone's. One can: what comes
    # next is counted on from where it was.
    path = tmp_path / "agent.safetensors"
    uninterrupted(lambda: wrap(StatefulEnv(length=100)), path)
    left_off = PPOAgent.load(path).left_off
    counts = [int(mark.snapshot["count"]) for mark in left_off.bookmarks]
    again, reports = resumed(lambda: wrap(StatefulEnv(length=100)), path, num_workers=workers)
    if workers == 0:
        assert restored == counts
    assert again.steps == GOAL
    limit = 100 if not isinstance(wrap(StatefulEnv()), gymnasium.wrappers.TimeLimit) else 30
    episodes = [episode for report in reports for episode in report.episodes]
    assert {episode.episode_length for episode in episodes} <= {limit}
    total = sum(episode.episode_length for episode in episodes)
    assert total == (2 * 3 * 30 if limit == 30 else 3 * 100)


def test_a_state_behind_an_unknown_wrapper_is_not_trusted(tmp_path):
    class Stateful(CountingEnv):
        get_state = StatefulEnv.get_state
        set_state = StatefulEnv.set_state

    check(lambda: gymnasium.wrappers.RecordEpisodeStatistics(Stateful(length=60)), tmp_path)
    assert restored == []


class OddState(CountingEnv):
    """Something else goes by the names of the methods."""

    def get_state(self, what):
        return what

    def set_state(self, one, two):
        raise AssertionError


class ObjectState(CountingEnv):
    """Its state is no plain data."""

    def get_state(self):
        return object()

    def set_state(self, state):
        raise AssertionError


class RefusedState(CountingEnv):
    """It does not take its own state back."""

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = -100
        raise ValueError(state)


@pytest.mark.parametrize("env", [OddState, ObjectState, RefusedState])
def test_where_states_do_not_work_the_episode_is_played_again(env, tmp_path):
    check(lambda: env(length=60), tmp_path)


# Runs on the disk


def table(folder):
    """The rows of the metrics without the time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "steps_per_second")}
        for row in found
    ]


KILLED = """
import os, signal, sys
from ppo import PPOAgent
from ppo.cli import commands, runs

runs.RunFolder.checkpoint = lambda run, agent: agent.updates % 3 or run.save(agent)
owner = {"update": PPOAgent, "log": runs.RunFolder}[sys.argv[1]]
whole, calls = getattr(owner, sys.argv[1]), []

def call(*arguments):
    calls.append(arguments)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)

setattr(owner, sys.argv[1], call)
sys.exit(commands.main(sys.argv[2:]))
"""
ARGUMENTS = [
    "train",
    "cartpole",
    "num_envs=4",
    "num_steps=64",
    "policy.hidden_sizes=[8]",
    "--seed",
    "5",
    "--quiet",
    "--eval-episodes",
    "0",
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["update", "log"])
def test_a_killed_run_is_resumed_exactly(where, workers, tmp_path):
    """kill -9 behind a rollout or behind an update, some updates after the latest checkpoint."""
    arguments = [*ARGUMENTS, "steps=3072", f"num_workers={workers}", "--out", str(tmp_path)]
    assert main([*arguments, "--name", "whole"]) == 0
    status, *_ = run_script(tmp_path / "train.py", KILLED, where, *arguments, "--name", "killed")
    assert status == -signal.SIGKILL
    assert len(table(tmp_path / "killed")) == 7
    left_off = RunFolder.open(tmp_path / "killed").load().left_off
    assert any(mark.episode_length > 0 for mark in left_off.bookmarks)
    assert main(["resume", str(tmp_path / "killed"), "--quiet", "--eval-episodes", "0"]) == 0
    assert len(table(tmp_path / "whole")) == 12
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    one, other = (RunFolder.open(tmp_path / name).load() for name in ("whole", "killed"))
    assert_same(one, other)


def test_ppo_resume_says_that_a_checkpoint_does_not_know_its_episodes(tmp_path, capsys):
    arguments = [*ARGUMENTS, "steps=2048", "--out", str(tmp_path), "--name", "run"]
    assert main(arguments) == 0
    run = RunFolder.open(tmp_path / "run")
    agent = run.load()
    agent.goal = 4096  # as if it had been interrupted, by a version that did not keep them
    run.save(agent)
    assert main(["resume", str(tmp_path / "run"), "--quiet", "--eval-episodes", "0"]) == 0
    assert "2,048 steps does not hold where its episodes were" in capsys.readouterr().err
    assert table(tmp_path / "run")[-1]["steps"] == 4096


def test_ppo_resume_says_which_environment_cannot_be_played_again(tmp_path, capsys):
    name = "GlobalNoise-v0"
    gymnasium.register(name, GlobalNoiseEnv, kwargs={"length": 500})
    arguments = [*ARGUMENTS, "steps=2048", f"env={name}", "--out", str(tmp_path), "--name", "run"]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "checkpoint", interrupt)
            with pytest.raises(Interrupted):
                main(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            assert main(["resume", str(tmp_path / "run"), "--quiet", "--eval-episodes", "0"]) == 0
    finally:
        del gymnasium.registry[name]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said.startswith("ppo: warning: 4 of 4 environments begin new episodes: ")
    assert name in said


class Interrupted(BaseException):
    """Nobody catches it by chance."""


def interrupt(run, agent):
    run.save(agent)
    raise Interrupted


# Files


FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def known_env():
    return CountingEnv(length=40, ending="truncated")


def test_a_file_of_this_format_with_episodes_stays_loadable():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was written with ")
        agent = PPOAgent.load(FIXTURES / "checkpoint_v1_episodes.safetensors")
    assert [mark.episode_length for mark in agent.left_off.bookmarks] == [32, 32]
    seen = []
    agent.learn(known_env, agent.goal - agent.steps, callback=seen.append)
    assert [episode.episode_length for episode in seen[0].episodes] == [40, 40]
    assert agent.steps == 128


def test_a_file_without_episodes_begins_new_ones(tmp_path):
    path = tmp_path / "agent.safetensors"
    uninterrupted(NoisyEnv, path)
    groups, document = read_checkpoint(path)
    del document["episodes"], groups["episodes"]
    write_checkpoint(path, groups, document)
    agent = PPOAgent.load(path)
    assert agent.left_off is None
    assert agent.learn(NoisyEnv, ROLLOUT).steps == (AFTER + 1) * ROLLOUT


def test_saving_what_was_loaded_writes_the_same_episodes(tmp_path):
    uninterrupted(MaskedEnv, tmp_path / "agent.safetensors")
    PPOAgent.load(tmp_path / "agent.safetensors").save(tmp_path / "again.safetensors")
    (groups, document), (others, other) = (
        read_checkpoint(tmp_path / f"{name}.safetensors") for name in ("agent", "again")
    )
    assert document == other
    assert groups["episodes"].keys() == others["episodes"].keys()
    for name, tensor in groups["episodes"].items():
        assert torch.equal(tensor, others["episodes"][name])
