"""Collecting in worker processes: the same numbers, and an end to every fault."""

import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from collecting import assert_identical, collect
from environments import (
    CountingEnv,
    FaultyEnv,
    WalkEnv,
    crash,
    eat_memory,
    hang,
    hang_holding_the_gil,
    hang_ignoring_sigterm,
    kill,
    leave,
    loop_holding_the_gil,
    nan_obs,
    segfault,
    stop,
)
from known_policies import CountPolicy, LargeCountPolicy, SnapshotCountPolicy
from processes import children, give_up, is_alive, ringing, run_script, start_script, wait_until

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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Who acts: the workers by themselves, or the parent for all of them.
ACTING = pytest.mark.parametrize(
    "policy", [SnapshotCountPolicy(), CountPolicy()], ids=["workers act", "parent acts"]
)
METHODS = pytest.mark.parametrize(
    "method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)]
)
SOON = 10.0
"""Seconds within which a fault must be known, with room for a busy machine."""


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
    with pytest.raises((TypeError, PPOError), match=r"environments? 1.*(pickle|sent)"):
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

    collect([make], (3,), CountPolicy(), num_workers=1, step_timeout=0.4)


# --- faults


def team(**fault):
    """Five environments of which the fourth is faulty; with two workers it is in the second."""
    return [*[CountingEnv] * 3, lambda: FaultyEnv(**fault), CountingEnv]


@ACTING
@pytest.mark.parametrize("fault", [{"step": 3}, {"reset": 1}, {"reset": 2, "length": 4}], ids=str)
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
        NonFiniteError, match=r"environment 3 .*non-finite observation at rollout step 2"
    ):
        collect(team(fault=nan_obs, step=3), (9,), policy, num_workers=2)


class ArrayReward(CountingEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, [reward, reward], *rest


@ACTING
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_ill_shaped_answer_of_a_worker_is_an_environment_error(
    policy, num_workers, nothing_left
):
    with pytest.raises(EnvError, match=r"environment \d raised .* in step"):
        collect(ArrayReward, (4,), policy, num_envs=4, num_workers=num_workers)


def die_of_a_real_time_signal(env):
    number = signal.SIGRTMIN + 3
    # Whatever else runs in this process may have caught or blocked it, and a fork inherits that.
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)


@ACTING
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (leave, "exited with code 7"),
        (kill, r"was killed by SIGKILL \(often the kernel's out-of-memory killer\)"),
        (segfault, "was killed by SIGSEGV"),
        (lambda env: sys.exit(3), "exited with code 3"),
        (die_of_a_real_time_signal, "was killed by"),
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


@pytest.mark.parametrize("culprit", [5, 34])
@pytest.mark.parametrize("moment", [{"step": 3}, {"reset": 2, "length": 3}], ids=str)
def test_a_culprit_among_many_is_named_whichever_group_is_at_work(culprit, moment, nothing_left):
    factories = [CountingEnv] * 40
    factories[culprit] = lambda: FaultyEnv(kill, **moment)
    with RolloutCollector(factories, num_workers=1, seed=0) as collector:
        what = rf"worker 0 .* at rollout step 2 .* environment {culprit} in {next(iter(moment))} "
        with pytest.raises(WorkerError, match=what):
            collector.collect(SnapshotCountPolicy(), 9)


class BrokenActor:
    def __call__(self, obs, noise):
        raise ZeroDivisionError("a bug of the policy")


class BrokenSnapshot(SnapshotCountPolicy):
    def snapshot(self):
        return BrokenActor()


def test_a_policy_that_raises_in_a_worker_is_an_error_with_its_traceback(nothing_left):
    """It is not blamed on an environment, and not answered with a restart."""
    with pytest.raises(WorkerError, match=r"(?s)in __call__\n.*ZeroDivisionError: a bug of the"):
        collect(CountingEnv, (5,), BrokenSnapshot(), num_workers=2, on_fault="restart")


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
        collect(team(fault=fault, step=3), (9,), policy, num_workers=2, step_timeout=1.0)
    assert time.monotonic() - begin < SOON


STOPPED = pytest.mark.parametrize("stopped", [0, 1])
"""Which worker is stopped."""


