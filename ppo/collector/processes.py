"""One worker process as the parent sees it: started, spoken to, asked how it died, ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import numpy as np

from ppo.collector.buffers import anonymous_file
from ppo.collector.placement import num_processors
from ppo.collector.worker import SHOW_STACK, worker_main

__all__ = [
    "StartMethod",
    "WorkerProcess",
    "end_workers",
    "fitting_number_of_workers",
    "start_context",
]

StartMethod = Literal["fork", "forkserver", "spawn"]

_CLOSE_SECONDS = 2.0
_TERMINATE_SECONDS = 0.5
_STACK_SECONDS = 1.0
_STACK_BYTES = 2**16
_BELOW_WORKER = re.compile(r"(in worker_main)\n.*", re.DOTALL)


def default_start_method() -> StartMethod:
    """`fork` on Linux, `spawn` elsewhere; see docs/decisions/0002-start-method.rst."""
    return "fork" if sys.platform == "linux" else "spawn"


def start_context(start_method: StartMethod | None) -> Any:
    """How processes are started; None for the platform's default."""
    context = multiprocessing.get_context(start_method or default_start_method())
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["ppo.collector.worker"])  # imported once, not by each
    return context


def fitting_number_of_workers(num_envs: int, start_method: StartMethod | None = None) -> int:
    """How many workers are surely no slower than none, for a policy that acts inside of them.

    One per processor, each with at least two environments; none where starting them takes seconds
    (without `fork`), or where this process may not have children.
    """
    method = start_method or default_start_method()
    if method != "fork" or multiprocessing.current_process().daemon:
        return 0
    number = min(num_processors(), num_envs // 2)
    return number if number > 1 else 0


class WorkerProcess:
    """A worker, its connection, and a file that its stacks are written to.

    Args:
        context: How processes are started.
        index: Number of the worker.
        siblings: The other workers, whose connections a fork must not keep.
        payload: The environment factories, pickled by value.
        seeds: Generator of episode seeds per column.
        first: Index of its first column.
        spin: Seconds to poll for the next step before sleeping.
        max_restarts: How many times an environment that raised is made anew.
        home: The processor it sleeps on; None for any.
    """

    def __init__(
        self,
        context: Any,
        index: int,
        siblings: Sequence[WorkerProcess],
        payload: bytes,
        seeds: Sequence[np.random.Generator],
        first: int,
        spin: float,
        max_restarts: int,
        home: int | None,
    ) -> None:
        self.home = home
        self._forked = context.get_start_method() == "fork"
        self.conn, self._theirs = context.Pipe()
        conns = [self.conn, *(one.conn for one in siblings if not one.conn.closed)]
        self.process: BaseProcess = context.Process(
            target=worker_main,
            name=f"ppo-worker-{index}",
            args=(
                self._theirs,
                conns if self._forked else [],
                payload,
                list(seeds),
                first,
                spin,
                threading.current_thread() is threading.main_thread(),
                max_restarts,
                home,
            ),
        )
        self._stacks: int | None = None

    def start(self, objects: int) -> None:
        """Start the process; it answers with its spaces.

        Args:
            objects: The file in which it finds what is too large to be sent.
        """
        self._stacks = anonymous_file("ppo-stacks", 0)
        # A fork has the script that runs, and need not read it.
        main = contextlib.nullcontext() if self._forked else _without_main()
        with warnings.catch_warnings(), main:
            # Forking beside torch's idle threads is what torch's own data loaders do.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            self.process.start()
        self._theirs.close()
        self.send_handle(self._stacks)
        self.send_handle(objects)

    @property
    def sentinel(self) -> int:
        """Ready once the process is gone."""
        return self.process.sentinel

    def send(self, *message: Any) -> None:
        """Send a command, a short one, since one that hangs reads none.

        Who is dead is met when an answer is awaited.
        """
        with contextlib.suppress(OSError):
            self.conn.send(message)

    def send_handle(self, fd: int) -> None:
        """Send an open file."""
        with contextlib.suppress(OSError):
            reduction.send_handle(self.conn, fd, self.process.pid)

    def death(self) -> str:
        """How a dead process died."""
        self.process.join(1.0)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exited with code {code}"
        named = -code in {int(known) for known in signal.Signals}
        name = signal.Signals(-code).name if named else f"signal {-code}"
        hint = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"

    def stack(self) -> str:
        """The stacks it has written, crashing or when told to."""
        if self._stacks is None:
            return ""
        text = os.pread(self._stacks, _STACK_BYTES, 0).decode(errors="replace")
        threads = [thread for thread in text.split("\n\n") if "_die_with_parent" not in thread]
        # Below the worker's own frames a fork shows those of its parent.
        shown = [_BELOW_WORKER.sub(r"\1", thread.strip()) for thread in threads]
        return "".join(f"\n\n{thread}" for thread in shown if thread)

    def stack_now(self) -> str:
        """Where a process that hangs is."""
        assert self.process.pid is not None
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, SHOW_STACK)
        deadline = time.monotonic() + _STACK_SECONDS
        seen, stack = "", self.stack()
        while time.monotonic() < deadline and not (stack and stack == seen):
            time.sleep(0.05)
            seen, stack = stack, self.stack()
        return stack or "; it shows no stack: it is stopped, or the system keeps it"

    def kill(self) -> None:
        """End the process for certain, with all that it has started."""
        pid = self.process.pid
        if pid is not None:
            self.process.kill()  # in case it does not lead its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def release(self) -> None:
        """Reap a killed process and close what it was spoken to with."""
        if self.process.pid is not None:
            self.process.join(1.0)
        self.conn.close()
        self._theirs.close()
        if self._stacks is not None:
            os.close(self._stacks)
            self._stacks = None


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


def end_workers(
    workers: list[WorkerProcess], files: list[int], seconds: float = _CLOSE_SECONDS
) -> None:
    """Ask, then SIGTERM, then SIGKILL, with one deadline for all workers; close the files."""
    started = [worker for worker in workers if worker.process.pid is not None]
    try:
        for worker in started:
            if not worker.conn.closed:
                os.set_blocking(worker.conn.fileno(), False)  # that of one that hangs may be full
                worker.send("close")
        for worker in _running_after(seconds, started):
            worker.process.terminate()
        _running_after(_TERMINATE_SECONDS, started)
    finally:  # also if Ctrl-C is pressed again meanwhile
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.release()
        workers.clear()
        while files:
            os.close(files.pop())


def _running_after(seconds: float, workers: Sequence[WorkerProcess]) -> list[WorkerProcess]:
    """Wait for workers to leave; returns those that have not in time."""
    deadline = time.monotonic() + seconds
    waiting: dict[Any, WorkerProcess] = {worker.sentinel: worker for worker in workers}
    while waiting:
        gone = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not gone:
            break
        for sentinel in gone:
            del waiting[sentinel]
    return list(waiting.values())
