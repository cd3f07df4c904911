"""Stacked observations, each frame of them stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FrameStack", "newest", "to_tensor"]


class FrameStack:
    """A batch of stacks of `k` frames that lie once in memory, however many stacks they are in.

    It stands where a tensor `[*axes, k, ...]` would, and knows of a tensor's methods those that
    rows are chosen and moved with; `tensor` makes it.

    Args:
        frames: All frames, `[F, ...]`.
        index: Positions of the frames of each stack, oldest first, int64 `[*axes, k]`.

    Example:
        >>> stack = FrameStack(
        ...     torch.tensor([5.0, 6.0, 7.0]), torch.tensor([[0, 0], [0, 1], [1, 2]])
        ... )
        >>> stack[1:].tensor()
        tensor([[5., 6.],
                [6., 7.]])
    """

    def __init__(self, frames: Tensor, index: Tensor) -> None:
        self.frames = frames
        self.index = index

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it stands for."""
        return torch.Size((*self.index.shape, *self.frames.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frames."""
        return self.frames.dtype

    @property
    def device(self) -> torch.device:
        """Where the frames are."""
        return self.frames.device

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> FrameStack:
        return FrameStack(self.frames, self.index[rows])

    def flatten(self, start: int, end: int) -> FrameStack:
        """Merge leading axes."""
        return FrameStack(self.frames, self.index.flatten(start, end))

    def split(self, sizes: int | Sequence[int]) -> list[FrameStack]:
        """Cut the first axis."""
        return [FrameStack(self.frames, part) for part in self.index.split(sizes)]

    def detach(self) -> FrameStack:
        """Without history."""
        return FrameStack(self.frames.detach(), self.index)

    def to(self, device: torch.device | str) -> FrameStack:
        """On another device."""
        return FrameStack(self.frames.to(device), self.index.to(device))

    def tensor(self) -> Tensor:
        """The stacks as a tensor of memory of its own, `[*axes, k, ...]`."""
        return self.frames.index_select(0, self.index.flatten()).view(self.shape)

    def newest(self) -> Tensor:
        """The last frame of each stack, with its axis: `[*axes, 1, ...]`."""
        return self.frames[self.index[..., -1:]]


def to_tensor(leaf: Tensor | FrameStack) -> Tensor:
    """A tensor as it is, stacked frames as one."""
    return leaf.tensor() if isinstance(leaf, FrameStack) else leaf


def newest(leaf: Tensor | FrameStack) -> Tensor:
    """A tensor as it is, of stacked frames the last one."""
    return leaf.newest() if isinstance(leaf, FrameStack) else leaf
