"""On which processors workers sleep, and so wake up.

Linux wakes a process where it went to sleep, or on an idle processor. Where there are as many
workers as processors none is idle for the last of them, as the parent is still waking it. Two
workers that end a rollout on one processor would then begin the next one there, and share it for
milliseconds while the other processor has nothing to do. So each worker goes to a processor of its
own before it sleeps, and whoever sleeps where the parent runs is woken last. Nobody is bound to
anything: beside other programs Linux moves workers about as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence

__all__ = ["home_of", "num_processors", "rest_at", "this_processor", "waking_order"]

_getcpu: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None)


def num_processors() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def this_processor() -> int | None:
    """The one this thread runs on; None where the system does not say."""
    return None if _getcpu is None else _getcpu()


def home_of(worker: int, num_workers: int) -> int | None:
    """The processor this worker sleeps on; None where any will do, or where none can be chosen."""
    if not hasattr(os, "sched_setaffinity") or not 1 < num_processors() <= num_workers:
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[worker % len(allowed)]


def rest_at(home: int | None) -> None:
    """Move this thread to a processor, from which it may be moved again."""
    if home is None or this_processor() == home:
        return
    with contextlib.suppress(OSError):  # the processors of a container may change
        allowed = os.sched_getaffinity(0)
        if home in allowed:
            os.sched_setaffinity(0, {home})
            os.sched_setaffinity(0, allowed)


def waking_order(homes: Sequence[int | None]) -> list[int]:
    """Workers that sleep there, by number: last whoever sleeps where this thread runs."""
    here = this_processor()
    return sorted(range(len(homes)), key=lambda worker: homes[worker] == here)
