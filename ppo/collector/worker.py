"""The child's side: a process that owns some columns and does what the parent says.

First come the handles of a file for stacks and of one for large objects, then pickled commands:
`("attach", layout)` followed by a file handle, `("reset", row)`, `("bookmarks",)`, `("restore",
places, squash)`, `("run", first_step, num_steps, actor)`, `("steps", first_step, num_steps)`,
`("close",)`. Places and actor are spans of that file; see `read_object`.
Each is answered by `("ok", result)` or `("error", exception)`. During `steps` the parent acts:
single bytes go to and fro, one pair per step, and only the end of the rollout is answered.

A worker leads a process group of its own, in which all is that its environments start; whatever
ends it ends the group.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import connection, parent_process, reduction
from typing import Any

import cloudpickle
import numpy as np

from ppo.collector.acting import run_actor
from ppo.collector.buffers import Buffers, read_object
from ppo.collector.columns import Columns
from ppo.collector.making import open_env_columns
from ppo.collector.placement import rest_at
from ppo.collector.signals import FAULT, STEP, STEPPED, Patience, receive_byte
from ppo.errors import PPOError, WorkerError

__all__ = ["SHOW_STACK", "worker_main"]

SHOW_STACK = signal.SIGUSR2
"""On this signal a worker writes the stacks of its threads to its file, whatever it is doing."""

_PR_SET_PDEATHSIG = 1


def worker_main(
    conn: connection.Connection,
    inherited: Sequence[connection.Connection],
    payload: bytes,
    seeds: Sequence[np.random.Generator],
    first: int,
    spin: float,
    ended_by_parent: bool,
    max_restarts: int,
    home: int | None,
) -> None:
    """Run a worker until the parent closes the connection.

    Args:
        conn: This worker's end.
        inherited: The parent's ends, which a forked child holds too; they must be closed here,
            or no worker would ever see that the parent is gone.
        payload: The environment factories, pickled by value.
        seeds: Generator of episode seeds per column.
        first: Index of the first environment.
        spin: Seconds to poll for the next step before sleeping.
        ended_by_parent: The kernel may end this process with the thread that started it.
        max_restarts: How many times an environment that raised is made anew.
        home: The processor to sleep on; None for any.
    """
    for other in inherited:
        other.close()
    # Ctrl-C goes to the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the parent's handler
    with contextlib.suppress(PermissionError):  # it leads a group already
        os.setsid()
    if ended_by_parent and sys.platform == "linux":
        # Works even while an environment holds the interpreter's lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    guard = _start_guard() if sys.platform == "linux" else None
    with contextlib.suppress(EOFError, OSError):  # the parent is gone; met again below
        _show_stacks_in(reduction.recv_handle(conn))
        objects = reduction.recv_handle(conn)
        os.set_inheritable(objects, False)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    columns: Columns | None = None
    buffers: Buffers | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            factories = cloudpickle.loads(payload)
            columns = open_env_columns(factories, seeds, first, max_restarts=max_restarts)
            spaces = columns.observation_space, columns.action_space
            agents = columns.num_envs // len(factories)
            conn.send(("ok", (*spaces, agents)))
            rest_at(home)
            while True:
                command, *arguments = conn.recv()
                result: Any = None
                if command == "attach":
                    handle = reduction.recv_handle(conn)
                    buffers = Buffers(arguments[0], handle)
                    os.close(handle)
                    columns.attach(buffers)
                elif command == "reset":
                    result = columns.reset(*arguments)
                elif command == "bookmarks":
                    result = columns.bookmarks()
                elif command == "restore":
                    span, squash = arguments
                    result = columns.restore(read_object(objects, span), squash)
                elif command == "run":
                    assert buffers is not None
                    first_step, num_steps, span = arguments
                    actor = read_object(objects, span)
                    run_actor(columns, buffers, actor, num_steps, first_step)
                    result = columns.harvest()
                elif command == "steps":
                    _serve_steps(conn, columns, range(*arguments), spin)
                    result = columns.harvest()
                elif command == "close":
                    if guard is not None:  # the parent is there to end the group
                        os.kill(guard, signal.SIGKILL)
                        os.waitpid(guard, 0)
                    break
                conn.send(("ok", result))
                rest_at(home)
        except (PPOError, TypeError) as error:
            conn.send(("error", error))
        except (EOFError, OSError):
            raise
        except Exception:
            failure = WorkerError(f"a worker failed:\n\n{traceback.format_exc()}")
            conn.send(("error", failure))
        finally:
            if columns is not None:
                columns.close()


def _serve_steps(conn: connection.Connection, columns: Columns, steps: range, spin: float) -> None:
    fd, patience = conn.fileno(), Patience(spin)
    for t in steps:
        start = time.perf_counter()
        if receive_byte(conn, patience.seconds) != STEP:
            raise EOFError
        patience.learn(time.perf_counter() - start)
        try:
            columns.step(t)
        except Exception:
            os.write(fd, FAULT)
            raise
        os.write(fd, STEPPED)


def _die_with_parent() -> None:
    """Leave at once when the parent is gone, even while an environment hangs."""
    parent = parent_process()
    if parent is not None:
        # Other children of the parent may hold the sentinel open; they cannot stay its children.
        above = os.getppid()
        while not connection.wait([parent.sentinel], 1.0) and os.getppid() == above:
            pass
        os.killpg(os.getpid(), signal.SIGKILL)


def _start_guard() -> int:
    """Fork a process that ends this one's group once this one or the parent is gone.

    What environments have started would outlive a worker that is killed, hold its pipes open, and
    so hide its death. A worker that hangs in C would outlive a parent that is killed where the
    kernel does not end it: a fork server lives as long as one of its children does.
    """
    worker, above = os.getpid(), parent_process()
    parent = 0 if above is None or above.pid is None else above.pid
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")
        pid = os.fork()
    if pid:
        return pid
    try:
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        while os.getppid() == worker and _exists(parent):
            signal.sigtimedwait({signal.SIGTERM}, 1.0)
        os.killpg(worker, signal.SIGKILL)
    finally:
        os._exit(0)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _show_stacks_in(fd: int) -> None:
    """Write the stacks of all threads to a file, in a crash and on `SHOW_STACK`.

    Both work while an environment holds the interpreter's lock.
    """
    os.set_inheritable(fd, False)
    faulthandler.enable(fd)
    faulthandler.register(SHOW_STACK, fd)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SHOW_STACK})
