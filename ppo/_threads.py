"""How many threads torch uses inside one operation.

Threads that wait for one another spin. For small operations that costs more than they save, and
beside worker processes or other programs many times more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["threads"]


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads in this block; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