@STOPPED
@pytest.mark.parametrize(
    "policy",
    [SnapshotCountPolicy(), LargeCountPolicy(), CountPolicy()],
    ids=lambda policy: type(policy).__name__,
)
def test_a_worker_that_is_stopped_between_two_rollouts_is_an_error_whatever_it_is_sent(
    policy, stopped, nothing_left
):
    before = children()
    with RolloutCollector(
        CountingEnv, num_envs=4, num_workers=2, seed=0, step_timeout=0.7
    ) as collector:
        collector.collect(policy, 3)
        os.kill(sorted(children() - before)[stopped], signal.SIGSTOP)
        named = rf"worker {stopped} .* made no progress for step_timeout = 0.7 s"
        with ringing(give_up, SOON), pytest.raises(WorkerError, match=named):
            collector.collect(policy, 3)
        assert children() <= before


class LargeStateEnv(CountingEnv):
    def get_state(self):
        return np.zeros(2**20)

    def set_state(self, state):
        pass


def test_a_worker_that_is_stopped_before_it_goes_back_to_its_place_is_an_error(
    monkeypatch, nothing_left
):
    options = {"num_envs": 2, "num_workers": 2, "seed": 0}
    with RolloutCollector(LargeStateEnv, **options) as collector:
        collector.collect(CountPolicy(), 1)
        state = collector.state_dict()
    monkeypatch.setattr(RolloutCollector, "fits", lambda self, state: True)  # asks the workers
    before = children()
    with RolloutCollector(LargeStateEnv, **options, step_timeout=0.3) as collector:
        os.kill(min(children() - before), signal.SIGSTOP)
        with ringing(give_up, SOON), pytest.raises(WorkerError, match=r"worker 0 .*no progress"):
            collector.load_state_dict(state)


def test_without_a_timeout_a_stopped_worker_is_waited_for(nothing_left):
    before = children()
    with RolloutCollector(CountingEnv, num_envs=4, num_workers=2, seed=0) as collector:
        collector.collect(LargeCountPolicy(), 3)
        stopped = min(children() - before)
        os.kill(stopped, signal.SIGSTOP)
        with ringing(lambda signum, frame: os.kill(stopped, signal.SIGCONT), 0.5):
            rollout = collector.collect(LargeCountPolicy(), 3)
    _, expected = collect(CountingEnv, (3, 3), LargeCountPolicy(), num_envs=4, num_workers=0)
    assert_identical([rollout], [expected])


@STOPPED
def test_while_one_worker_is_stopped_the_other_acts_and_ctrl_c_ends_both(
    stopped, tmp_path, nothing_left
):
    class Telling(CountingEnv):
        def step(self, action):
            (tmp_path / "stepped").touch()
            return super().step(action)

    begin = time.monotonic()

    def interrupt(signum, frame):
        if any(tmp_path.iterdir()):
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            raise KeyboardInterrupt
        if time.monotonic() - begin > SOON:
            raise AssertionError("the other one got nothing")

    before = children()
    with RolloutCollector(Telling, num_envs=2, num_workers=2, seed=0) as collector:
        collector.collect(LargeCountPolicy(), 3)
        os.kill(sorted(children() - before)[stopped], signal.SIGSTOP)
        (tmp_path / "stepped").unlink()
        with ringing(interrupt, 0.1, 0.1), pytest.raises(KeyboardInterrupt):
            collector.collect(LargeCountPolicy(), 3)
        assert children() <= before
        with pytest.raises(ClosedError, match="KeyboardInterrupt"):
            collector.collect(LargeCountPolicy(), 3)


class SlowEnv(CountingEnv):
    def step(self, action):
        time.sleep(0.12)
        return super().step(action)


@ACTING
def test_slow_steps_are_no_hang(policy, nothing_left):
    """A rollout may take longer than the timeout, as long as it moves on."""
    (rollout,) = collect(SlowEnv, (12,), policy, num_envs=2, num_workers=2, step_timeout=1.0)
    assert rollout.num_transitions == 24


@ACTING
def test_many_slow_environments_in_one_worker_are_no_hang(policy, nothing_left):
    """The timeout is for a step of an environment, not for as many as a worker happens to have."""
    (rollout,) = collect(SlowEnv, (1,), policy, num_envs=12, num_workers=1, step_timeout=0.7)
    assert rollout.num_transitions == 12


