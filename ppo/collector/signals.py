"""One-byte signals over a pipe: poll briefly, then sleep.

A wake-up from sleep costs more than stepping a light environment, so both sides poll for a moment
first and give the processor away between polls. Nothing is read from shared memory to
synchronise: the system calls order the memory accesses on every architecture.
"""

from __future__ import annotations

import os
import select
import time
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["FAULT", "STEP", "STEPPED", "Patience", "poll", "receive_byte"]

STEP, STEPPED, FAULT = b"s", b".", b"!"

_give_way = getattr(os, "sched_yield", lambda: time.sleep(0))


class Patience:
    """How long to poll: not at all once a wait was far longer than polling may last.

    Whoever polls for what takes milliseconds takes the processor from those who work on it.

    Args:
        spin: Seconds to poll where waits are brief.

    Attributes:
        seconds: To poll next time.
    """

    def __init__(self, spin: float) -> None:
        self._spin = self.seconds = spin

    def learn(self, waited: float) -> None:
        """Take note of how many seconds a wait took."""
        # Sleeping makes a brief one longer.
        self.seconds = self._spin if waited < 2.0 * self._spin else 0.0


def receive_byte(
    conn: Connection, spin: float, *, sentinel: int | None = None, timeout: float | None = None
) -> bytes:
    """Wait for one byte.

    Args:
        conn: Connection to read from.
        spin: Seconds to poll before sleeping.
        sentinel: Process to watch meanwhile.
        timeout: Seconds to wait at most; None for no limit.

    Returns:
        The byte, or `b""` if the other side is gone.

    Raises:
        TimeoutError: Nothing came in time.
    """
    fd = conn.fileno()
    if spin > 0.0 and not poll(conn, spin):
        spin = 0.0
    if spin == 0.0:
        sources: list[Any] = [conn] if sentinel is None else [conn, sentinel]
        ready = wait(sources, timeout)
        if not ready:
            raise TimeoutError
        if conn not in ready:
            return b""
    try:
        return os.read(fd, 1)
    except ConnectionResetError:
        return b""


def poll(conn: Connection, seconds: float) -> bool:
    """Whether something can be read within so many seconds, without sleeping."""
    poller = select.poll()
    poller.register(conn.fileno(), select.POLLIN)
    deadline = time.perf_counter() + seconds
    while not poller.poll(0):
        if time.perf_counter() > deadline:
            return False
        _give_way()
    return True
