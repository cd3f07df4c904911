"""Collecting in worker processes: the same numbers, and an end to every fault."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from environments import (
    AliasingEnv,
    CountingEnv,
    CountPolicy,
    FaultyEnv,
    ImageEnv,
    NoisyCountPolicy,
    SnapshotCountPolicy,
    WalkEnv,
    crash,
    hang,
    hang_holding_the_gil,
    hang_ignoring_sigterm,
    kill,
    leave,
    nan_obs,
    segfault,
    stop,
)
from processes import children, is_alive, run_script, start_script, wait_until

from ppo.collector import RolloutCollector
from ppo.errors import (
    ClosedError,
    EnvCreationError,
    EnvError,
    NonFiniteError,
    PPOError,
    SpaceError,
    WorkerError,
)
from ppo.policies import PolicyConfig, make_policy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Who acts: the workers by themselves, or the parent for all of them.
ACTING = pytest.mark.parametrize(
    "policy", [SnapshotCountPolicy(), CountPolicy()], ids=["workers act", "parent acts"]
)
SOON = 10.0
"""Seconds within which a fault must be known, with room for a busy machine."""


def make(collector, config):
    if not isinstance(config, PolicyConfig):
        return config
    return make_policy(collector.observation_space, collector.action_space, config)


def collect(env, policy, horizons, **options):
    with RolloutCollector(env, **{"seed": 3, **options}) as collector:
        policy = make(collector, policy)
        return [collector.collect(policy, num_steps) for num_steps in horizons]


def assert_identical(rollouts, others):
    """Bit for bit: every tensor, every type, every episode."""
    for rollout, other in zip(rollouts, others, strict=True):
        assert rollout.episodes == other.episodes
        for name, tensor in vars(rollout).items():
            if name != "episodes":
                twin = getattr(other, name)
                assert tensor.dtype == twin.dtype, name
                assert torch.equal(tensor, twin), name


def children_of_ours():
    gc.collect()
    return children()


@pytest.fixture
def nothing_left():
    """Checks, after the test, that no child, descriptor or thread of it is left."""
    before = children(), len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert wait_until(lambda: children_of_ours() <= before[0])
    assert len(os.listdir("/proc/self/fd")) <= before[1]
    assert threading.active_count() <= before[2]


# --- num_workers changes speed, never results


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        ("CartPole-v1", PolicyConfig()),
        ("CartPole-v1", PolicyConfig(hidden_sizes=(128, 128), activation="relu")),
        ("CartPole-v1", PolicyConfig(activation="elu")),
        ("Pendulum-v1", PolicyConfig()),
        ("Pendulum-v1", PolicyConfig(hidden_sizes=(128, 100), output_gain=1.0)),
        ("Pendulum-v1", PolicyConfig(hidden_sizes=(200,), shared=True)),
        (CountingEnv, CountPolicy()),
        (AliasingEnv, NoisyCountPolicy()),
        (WalkEnv, PolicyConfig(normalize_observations=False)),
        (ImageEnv, PolicyConfig(hidden_sizes=(), cnn_features=8)),
    ],
    ids=str,
)
def test_rollouts_are_bitwise_the_same_for_every_number_of_workers(env, policy):
    horizons = (3, 40, 1, 12)
    expected = collect(env, policy, horizons, num_envs=5)
    for num_workers in (1, 2, 3, 8):
        rollouts = collect(env, policy, horizons, num_envs=5, num_workers=num_workers)
        assert_identical(expected, rollouts)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("num_envs", [1, 32, 33, 71])
def test_rollouts_are_the_same_where_workers_share_a_group(env, num_envs):
    config = PolicyConfig(hidden_sizes=(128, 128), output_gain=1.0)
    expected = collect(env, config, (2, 9), num_envs=num_envs)
    for num_workers in (2, 3):
        rollouts = collect(env, config, (2, 9), num_envs=num_envs, num_workers=num_workers)
        assert_identical(expected, rollouts)


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
    expected = collect(factories, CountPolicy(), (12,))
    rollouts = collect(factories, CountPolicy(), (12,), num_workers=2)
    assert_identical(expected, rollouts)
    lengths = {episode.env_index: episode.episode_length for episode in rollouts[0].episodes}
    assert lengths == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}


def test_an_instance_is_copied_into_the_workers():
    env = gymnasium.make("Pendulum-v1", g=4.0)
    expected = collect("Pendulum-v1", PolicyConfig(), (9,), num_envs=3, env_kwargs={"g": 4.0})
    for num_workers in (0, 2):
        rollouts = collect(env, PolicyConfig(), (9,), num_envs=3, num_workers=num_workers)
        assert_identical(expected, rollouts)
    env.close()


def test_workers_change_no_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    collect("CartPole-v1", PolicyConfig(), (5,), num_envs=2, num_workers=2)
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
    expected = collect(factories, SnapshotCountPolicy(), (7, 2))
    rollouts = collect(factories, SnapshotCountPolicy(), (7, 2), num_workers=2)
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


def test_a_collector_may_live_in_a_thread(nothing_left):
    results = []

    def run():
        results.append(collect("CartPole-v1", PolicyConfig(), (9,), num_envs=3, num_workers=2))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_identical(results[0], collect("CartPole-v1", PolicyConfig(), (9,), num_envs=3))


def test_two_collectors_live_side_by_side(nothing_left):
    (expected,) = collect(CountingEnv, CountPolicy(), (6,), num_envs=2)
    first, second = (
        RolloutCollector(CountingEnv, num_envs=2, num_workers=2, seed=3) for _ in range(2)
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

    collect(Parent, CountPolicy(), (3,), num_envs=2, num_workers=2)


# --- wrong things at the start


def test_workers_refuse_what_one_process_refuses(nothing_left):
    def broken():
        raise RuntimeError("no more licences")

    cases = [
        ([CountingEnv, broken], EnvError, "factory of environment 1 raised RuntimeError"),
        ([CountingEnv, lambda: 3], TypeError, "environment 1 must return a gymnasium.Env, got int"),
        ([CountingEnv, WalkEnv], SpaceError, "environment 1 has other spaces than environment 0"),
        ([CountingEnv, CountingEnv, WalkEnv], SpaceError, "environment 2 has other spaces"),
        ("CartPoel-v1", EnvCreationError, "unknown environment id"),
    ]
    for env, error, message in cases:
        for num_workers in (0, 1, 2):
            with pytest.raises(error, match=message):
                RolloutCollector(env, num_workers=num_workers, seed=0)


def test_a_factory_that_cannot_be_sent_is_an_error_that_says_so(nothing_left):
    lock = threading.Lock()
    with pytest.raises((TypeError, PPOError), match=r"environment 1.*(pickle|sent)"):
        RolloutCollector(
            [CountingEnv, lambda: CountingEnv(lock)], num_workers=2, start_method="fork"
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [(leave, "exited with code 7"), (kill, r"killed by SIGKILL .*out-of-memory")],
)
def test_a_worker_that_dies_while_starting_is_named(fault, message, nothing_left):
    def make():
        fault(None)

    with pytest.raises(WorkerError, match=rf"worker 1 \(environments 1 to 1\).* {message}"):
        RolloutCollector([CountingEnv, make], num_workers=2, seed=0)


def test_a_slow_start_is_no_hang(nothing_left):
    def make():
        time.sleep(1.0)
        return CountingEnv()

    collect([make], CountPolicy(), (3,), num_workers=1, step_timeout=0.4)


# --- faults


def team(**fault):
    """Five environments of which the fourth is faulty; with two workers it is in the second."""
    return [*[CountingEnv] * 3, lambda: FaultyEnv(**fault), CountingEnv]


@ACTING
@pytest.mark.parametrize(
    "fault", [{"step": 3}, {"reset": 1}, {"reset": 2, "length": 4}], ids=str
)
def test_an_error_reads_the_same_wherever_it_happens(policy, fault, nothing_left):
    messages = []
    for num_workers in (0, 2):
        with RolloutCollector(team(fault=crash, **fault), num_workers=num_workers, seed=0) as c:
            with pytest.raises(EnvError) as caught:
                c.collect(policy, 9)
            with pytest.raises(ClosedError, match="the physics exploded"):
                c.collect(policy, 9)
        message, _, traceback = str(caught.value).partition("\n")
        assert "environment 3 raised RuntimeError" in message
        assert "in crash" in traceback
        messages.append(message)
    assert messages[0] == messages[1]


@ACTING
def test_a_non_finite_number_in_a_worker_is_named(policy, nothing_left):
    with pytest.raises(
        NonFiniteError, match="environment 3 .*non-finite observation at rollout step 2"
    ):
        collect(team(fault=nan_obs, step=3), policy, (9,), num_workers=2)


class ArrayReward(CountingEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, [reward, reward], *rest


@ACTING
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_ill_shaped_answer_of_a_worker_is_an_environment_error(
    policy, num_workers, nothing_left
):
    with pytest.raises(EnvError, match="environment 0 raised .* in step"):
        collect(ArrayReward, policy, (4,), num_envs=4, num_workers=num_workers)


@ACTING
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (leave, "exited with code 7"),
        (kill, r"was killed by SIGKILL \(often the kernel's out-of-memory killer\)"),
        (segfault, "was killed by SIGSEGV"),
        (lambda env: sys.exit(3), "exited with code 3"),
        (lambda env: os.kill(os.getpid(), signal.SIGRTMIN + 3), "was killed by"),
    ],
    ids=["leave", "kill", "segfault", "sys.exit", "real-time signal"],
)
@pytest.mark.parametrize("moment", ["step", "reset"])
def test_a_worker_that_dies_is_named_at_once(policy, fault, message, moment, nothing_left):
    begin = time.monotonic()
    with RolloutCollector(team(fault=fault, **{moment: 1}), num_workers=2, seed=0) as collector:
        with pytest.raises(WorkerError, match=rf"worker 1 \(environments 3 to 4\).*{message}"):
            collector.collect(policy, 9)
        with pytest.raises(ClosedError, match="WorkerError"):
            collector.collect(policy, 9)
    assert time.monotonic() - begin < SOON


@ACTING
def test_a_worker_that_is_killed_between_two_rollouts_is_named(policy, nothing_left):
    before = children()
    with RolloutCollector(CountingEnv, num_envs=4, num_workers=2, seed=0) as collector:
        collector.collect(policy, 3)
        os.kill(max(children() - before), signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"worker \d .*SIGKILL"):
            collector.collect(policy, 3)


@pytest.mark.parametrize(
    ("fault", "policy"),
    [
        (hang, SnapshotCountPolicy()),
        (hang, CountPolicy()),
        (hang_holding_the_gil, SnapshotCountPolicy()),
        (hang_ignoring_sigterm, CountPolicy()),
        (stop, SnapshotCountPolicy()),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_hang_is_an_error_after_the_timeout_and_its_worker_is_ended(fault, policy, nothing_left):
    begin = time.monotonic()
    with pytest.raises(
        WorkerError,
        match=r"worker 1 \(environments 3 to 4\) at rollout step 2 .*step_timeout = 1.0",
    ):
        collect(team(fault=fault, step=3), policy, (9,), num_workers=2, step_timeout=1.0)
    assert time.monotonic() - begin < SOON


class SlowEnv(CountingEnv):
    def step(self, action):
        time.sleep(0.12)
        return super().step(action)


@ACTING
def test_slow_steps_are_no_hang(policy, nothing_left):
    """A rollout may take longer than the timeout, as long as it moves on."""
    (rollout,) = collect(SlowEnv, policy, (12,), num_envs=2, num_workers=2, step_timeout=1.0)
    assert rollout.num_transitions == 24


@ACTING
def test_many_slow_environments_in_one_worker_are_no_hang(policy, nothing_left):
    """The timeout is for a step of an environment, not for as many as a worker happens to have."""
    (rollout,) = collect(SlowEnv, policy, (1,), num_envs=12, num_workers=1, step_timeout=0.7)
    assert rollout.num_transitions == 12


@pytest.mark.parametrize(
    ("fault", "policy"),
    [(kill, SnapshotCountPolicy()), (crash, CountPolicy())],
    ids=["killed while workers act", "raised while parent acts"],
)
def test_a_fault_is_not_kept_waiting_by_a_busy_sibling(fault, policy, nothing_left):
    """The first worker takes a minute; the second is dead. That is known now."""
    factories = [lambda: FaultyEnv(hang, step=2), lambda: FaultyEnv(fault, step=2)]

    def ring(signum, frame):
        raise TimeoutError("nobody noticed")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SOON)
    try:
        with pytest.raises(PPOError, match="worker 1|environment 1"):
            collect(factories, policy, (5,), num_workers=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


# --- the end


@ACTING
def test_an_interrupt_ends_workers_that_hang_and_the_collector_refuses(policy, nothing_left):
    class Interrupt(Exception):  # noqa: N818
        pass

    def ring(signum, frame):
        raise Interrupt

    before = children()
    previous = signal.signal(signal.SIGALRM, ring)
    with RolloutCollector(team(fault=hang, step=2), num_workers=2, seed=0) as collector:
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            with pytest.raises(Interrupt):
                collector.collect(policy, 5)
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert time.monotonic() - begin < 0.5 + 4.0
        assert children() <= before
        with pytest.raises(ClosedError, match="Interrupt in collect"):
            collector.collect(policy, 5)


class Interrupting(CountPolicy):
    def __init__(self):
        self.calls = 0

    def act(self, obs, **arguments):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().act(obs, **arguments)


def test_an_interrupt_between_two_steps_leaves_nothing_behind(nothing_left):
    before = children()
    with RolloutCollector(CountingEnv, num_envs=3, num_workers=2, seed=0) as collector:
        assert len(children() - before) == 2
        with pytest.raises(KeyboardInterrupt):
            collector.collect(Interrupting(), 5)
        assert children() <= before
        with pytest.raises(ClosedError, match="KeyboardInterrupt"):
            collector.collect(CountPolicy(), 5)


def test_closing_has_a_deadline_even_if_environments_do_not_close(nothing_left):
    class Sticky(CountingEnv):
        def close(self):
            hang_ignoring_sigterm(self)

    collector = RolloutCollector(Sticky, num_envs=3, num_workers=3, seed=0)
    collector.collect(CountPolicy(), 2)
    begin = time.monotonic()
    collector.close()
    assert time.monotonic() - begin < 4.0
    collector.close()
    with pytest.raises(ClosedError):
        collector.collect(CountPolicy(), 2)


def test_a_signal_handler_of_the_parent_does_not_run_in_a_worker(tmp_path, nothing_left):
    """A handler that, say, saves a checkpoint on SIGTERM is the parent's business alone."""
    mark = tmp_path / "handled"
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: mark.touch())
    try:
        with pytest.raises(WorkerError):
            collect(
                lambda: FaultyEnv(hang, step=1),
                CountPolicy(),
                (2,),
                num_envs=1,
                num_workers=1,
                step_timeout=0.3,
            )
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not mark.exists()