@pytest.mark.parametrize(
    ("fault", "policy"),
    [(kill, SnapshotCountPolicy()), (crash, CountPolicy())],
    ids=["killed while workers act", "raised while parent acts"],
)
def test_a_fault_is_not_kept_waiting_by_a_busy_sibling(fault, policy, nothing_left):
    """The first worker takes a minute; the second is dead. That is known now."""
    factories = [lambda: FaultyEnv(hang, step=2), lambda: FaultyEnv(fault, step=2)]
    with ringing(give_up, SOON), pytest.raises(PPOError, match=r"worker 1|environment 1"):
        collect(factories, (5,), policy, num_workers=2)


# --- each fault, for each start method, in a step and in a reset

PLACES = {
    "step": r"episode seed \d+, episode step 2, rollout step 2, action (np.int64\()?[01]",
    "reset": r"in reset.*\(episode seed \d+",
}
HANGS = "made no progress for step_timeout = 0.7 s"
FAULTS = {
    crash: (EnvError, "raised RuntimeError", "in crash"),
    eat_memory: (EnvError, "raised MemoryError", "in eat_memory"),
    leave: (WorkerError, "exited with code 7", ""),
    kill: (WorkerError, r"was killed by SIGKILL \(often the kernel's out-of-memory", ""),
    segfault: (WorkerError, "was killed by SIGSEGV", "in segfault"),
    hang: (WorkerError, HANGS, "in hang"),
    loop_holding_the_gil: (WorkerError, HANGS, "in loop_holding_the_gil"),
    stop: (WorkerError, HANGS, "it shows no stack"),
}


@pytest.fixture
def servers():
    """Start what multiprocessing keeps for the whole program, so that it is not taken for left."""
    multiprocessing.forkserver.set_forkserver_preload(["ppo.collector.worker"])
    multiprocessing.forkserver.ensure_running()
    multiprocessing.resource_tracker.ensure_running()


