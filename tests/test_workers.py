"""Collecting in worker processes: the same numbers, and an end to every fault."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from collecting import assert_identical, collect
from environments import AliasingEnv, CountingEnv, ImageEnv, WalkEnv
from known_policies import (
    CountPolicy,
    MemoryCountPolicy,
    NoisyCountPolicy,
    SnapshotCountPolicy,
    SnapshotMemoryCountPolicy,
)
from processes import run_script

from ppo.collector import RolloutCollector, buffers, pool, worker
from ppo.collector.signals import STEP
from ppo.policies import PolicyConfig, make_policy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Who acts: the workers by themselves, or the parent for all of them.
ACTING = pytest.mark.parametrize(
    "policy", [SnapshotCountPolicy(), CountPolicy()], ids=["workers act", "parent acts"]
)
SOON = 10.0
"""Seconds within which a fault must be known, with room for a busy machine."""


# --- num_workers changes speed, never results


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        ("CartPole-v1", PolicyConfig()),
        ("CartPole-v1", PolicyConfig(hidden_sizes=(128, 64), activation="relu")),
        ("CartPole-v1", PolicyConfig(activation="elu")),
        ("Pendulum-v1", PolicyConfig()),
        ("Pendulum-v1", PolicyConfig(hidden_sizes=(100, 81), output_gain=1.0)),
        ("Pendulum-v1", PolicyConfig(hidden_sizes=(200,), shared=True)),
        ("CartPole-v1", PolicyConfig(memory="lstm", output_gain=1.0)),
        ("CartPole-v1", PolicyConfig(memory="attention", memory_size=8)),
        ("Pendulum-v1", PolicyConfig(memory="gru", output_gain=1.0)),
        ("Pendulum-v1", PolicyConfig(memory="lstm", memory_size=13, shared=True)),
        (CountingEnv, CountPolicy()),
        (AliasingEnv, NoisyCountPolicy()),
        (CountingEnv, SnapshotMemoryCountPolicy()),
        (CountingEnv, MemoryCountPolicy()),
        (WalkEnv, PolicyConfig(normalize_observations=False)),
        (ImageEnv, PolicyConfig(hidden_sizes=(), cnn_features=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_rollouts_are_bitwise_the_same_for_every_number_of_workers(env, policy):
    horizons = (3, 40, 1, 12)
    expected = collect(env, horizons, policy, num_envs=5)
    for num_workers in (1, 2, 3, 8):
        rollouts = collect(env, horizons, policy, num_envs=5, num_workers=num_workers)
        assert_identical(expected, rollouts)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_one_group_after_the_other_leaves_what_all_of_them_in_step_leave(end):
    """Where environments may be restarted, all are in step."""
    policy, factories = (
        SnapshotCountPolicy(),
        [lambda k=k: CountingEnv(2 + k % 5, end) for k in range(70)],
    )
    expected = collect(factories, (7, 12), policy, on_fault="restart")
    for num_workers in (0, 2):
        rollouts = collect(factories, (7, 12), policy, num_workers=num_workers)
        assert_identical(expected, rollouts)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("num_envs", [1, 32, 33, 71])
@pytest.mark.parametrize("memory", [None, "lstm", "gru"])
def test_rollouts_are_the_same_where_workers_share_a_group(env, num_envs, memory):
    config = PolicyConfig(hidden_sizes=(128, 64), output_gain=1.0, memory=memory)
    expected = collect(env, (2, 9), config, num_envs=num_envs)
    for num_workers in (2, 3):
        rollouts = collect(env, (2, 9), config, num_envs=num_envs, num_workers=num_workers)
        assert_identical(expected, rollouts)


class RowsActor:
    """Its action says whether it sees an odd number of rows."""

    def __init__(self, row_wise):
        self.row_wise = row_wise

    def __call__(self, obs, noise):
        return np.full(len(obs), len(obs) % 2)


class RowsPolicy(NoisyCountPolicy):
    def __init__(self, row_wise):
        super().__init__()
        self.row_wise = row_wise

    def snapshot(self):
        return RowsActor(self.row_wise)


@pytest.mark.parametrize(("row_wise", "odd"), [(False, [1, 1, 1, 1, 1]), (True, [1, 1, 1, 0, 0])])
def test_an_actor_sees_a_whole_group_unless_it_takes_each_row_by_itself(row_wise, odd):
    [rollout] = collect(CountingEnv, (3,), RowsPolicy(row_wise), num_envs=5, num_workers=2)
    assert rollout.actions.tolist() == 3 * [odd]


class PlannedActor:
    """Knows the noise of its rollout beforehand, and is not called itself."""

    def for_rollout(self, noise):
        chosen = (noise[:, :, 0] < 0.5).astype(np.int64)
        chosen[0] = noise.shape[1]
        return lambda obs, t: chosen[t]


class PlannedPolicy(NoisyCountPolicy):
    def snapshot(self):
        return PlannedActor()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_actor_may_prepare_for_a_rollout(num_workers):
    options = {"num_envs": 5, "num_workers": num_workers}
    rollouts = collect(CountingEnv, (4, 6), PlannedPolicy(), **options)
    plain = collect(CountingEnv, (4, 6), NoisyCountPolicy(), **options)
    for rollout, wanted in zip(rollouts, plain, strict=True):
        assert set(rollout.actions[0].tolist()) == {5}  # a whole group
        assert rollout.actions[1:].equal(wanted.actions[1:])


class ScribblingActor:
    """Writes to the observations it is given."""

    def __call__(self, obs, noise):
        obs[...] = -1.0
        return (noise[:, 0] < 0.5).astype(np.int64)


class PlannedScribblingActor(ScribblingActor):
    def for_rollout(self, noise):
        return lambda obs, t: self(obs, noise[t])


def test_no_actor_writes_to_a_rollout(monkeypatch):
    wanted = collect(CountingEnv, (9,), SnapshotCountPolicy())
    monkeypatch.setattr(SnapshotCountPolicy, "snapshot", lambda policy: ScribblingActor())
    assert_identical(wanted, collect(CountingEnv, (9,), SnapshotCountPolicy()))
    monkeypatch.setattr(SnapshotCountPolicy, "snapshot", lambda policy: PlannedScribblingActor())
    with pytest.raises(ValueError, match="read-only"):
        collect(CountingEnv, (9,), SnapshotCountPolicy())


def test_a_changing_policy_is_followed_by_the_workers():
    """Every collect acts with the weights and the statistics of its moment."""
    runs = []
    for num_workers in (0, 2):
        with RolloutCollector(
            "Pendulum-v1", num_envs=3, num_workers=num_workers, seed=0
        ) as collector:
            policy = make_policy(collector.observation_space, collector.action_space)
            rollouts = []
            for _ in range(4):
                rollouts.append(collector.collect(policy, 6))
                policy.update_normalizer(rollouts[-1].flatten().obs)
                with torch.no_grad():
                    for parameter in policy.parameters():
                        parameter += 0.05
        runs.append(rollouts)
    assert_identical(*runs)


def test_different_factories_keep_their_columns():
    factories = [lambda n=n: CountingEnv(n, "truncated") for n in range(1, 6)]
    expected = collect(factories, (12,), CountPolicy())
    rollouts = collect(factories, (12,), CountPolicy(), num_workers=2)
    assert_identical(expected, rollouts)
    lengths = {episode.env_index: episode.episode_length for episode in rollouts[0].episodes}
    assert lengths == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}


def test_a_worker_that_waited_long_sleeps_at_once_the_next_time(monkeypatch):
    polled = []

    def signal(conn, spin):
        polled.append(spin)
        time.sleep(0.01)
        return STEP

    monkeypatch.setattr(worker, "receive_byte", signal)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        worker._serve_steps(theirs, SimpleNamespace(step=lambda t: None), range(3), 1e-3)
    assert polled == [1e-3, 0.0, 0.0]


@pytest.mark.parametrize("part", [7, 2**30])
def test_objects_in_a_file_are_found_again_by_their_spans(part, monkeypatch):
    monkeypatch.setattr(buffers, "_PART", part)  # as much as is read or written at once
    fd = buffers.anonymous_file("objects", 0)
    try:
        for objects in (["a long one", np.arange(99)], [np.arange(3), None, "short"]):
            spans = buffers.write_objects(fd, objects)
            found = [buffers.read_object(fd, span) for span in spans]
            assert list(map(repr, found)) == list(map(repr, objects))
    finally:
        os.close(fd)


class SlowEnv(CountingEnv):
    """Takes milliseconds for a step."""

    def step(self, action):
        time.sleep(0.01)
        return super().step(action)


def test_steps_that_take_long_are_not_polled_for(monkeypatch):
    polled = []
    monkeypatch.setattr(pool, "poll", lambda conn, seconds: bool(polled.append(seconds)))
    collect([SlowEnv, SlowEnv], (6,), CountPolicy(), num_workers=2)
    assert len(polled) <= 2  # by the first step, of which nothing is known


def test_an_instance_is_copied_into_the_workers():
    env = gymnasium.make("Pendulum-v1", g=4.0)
    expected = collect("Pendulum-v1", (9,), PolicyConfig(), num_envs=3, env_kwargs={"g": 4.0})
    for num_workers in (0, 2):
        rollouts = collect(env, (9,), PolicyConfig(), num_envs=3, num_workers=num_workers)
        assert_identical(expected, rollouts)
    env.close()


def test_workers_change_no_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    collect("CartPole-v1", (5,), PolicyConfig(), num_envs=2, num_workers=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# --- from wherever it is called


def test_lambdas_and_local_classes_reach_the_workers(nothing_left):
    bound = 4

    class Local(CountingEnv):
        def __init__(self):
            super().__init__(bound, "truncated")

        def observe(self):
            return super().observe() + np.float32(0.5)

    factories = [Local, lambda: Local(), lambda: CountingEnv(bound)]
    expected = collect(factories, (7, 2), SnapshotCountPolicy())
    rollouts = collect(factories, (7, 2), SnapshotCountPolicy(), num_workers=2)
    assert_identical(expected, rollouts)


SCRIPT = """
import sys
import threading