def test_an_abandoned_collector_ends_its_workers(nothing_left):
    before = children()
    collector = RolloutCollector(CountingEnv, num_envs=3, num_workers=2, seed=0)
    collector.collect(CountPolicy(), 3)
    assert len(children() - before) == 2
    del collector
    assert wait_until(lambda: children_of_ours() <= before)


@ACTING
def test_shared_memory_has_no_name(policy, nothing_left):
    before = set(os.listdir("/dev/shm"))
    with RolloutCollector(CountingEnv, num_envs=3, num_workers=2, seed=0) as collector:
        collector.collect(policy, 3)
        mapped = Path("/proc/self/maps").read_text()
        assert "ppo-rollout (deleted)" in mapped
        assert not {name for name in os.listdir("/dev/shm") if "ppo" in name} - before
    del collector
    gc.collect()
    assert "ppo-rollout" not in Path("/proc/self/maps").read_text()


def test_collecting_longer_and_longer_leaks_no_descriptor():
    others = children()
    with RolloutCollector(CountingEnv, num_envs=2, num_workers=2, seed=0) as collector:
        collector.collect(CountPolicy(), 1)
        before = len(os.listdir("/proc/self/fd"))
        workers = {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in children() - others}
        for num_steps in range(2, 30):
            collector.collect(CountPolicy(), num_steps)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before
        for pid, count in workers.items():
            assert len(os.listdir(f"/proc/{pid}/fd")) <= count + 1


