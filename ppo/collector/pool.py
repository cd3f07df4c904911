"""The parent's side of the worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NoReturn

import cloudpickle
import numpy as np

from ppo.collector.buffers import Buffers, Layout
from ppo.collector.columns import Harvest
from ppo.collector.replay import Bookmark
from ppo.collector.signals import STEP, STEPPED, poll, receive_byte
from ppo.collector.worker import worker_main
from ppo.envs import EnvFactory
from ppo.errors import SpaceError, WorkerError
from ppo.policies.protocol import Actor

__all__ = ["StartMethod", "WorkerPool"]

StartMethod = Literal["fork", "forkserver", "spawn"]

_SPIN_SECONDS = 200e-6
_CLOSE_SECONDS = 2.0


def default_start_method() -> StartMethod:
    """`fork` on Linux, `spawn` elsewhere; see docs/decisions/0002-start-method.rst."""
    return "fork" if sys.platform == "linux" else "spawn"


def fitting_number_of_workers(num_envs: int, start_method: StartMethod | None = None) -> int:
    """How many workers are surely no slower than none, for a policy that acts inside of them.

    One per processor, each with at least two environments; none where starting them takes seconds
    (without `fork`), or where this process may not have children.
    """
    method = start_method or default_start_method()
    if method != "fork" or multiprocessing.current_process().daemon:
        return 0
    number = min(_num_processors(), num_envs // 2)
    return number if number > 1 else 0


def _num_processors() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerPool:
    """Worker processes, each stepping a contiguous share of the columns into shared memory.

    Args:
        factories: One per column.
        seeds: Generator of episode seeds per column.
        num_workers: Number of processes, at most one per column is started.
        start_method: How processes are started; None for the platform's default.
        step_timeout: Seconds without progress after which a worker is taken to hang.
    """

    def __init__(
        self,
        factories: Sequence[EnvFactory],
        seeds: Sequence[np.random.Generator],
        num_workers: int,
        start_method: StartMethod | None,
        step_timeout: float | None,
    ) -> None:
        self.num_envs = len(factories)
        self._timeout: float | None = None  # starting is no step
        self._conns: list[connection.Connection] = []
        self._processes: list[BaseProcess] = []
        self._shares = np.array_split(np.arange(self.num_envs), min(num_workers, self.num_envs))
        # Polling pays only while nobody else could use the processor.
        self._spin = _SPIN_SECONDS if len(self._shares) <= _num_processors() else 0.0
        # Ends the workers when the pool is dropped, and at exit before multiprocessing joins them.
        self._finalizer = multiprocessing.util.Finalize(
            self, _end_workers, (self._conns, self._processes), exitpriority=100
        )
        context = multiprocessing.get_context(start_method or default_start_method())
        try:
            for share in self._shares:
                self._start(context, factories, seeds, share)
            spaces = self._receive_all()
        except BaseException:
            self.close()
            raise
        self._timeout = step_timeout
        self.observation_space, self.action_space = spaces[0]
        for worker, other in enumerate(spaces):
            if other != spaces[0]:
                self.close()
                raise SpaceError(
                    f"environment {self._shares[worker][0]} has other spaces than environment 0: "
                    f"{other} against {spaces[0]}"
                )

    def _start(
        self,
        context: multiprocessing.context.BaseContext,
        factories: Sequence[EnvFactory],
        seeds: Sequence[np.random.Generator],
        share: np.ndarray,
    ) -> None:
        ours, theirs = context.Pipe()
        self._conns.append(ours)
        first, stop = int(share[0]), int(share[-1]) + 1
        inherited = list(self._conns) if context.get_start_method() == "fork" else []
        try:
            payload = cloudpickle.dumps(list(factories[first:stop]))
        except Exception as error:
            raise TypeError(
                f"the factories of environments {first} to {stop - 1} cannot be sent to a worker: "
                f"{error}; let them make what they need inside, or use num_workers=0"
            ) from error
        process = context.Process(  # type: ignore[attr-defined]
            target=worker_main,
            name=f"ppo-worker-{len(self._processes)}",
            args=(
                theirs,
                inherited,
                payload,
                list(seeds[first:stop]),
                first,
                self._spin,
                threading.current_thread() is threading.main_thread(),
            ),
        )
        with warnings.catch_warnings(), _without_main():
            # Forking beside torch's idle threads is what torch's own data loaders do.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            process.start()
        theirs.close()
        self._processes.append(process)

    def attach(self, layout: Layout) -> Buffers:
        """Make the arrays of a rollout in memory shared with every worker."""
        fd = Buffers.shared_file(layout)
        try:
            self._buffers = Buffers(layout, fd)
            for conn, process in zip(self._conns, self._processes, strict=True):
                conn.send(("attach", layout))
                reduction.send_handle(conn, fd, process.pid)
        finally:
            os.close(fd)
        self._receive_all()
        return self._buffers

    def bookmarks(self) -> list[Bookmark]:
        """The place of every column in its episode."""
        self._command("bookmarks")
        return [mark for marks in self._receive_all() for mark in marks]

    def restore(
        self,
        marks: Sequence[Bookmark],
        actions: Sequence[Any],
        digests: Sequence[str],
        squash: bool,
    ) -> list[bool]:
        """Go to these places, each worker to its own; says which columns got there."""
        for worker, share in enumerate(self._shares):
            mine = slice(int(share[0]), int(share[-1]) + 1)
            message = ("restore", marks[mine], actions[mine], digests[mine], squash)
            try:
                self._conns[worker].send(message)
            except OSError:
                self._report_death(worker)
        timeout = self._timeout
        if timeout is not None:  # whole episodes are played, and no step of them is announced
            self._timeout = timeout * (1 + sum(mark.episode_length for mark in marks))
        try:
            return [arrived for columns in self._receive_all() for arrived in columns]
        finally:
            self._timeout = timeout

    def reset(self) -> list[bool]:
        """Start the first episodes; says which columns give action masks."""
        self._command("reset")
        return [masked for columns in self._receive_all() for masked in columns]

    def run(self, actor: Actor, num_steps: int) -> Harvest:
        """Let every worker act for its own columns for a whole rollout."""
        self._command("run", actor, num_steps)
        return _merge(self._receive_all())

    def begin(self, num_steps: int) -> None:
        """Announce a rollout in which the parent acts."""
        self._command("steps", num_steps)

    def step(self, t: int) -> None:
        """Wake every worker for row `t` and wait for all of them."""
        for worker, conn in enumerate(self._conns):
            try:
                os.write(conn.fileno(), STEP)
            except OSError:
                self._report_death(worker)
        pending = dict(enumerate(self._conns))
        for worker, conn in enumerate(self._conns):
            # Whoever is not ready soon is waited for together with all others.
            if self._spin and poll(conn, self._spin):
                self._take_byte(worker)
                del pending[worker]
        while pending:
            for worker in self._wait(pending):
                self._take_byte(worker)
                del pending[worker]

    def _take_byte(self, worker: int) -> None:
        byte = receive_byte(self._conns[worker], 0.0)
        if byte != STEPPED:
            self._receive(worker)  # the fault, or the news that the worker is dead
            raise WorkerError(f"worker {worker} broke the protocol: got {byte!r}")

    def harvest(self) -> Harvest:
        """End the rollout announced by `begin`."""
        return _merge(self._receive_all())

    def _command(self, *message: Any) -> None:
        pickled = reduction.ForkingPickler.dumps(message)  # once for all
        for worker, conn in enumerate(self._conns):
            try:
                conn.send_bytes(pickled)
            except OSError:
                self._report_death(worker)

    def _receive_all(self) -> list[Any]:
        """One answer of every worker, as they come: no fault waits behind a busy sibling."""
        answers: dict[int, Any] = {}
        pending = dict(enumerate(self._conns))
        while pending:
            for worker in self._wait(pending):
                answers[worker] = self._receive(worker)
                del pending[worker]
        return [answers[worker] for worker in range(len(self._conns))]

    def _wait(self, pending: dict[int, connection.Connection]) -> list[int]:
        """Workers that have sent something; raises for one that died or makes no progress."""
        sentinels = [self._processes[worker].sentinel for worker in pending]
        progress = {worker: self._moved(worker) for worker in pending}
        while True:
            ready = connection.wait([*pending.values(), *sentinels], self._timeout)
            answered = [worker for worker, conn in pending.items() if conn in ready]
            if answered:
                return answered
            for worker in pending:
                if self._processes[worker].sentinel in ready:
                    self._report_death(worker)
            for worker in pending:
                if progress[worker] == (moved := self._moved(worker)):
                    self._report_hang(worker)
                progress[worker] = moved

    def _receive(self, worker: int) -> Any:
        """The answer that a worker has sent, or is about to send."""
        try:
            status, result = self._conns[worker].recv()
        except (EOFError, OSError):
            self._report_death(worker)
        if status == "error":
            raise result
        return result

    def _moved(self, worker: int) -> int:
        """Steps of environments done in this rollout."""
        buffers = getattr(self, "_buffers", None)
        return -1 if buffers is None else int(buffers.progress[self._shares[worker]].sum())

    def _progress(self, worker: int) -> int:
        buffers = getattr(self, "_buffers", None)
        return -1 if buffers is None else int(buffers.progress[self._shares[worker]].min())

    def _describe(self, worker: int) -> str:
        share = self._shares[worker]
        step = self._progress(worker)
        where = f" at rollout step {step}" if step >= 0 else " while starting"
        return f"worker {worker} (environments {share[0]} to {share[-1]}){where}"

    def _report_death(self, worker: int) -> NoReturn:
        process = self._processes[worker]
        process.join(1.0)
        code = process.exitcode
        if code is not None and code < 0:
            named = -code in {int(known) for known in signal.Signals}
            name = signal.Signals(-code).name if named else f"signal {-code}"
            how = f"was killed by {name}"
            if name == "SIGKILL":
                how += " (often the kernel's out-of-memory killer)"
        else:
            how = f"exited with code {code}"
        raise WorkerError(f"{self._describe(worker)} {how}; the other workers were ended")

    def _report_hang(self, worker: int) -> NoReturn:
        raise WorkerError(
            f"{self._describe(worker)} made no progress for step_timeout = {self._timeout} s; "
            "the workers were ended"
        )

    def close(self) -> None:
        """End the workers within seconds, even if one hangs or ignores signals."""
        self._finalizer()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep `spawn` and `forkserver` from running the caller's script again in the child.

    What the child needs of the script is pickled by value. Without this, a script would need an
    `if __name__ == "__main__"` guard, and a notebook or `python -` could not start workers at all.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _merge(harvests: list[Harvest]) -> Harvest:
    """Join the workers' harvests; order by (step, environment) as one process would meet them."""
    finals = [final for harvest in harvests for final in harvest.finals]
    episodes = [episode for harvest in harvests for episode in harvest.episodes]
    finals.sort(key=lambda final: (final.step, final.env_index))
    episodes.sort(key=lambda item: (item[0], item[1].env_index))
    return Harvest(finals, episodes)


def _end_workers(conns: list[connection.Connection], processes: list[BaseProcess]) -> None:
    """Ask, then SIGTERM, then SIGKILL, with one deadline for all workers."""
    for conn in conns:
        with contextlib.suppress(OSError, ValueError):
            conn.send(("close",))
        conn.close()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for end in (BaseProcess.terminate, BaseProcess.kill):
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            end(process)
        deadline = time.monotonic() + 0.5
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
    conns.clear()
    processes.clear()