import gymnasium
import numpy as np
from ppo import RolloutCollector, make_policy

class Mine(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(size=2).astype(np.float32), 1.0, False, False, {}

def local():
    class Local(Mine):
        pass

    return Local

print("the script runs")
results = []

def run(num_workers):
    factories = [Mine, lambda: Mine(), local()]
    method = sys.argv[1] if num_workers else None
    with RolloutCollector(
        factories, num_workers=num_workers, seed=0, start_method=method
    ) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        results.append(collector.collect(policy, 5).obs.sum().item())

run(0)
thread = threading.Thread(target=run, args=(1,))
thread.start()
thread.join()
print(len(results), len(set(results)))
"""


def test_a_script_needs_no_main_guard(tmp_path):
    code, out, err = run_script(tmp_path / "script.py", SCRIPT, "spawn")
    assert (code, out, err) == (0, "the script runs\n2 1\n", "")


def test_code_without_a_file_can_start_workers():
    """As in a notebook, there is no script that a child could read."""
    code, out, err = run_script(None, SCRIPT, "forkserver")
    assert (code, out, err) == (0, "the script runs\n2 1\n", "")


OF_A_SCRIPT = """
import pickle, sys
import gymnasium
import numpy as np
from ppo import RolloutCollector, make_policy

class Note:
    pass

class Pickling(gymnasium.Wrapper):
    def step(self, action):
        pickle.loads(pickle.dumps(Note()))
        return self.env.step(action)

def make():
    return Pickling(gymnasium.make("CartPole-v1"))

def rollouts(num_workers):
    with RolloutCollector(make, num_envs=3, num_workers=num_workers, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space, seed=0)
        own = policy.snapshot()

        class Actor:
            row_wise = True

            def __call__(self, obs, noise):
                return own(obs, noise)

        policy.snapshot = Actor
        return collector.collect(policy, 20)

alone, shared = rollouts(0), rollouts(2)
print(bool((alone.obs == shared.obs).all()), bool((alone.actions == shared.actions).all()))
"""


def test_environments_and_actors_of_a_script_know_its_classes_in_a_fork(tmp_path):
    assert run_script(tmp_path / "script.py", OF_A_SCRIPT) == (0, "True True\n", "")


ACTOR_OF_A_SCRIPT = """
import sys
from ppo import RolloutCollector, make_policy

class Actor:
    def __init__(self, actor):
        self.actor = actor

    def __call__(self, obs, noise):
        return self.actor(obs, noise)

def rollout(num_workers):
    with RolloutCollector(
        "CartPole-v1", num_envs=3, num_workers=num_workers, seed=0, start_method="spawn"
    ) as collector:
        policy = make_policy(collector.observation_space, collector.action_space, seed=0)
        own = Actor(policy.snapshot())
        policy.snapshot = lambda: own
        return collector.collect(policy, 20)

print(bool((rollout(0).obs == rollout(2).obs).all()))
"""


def test_an_actor_of_a_script_is_known_to_spawned_workers(tmp_path):
    assert run_script(tmp_path / "script.py", ACTOR_OF_A_SCRIPT) == (0, "True\n", "")


def test_a_collector_may_live_in_a_thread(nothing_left):
    results = []

    def run():
        results.append(collect("CartPole-v1", (9,), PolicyConfig(), num_envs=3, num_workers=2))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_identical(results[0], collect("CartPole-v1", (9,), PolicyConfig(), num_envs=3))


def test_a_collector_outlives_the_thread_that_made_it(nothing_left):
    made = []

    def run():
        made.append(RolloutCollector(CountingEnv, num_envs=3, num_workers=2, seed=0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with made.pop() as collector:
        rollouts = [collector.collect(SnapshotCountPolicy(), 5) for _ in range(3)]
    assert_identical(rollouts, collect(CountingEnv, (5, 5, 5), SnapshotCountPolicy(), num_envs=3))


def test_two_collectors_live_side_by_side(nothing_left):
    (expected,) = collect(CountingEnv, (6,), CountPolicy(), num_envs=2)
    first, second = (
        RolloutCollector(CountingEnv, num_envs=2, num_workers=2, seed=0) for _ in range(2)
    )
    rollout = first.collect(CountPolicy(), 6)
    first.close()
    assert_identical([expected, expected], [rollout, second.collect(CountPolicy(), 6)])
    second.close()


def test_an_environment_may_have_children_of_its_own(nothing_left):
    class Parent(CountingEnv):
        def __init__(self):
            super().__init__()
            self.helper = subprocess.Popen(["sleep", "60"])

        def close(self):
            self.helper.terminate()
            self.helper.wait()

    collect(Parent, (3,), CountPolicy(), num_envs=2, num_workers=2)