def test_opening_and_closing_many_times_leaves_nothing(nothing_left):
    for cycle in range(20):
        collect(CountingEnv, SnapshotCountPolicy(), (2,), num_envs=2, num_workers=2, seed=cycle)


# --- the end of the whole program

UNCLOSED = """
import sys
from environments import CountingEnv, SnapshotCountPolicy
from processes import children
from ppo import RolloutCollector

collector = RolloutCollector(CountingEnv, num_envs=3, num_workers=2, seed=0)
collector.collect(SnapshotCountPolicy(), 3)
print(*children(), flush=True)
if sys.argv[1] == "raise":
    raise RuntimeError("a bug of the user")
"""


@pytest.mark.parametrize(("end", "code"), [("fall off", 0), ("raise", 1)])
def test_a_program_ends_promptly_and_silently_without_close(tmp_path, end, code):
    returned, out, err = run_script(tmp_path / "script.py", UNCLOSED, end, seconds=60.0)
    workers = [int(pid) for pid in out.split()]
    assert returned == code
    assert len(workers) == 2
    assert not any(map(is_alive, workers))
    if end == "raise":
        assert err.count("Traceback") == 1
        assert err.endswith("RuntimeError: a bug of the user\n")
    else:
        assert err == ""


HANGING = """
import multiprocessing
import sys
import time
from environments import FaultyEnv, SnapshotCountPolicy, hang, hang_holding_the_gil
from processes import children
from ppo import RolloutCollector

faults = [hang, hang_holding_the_gil] if sys.argv[1] == "alone" else [hang, hang]
collector = RolloutCollector(
    [lambda fault=fault: FaultyEnv(fault, step=1) for fault in faults], num_workers=2, seed=0
)
print(*children(), flush=True)
if sys.argv[1] == "sibling":
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
print(*children(), flush=True)
collector.collect(SnapshotCountPolicy(), 5)
"""


