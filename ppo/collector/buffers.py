"""The arrays of one rollout, in ordinary or in anonymous shared memory."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import tempfile
from typing import Any

import numpy as np

__all__ = ["Buffers", "Layout"]

_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes and types of a rollout's arrays.

    Attributes:
        num_steps: Capacity `T` in steps.
        num_envs: Columns `N`.
        obs_shape: Shape of one observation.
        obs_dtype: Storage type of observations.
        action_shape: Shape of one raw action.
        action_dtype: Type of raw actions.
        noise_size: Noise values `k` per action; 0 if the policy takes none.
    """

    num_steps: int
    num_envs: int
    obs_shape: tuple[int, ...]
    obs_dtype: np.dtype[Any]
    action_shape: tuple[int, ...]
    action_dtype: np.dtype[Any]
    noise_size: int

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type by name; observations have one row more, for the last successor."""
        rows = (self.num_steps, self.num_envs)
        flag = np.dtype(np.bool_)
        return {
            "obs": ((self.num_steps + 1, self.num_envs, *self.obs_shape), self.obs_dtype),
            "actions": ((*rows, *self.action_shape), self.action_dtype),
            "noise": ((*rows, self.noise_size), np.dtype(np.float32)),
            "rewards": (rows, np.dtype(np.float32)),
            "terminated": (rows, flag),
            "truncated": (rows, flag),
            "valid": (rows, flag),
            "progress": ((self.num_envs,), np.dtype(np.int64)),
        }

    def offsets(self) -> tuple[dict[str, int], int]:
        """Aligned byte offset of each array in one block, and the block's size."""
        offsets, end = {}, 0
        for name, (shape, dtype) in self.arrays().items():
            offsets[name] = end
            size = math.prod(shape) * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return offsets, max(end, 1)


class Buffers:
    """The arrays of a `Layout` over one block of memory.

    Row `t` of `obs` is what the action of row `t` was taken on; row `t + 1` is the observation
    the next action will be taken on (after a reset, where the episode ended).

    Attributes:
        layout: Sizes and types.
        obs: `[T + 1, N, ...]`.
        actions: Raw actions `[T, N, ...]`.
        noise: `[T, N, k]`.
        rewards: `[T, N]`.
        terminated: `[T, N]`.
        truncated: `[T, N]`.
        valid: `[T, N]`.
        progress: Steps done in this rollout, per column `[N]`; shows which worker hangs.
    """

    obs: np.ndarray
    actions: np.ndarray
    noise: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    progress: np.ndarray

    def __init__(self, layout: Layout, fd: int | None = None) -> None:
        """Lay the arrays out in the memory of file `fd`, or in private memory without one."""
        self.layout = layout
        offsets, size = layout.offsets()
        block: Any = mmap.mmap(fd, size) if fd is not None else np.zeros(size, np.uint8)
        for name, (shape, dtype) in layout.arrays().items():
            array: np.ndarray = np.ndarray(shape, dtype, block, offsets[name])
            setattr(self, name, array)

    @staticmethod
    def shared_file(layout: Layout) -> int:
        """Open an anonymous file of the right size that no directory lists; returns its fd."""
        size = layout.offsets()[1]
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("ppo-rollout", os.MFD_CLOEXEC)
        else:
            fd, path = tempfile.mkstemp(prefix="ppo-rollout-")
            os.unlink(path)
        os.ftruncate(fd, size)
        return fd
