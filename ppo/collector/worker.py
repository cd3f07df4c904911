"""The child's side: a process that owns some columns and does what the parent says.

Commands arrive pickled: `("attach", layout)` followed by a file handle, `("reset",)`,
`("bookmarks",)`, `("restore", bookmarks, actions, digests, squash)`,
`("run", actor, num_steps)`, `("steps", num_steps)`, `("close",)`. Each is answered by
`("ok", result)` or `("error", exception)`. During `steps` the parent acts: single bytes go to and
fro, one pair per step, and only the end of the rollout is answered.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import connection, parent_process, reduction
from typing import Any

import cloudpickle
import numpy as np

from ppo.collector.acting import run_actor
from ppo.collector.buffers import Buffers
from ppo.collector.columns import EnvColumns
from ppo.collector.signals import FAULT, STEP, STEPPED, receive_byte
from ppo.errors import PPOError, WorkerError

__all__ = ["worker_main"]

_PR_SET_PDEATHSIG = 1


def worker_main(
    conn: connection.Connection,
    inherited: Sequence[connection.Connection],
    payload: bytes,
    seeds: Sequence[np.random.Generator],
    first: int,
    spin: float,
    ended_by_parent: bool,
) -> None:
    """Run a worker until the parent closes the connection.

    Args:
        conn: This worker's end.
        inherited: The parent's ends, which a forked child holds too; they must be closed here,
            or no worker would ever see that the parent is gone.
        payload: The environment factories, pickled by value.
        seeds: Generator of episode seeds per column.
        first: Index of the first column.
        spin: Seconds to poll for the next step before sleeping.
        ended_by_parent: The kernel may end this process with the thread that started it.
    """
    for other in inherited:
        other.close()
    # Ctrl-C goes to the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the parent's handler
    if ended_by_parent and sys.platform == "linux":
        # Works even while an environment holds the interpreter's lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    columns: EnvColumns | None = None
    buffers: Buffers | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            columns = EnvColumns(cloudpickle.loads(payload), seeds, first)
            conn.send(("ok", (columns.observation_space, columns.action_space)))
            while True:
                command, *arguments = conn.recv()
                result: Any = None
                if command == "attach":
                    handle = reduction.recv_handle(conn)
                    buffers = Buffers(arguments[0], handle)
                    os.close(handle)
                    columns.attach(buffers)
                elif command == "reset":
                    result = columns.reset()
                elif command == "bookmarks":
                    result = columns.bookmarks()
                elif command == "restore":
                    result = columns.restore(*arguments)
                elif command == "run":
                    assert buffers is not None
                    run_actor(columns, buffers, arguments[0], arguments[1])
                    result = columns.harvest()
                elif command == "steps":
                    _serve_steps(conn, columns, arguments[0], spin)
                    result = columns.harvest()
                elif command == "close":
                    break
                conn.send(("ok", result))
        except (PPOError, TypeError) as error:
            conn.send(("error", error))
        except (EOFError, OSError):
            raise
        except Exception:
            conn.send(("error", WorkerError(f"a worker failed:\n\n{traceback.format_exc()}")))
        finally:
            if columns is not None:
                columns.close()


def _serve_steps(
    conn: connection.Connection, columns: EnvColumns, num_steps: int, spin: float
) -> None:
    fd = conn.fileno()
    for t in range(num_steps):
        if receive_byte(conn, spin) != STEP:
            raise EOFError
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
        os._exit(1)