@pytest.mark.parametrize("company", ["alone", "sibling"])
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path, company):
    """Not while they hang, even with the GIL held or while the parent has other children."""
    script = start_script(tmp_path / "script.py", HANGING, company)
    workers = {int(pid) for pid in script.stdout.readline().split()}
    others = {int(pid) for pid in script.stdout.readline().split()} - workers
    try:
        assert len(workers) == 2
        time.sleep(0.5)  # let the environments begin to hang
        script.kill()
        script.wait()
        assert wait_until(lambda: not any(map(is_alive, workers)), SOON)
    finally:
        for pid in filter(is_alive, workers | others):
            os.kill(pid, signal.SIGKILL)
        script.communicate()


INTERRUPTED = """
from environments import CountingEnv, FaultyEnv, SnapshotCountPolicy, hang
from processes import children
from ppo import RolloutCollector

with RolloutCollector(lambda: FaultyEnv(hang, step=2), num_envs=2, num_workers=2) as collector:
    print(*children(), flush=True)
    try:
        collector.collect(SnapshotCountPolicy(), 5)
    except KeyboardInterrupt:
        print("interrupted", *children(), flush=True)
"""


def test_ctrl_c_reaches_the_parent_alone(tmp_path):
    """A terminal sends SIGINT to the whole group; the workers keep quiet and are ended."""
    script = start_script(tmp_path / "script.py", INTERRUPTED, start_new_session=True)
    workers = [int(pid) for pid in script.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.5)
    os.killpg(script.pid, signal.SIGINT)
    out, err = script.communicate(timeout=60)
    assert (script.returncode, out, err) == (0, "interrupted\n", "")
    assert not any(map(is_alive, workers))
