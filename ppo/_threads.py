"""How many threads torch uses inside one operation.

Threads that wait for one another spin. For small operations that costs more than they save, and
beside worker processes or other programs many times more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["threads"]


def threads(count: int | None) -> contextlib.AbstractContextManager[None]:
    """Let torch use this many threads in this block; None leaves it as it is."""
    return contextlib.nullcontext() if count is None else _exactly(count)


@contextlib.contextmanager
def _exactly(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