@METHODS
@pytest.mark.parametrize("moment", PLACES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named_with_its_place_and_stack(fault, moment, method, servers, nothing_left):
    error, how, stack = FAULTS[fault]
    number = 3 if moment == "step" else 1
    factories = [CountingEnv, lambda: FaultyEnv(fault, **{moment: number}), CountingEnv]
    timeout = 0.7 if how == HANGS else None
    collector = RolloutCollector(
        factories, num_workers=1, seed=0, start_method=method, step_timeout=timeout
    )
    begin = time.monotonic()
    with collector, pytest.raises(error) as caught:
        collector.collect(CountPolicy(), 9)
    assert time.monotonic() - begin < SOON
    message, _, rest = str(caught.value).partition("\n")
    assert re.search(how, message)
    assert re.search(rf"environment 1 .*{PLACES[moment]}", message)
    assert stack in message + rest
    assert "_die_with_parent" not in rest
    assert "pytest" not in rest


def test_one_fault_is_named_by_a_spawned_worker_too(servers, nothing_left):
    """The others are in the slow suite: each start imports everything."""
    collector = RolloutCollector(
        [lambda: FaultyEnv(segfault, step=3)], num_workers=1, seed=0, start_method="spawn"
    )
    with collector, pytest.raises(WorkerError, match="SIGSEGV at environment 0 in step") as caught:
        collector.collect(SnapshotCountPolicy(), 9)
    assert "in segfault" in str(caught.value)


@METHODS
def test_a_death_is_known_within_a_second_while_a_sibling_hangs(method, servers, nothing_left):
    before = children()
    factories = [lambda: FaultyEnv(hang, step=2), lambda: FaultyEnv(kill, step=2)]
    collector = RolloutCollector(factories, num_workers=2, seed=0, start_method=method)
    begin = time.monotonic()
    with collector:
        with pytest.raises(WorkerError, match="SIGKILL"):
            collector.collect(SnapshotCountPolicy(), 5)
        assert time.monotonic() - begin < 1.5  # with room for a busy machine
        assert children() <= before  # the sibling has ended, too


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_start_that_hangs_is_an_error(method, monkeypatch, servers, nothing_left):
    monkeypatch.setattr("ppo.collector.pool._START_SECONDS", 3.0)

    def make():
        time.sleep(60)

    with pytest.raises(WorkerError, match=r"while starting made no progress for 3\.0 s") as caught:
        RolloutCollector([make], num_workers=1, seed=0, start_method=method, step_timeout=0.1)
    assert "in make" in str(caught.value)


# --- what environments start


class WithHelper(FaultyEnv):
    """Has a process of its own and does not end it."""

    def __init__(self, fault, path, **moment):
        super().__init__(fault, **moment)
        self.helper = subprocess.Popen(["sleep", "60"])
        self.forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        self.forked.start()
        with open(path, "a") as file:
            print(self.helper.pid, self.forked.pid, file=file)


@METHODS
@pytest.mark.parametrize("fault", [None, crash, kill, hang])
def test_what_an_environment_started_ends_with_its_worker(
    fault, method, tmp_path, servers, nothing_left
):
    path = tmp_path / "helpers"
    factory = lambda: WithHelper(fault, path, step=3 * (fault is not None))  # noqa: E731
    timeout = 0.7 if fault is hang else None
    collector = RolloutCollector(
        factory, num_envs=2, num_workers=2, seed=0, start_method=method, step_timeout=timeout
    )
    begin = time.monotonic()
    with collector:
        if fault is None:
            collector.collect(SnapshotCountPolicy(), 5)
        else:
            with pytest.raises(PPOError):
                collector.collect(SnapshotCountPolicy(), 5)
    assert time.monotonic() - begin < SOON
    helpers = [int(pid) for pid in path.read_text().split()]
    assert len(helpers) == 4
    assert wait_until(lambda: not any(map(is_alive, helpers)))


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


class BadlyClosed(CountingEnv):
    """Does something terrible instead of being closed."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def close(self):
        self.fault(self)


@METHODS
@pytest.mark.parametrize(
    "fault",
    [crash, hang, hang_ignoring_sigterm, hang_holding_the_gil, leave, kill, segfault, stop],
    ids=lambda fault: fault.__name__,
)
def test_an_environment_that_closes_badly_keeps_neither_the_parent_nor_the_others(
    fault, method, tmp_path, servers, nothing_left
):
    class Closing(CountingEnv):
        def close(self):
            (tmp_path / "closed").touch()

    before = children()
    collector = RolloutCollector(
        [lambda: BadlyClosed(fault), Closing], num_workers=2, seed=0, start_method=method
    )
    collector.collect(SnapshotCountPolicy(), 3)
    begin = time.monotonic()
    collector.close()
    assert time.monotonic() - begin < 4.0
    collector.close()
    assert children() <= before
    assert (tmp_path / "closed").exists()


class Interrupting(CountPolicy):
    def __init__(self):
        self.calls = 0

    def act(self, obs, **arguments):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().act(obs, **arguments)


def test_an_interrupt_between_two_steps_closes_all_and_leaves_nothing_behind(
    tmp_path, nothing_left
):
    class Closing(CountingEnv):
        def close(self):
            (tmp_path / str(self.tag)).touch()

    before = children()
    with RolloutCollector(Closing, num_envs=3, num_workers=2, seed=0) as collector:
        assert len(children() - before) == 2
        with pytest.raises(KeyboardInterrupt):
            collector.collect(Interrupting(), 5)
        assert children() <= before
        with pytest.raises(ClosedError, match="KeyboardInterrupt"):
            collector.collect(CountPolicy(), 5)
    assert len(list(tmp_path.iterdir())) == 3


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
                (2,),
                CountPolicy(),
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
    assert wait_until(lambda: gc.collect() >= 0 and children() <= before)


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


CYCLES = """
import gc, os, resource, threading
from pathlib import Path
from collecting import collect
from environments import CountingEnv
from known_policies import SnapshotCountPolicy
from processes import children, wait_until

def left():
    gc.collect()
    return children(), len(os.listdir("/proc/self/fd")), threading.active_count()

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before, sizes = left(), []
for cycle in range(200):
    collect(CountingEnv, (2,), SnapshotCountPolicy(), num_envs=2, num_workers=1, seed=cycle)
    sizes.append(resident_bytes())
assert wait_until(lambda: left() == before), (before, left())
assert sizes[-1] - sizes[50] < 8 * 2**20, sizes
print(len(sizes))
"""


def test_opening_and_closing_many_times_leaves_nothing(tmp_path):
    """In a program of its own: starting workers takes the longer, the larger a program is."""
    status, out, err = run_script(tmp_path / "script.py", CYCLES)
    assert (status, out, err) == (0, "200\n", "")


# --- the end of the whole program

UNCLOSED = """
import sys
from environments import CountingEnv
from known_policies import SnapshotCountPolicy
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
from environments import FaultyEnv, announced, hang, hang_holding_the_gil
from known_policies import SnapshotCountPolicy
from processes import children
from ppo import RolloutCollector

collector = RolloutCollector(
    [lambda f=fault: FaultyEnv(announced(f), step=1) for fault in (hang, hang_holding_the_gil)],
    num_workers=2,
    seed=0,
    start_method=sys.argv[1],
)
if sys.argv[2] == "sibling":
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
print(*children(), flush=True)
collector.collect(SnapshotCountPolicy(), 5)
"""


@METHODS
@pytest.mark.parametrize("company", ["alone", "sibling"])
def test_workers_do_not_outlive_a_parent_that_is_killed(method, company, tmp_path):
    """Not while they hang, even with the GIL held or while the parent has other children."""
    workers, others = set(), set()
    script = start_script(tmp_path / "script.py", HANGING, method, company)
    try:
        others |= {int(pid) for pid in script.stdout.readline().split()}
        workers |= {int(script.stdout.readline()) for _ in range(2)}
        script.kill()
        script.wait()
        assert wait_until(lambda: not any(map(is_alive, workers)), SOON)
    finally:
        script.kill()
        for pid in filter(is_alive, workers | others):
            os.kill(pid, signal.SIGKILL)
        script.communicate()


HELPERS = """
import sys
from environments import announced, hang_holding_the_gil
from known_policies import SnapshotCountPolicy
from test_worker_faults import WithHelper
from ppo import RolloutCollector

path = sys.argv[1]
collector = RolloutCollector(
    [lambda: WithHelper(announced(hang_holding_the_gil), path, step=1)], num_workers=1, seed=0
)
collector.collect(SnapshotCountPolicy(), 5)
"""


def test_what_environments_started_does_not_outlive_a_parent_that_is_killed(tmp_path):
    script = start_script(tmp_path / "script.py", HELPERS, tmp_path / "helpers")
    helpers = []
    try:
        assert int(script.stdout.readline())
        helpers = [int(pid) for pid in (tmp_path / "helpers").read_text().split()]
        assert len(helpers) == 2
        assert all(map(is_alive, helpers))
        script.kill()
        script.wait()
        assert wait_until(lambda: not any(map(is_alive, helpers)), SOON)
    finally:
        script.kill()
        for pid in filter(is_alive, helpers):
            os.kill(pid, signal.SIGKILL)
        script.communicate()


INTERRUPTED = """
import signal
from environments import FaultyEnv, announced, hang
from known_policies import SnapshotCountPolicy
from processes import children
from ppo import RolloutCollector

# A shell that starts the tests in the background has them, and this, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with RolloutCollector(
    lambda: FaultyEnv(announced(hang), step=2), num_envs=2, num_workers=2
) as collector:
    print(*children(), flush=True)
    try:
        collector.collect(SnapshotCountPolicy(), 5)
    except KeyboardInterrupt:
        print("interrupted", *children(), flush=True)
"""


def test_ctrl_c_reaches_the_parent_alone(tmp_path):
    """A terminal sends SIGINT to the whole group; the workers keep quiet and are ended."""
    script = start_script(tmp_path / "script.py", INTERRUPTED, start_new_session=True)
    workers = []
    try:
        workers += map(int, script.stdout.readline().split())
        assert {int(script.stdout.readline()) for _ in workers} == set(workers)
        os.killpg(script.pid, signal.SIGINT)
        out, err = script.communicate(timeout=60)
        assert (script.returncode, out, err) == (0, "interrupted\n", "")
        assert not any(map(is_alive, workers))
    finally:
        script.kill()
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
