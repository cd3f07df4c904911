"""Ctrl-C and SIGTERM as a wish to stop, granted where nothing is lost."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from typing_extensions import Self

__all__ = ["StopSignals"]


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a wish that the training loop reads between updates.

    Between updates the agent is whole, so that what is saved then can be gone on from. The second
    signal does what it would have done without this.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._pid = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(signum)
            if previous is not signal.SIG_IGN:
                self._previous[signum] = previous
                signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.__exit__(None, None, None)
        if os.getpid() != self._pid:  # a forked worker, which this is not meant for
            os.kill(os.getpid(), signum)
            return
        self.signum = signum
        # Not print: the signal may have come in the middle of one.
        text = "\nppo: stopping after this update; again to stop at once\n"
        os.write(2, text.encode())
