"""The arrays of one rollout, in ordinary or in anonymous shared memory, and objects in such."""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
import tempfile
from collections.abc import Iterable
from multiprocessing import reduction
from typing import Any

import cloudpickle
import numpy as np

from ppo.spaces import Leaf
from ppo.trees import leaves, map_tree

__all__ = ["Buffers", "Layout", "anonymous_file", "read_object", "write_objects"]

_ALIGNMENT = 64
_PART = 2**30  # systems read and write at most 2 GB at once


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes and types of a rollout's arrays.

    Attributes:
        num_steps: Capacity `T` in steps.
        num_envs: Columns `N`.
        obs: How observations are stored, a tree of `Leaf`.
        actions: How raw actions are stored, a tree of `Leaf`.
        noise_size: Noise values `k` per action; 0 if the policy takes none.
        mask_size: Entries `M` of an action mask; 0 if nothing can be masked.
        squash: Raw Box actions are from before a tanh.
        history: Observations that are kept from before the rollout.
        state_size: Numbers `K` in the policy's memory.
    """

    num_steps: int
    num_envs: int
    obs: Any
    actions: Any
    noise_size: int = 0
    mask_size: int = 0
    squash: bool = False
    history: int = 0
    state_size: int = 0

    def trees(self) -> dict[str, tuple[tuple[int, int], Any]]:
        """Leading axes and tree of `Leaf` by name.

        Observations, masks and states have one row more, for the last successor.
        """
        rows = (self.num_steps, self.num_envs)
        flag, number = np.dtype(np.bool_), np.dtype(np.float32)
        return {
            "frames": ((self.history + self.num_steps + 1, self.num_envs), self.obs),
            "actions": (rows, self.actions),
            "noise": (rows, Leaf((self.noise_size,), number)),
            "states": ((self.num_steps + 1, self.num_envs), Leaf((self.state_size,), number)),
            "masks": ((self.num_steps + 1, self.num_envs), Leaf((self.mask_size,), flag)),
            "rewards": (rows, Leaf((), number)),
            "terminated": (rows, Leaf((), flag)),
            "truncated": (rows, Leaf((), flag)),
            "valid": (rows, Leaf((), flag)),
            "progress": ((1, self.num_envs), Leaf((), np.dtype(np.int64))),
            "ages": ((1, self.num_envs), Leaf((), np.dtype(np.int64))),
            "started": ((1, self.num_envs), Leaf((), np.dtype(np.int64))),
            "episode_seeds": ((1, self.num_envs), Leaf((), np.dtype(np.int64))),
        }

    def fits(self, other: Layout) -> bool:
        """True if the arrays differ in the number of steps at most."""
        return self == other or dataclasses.replace(self, num_steps=other.num_steps) == other

    def num_bytes(self) -> int:
        """Size of the block of memory that holds all arrays."""
        return max(
            1,
            sum(
                _padded(math.prod(axes) * leaf.size * leaf.dtype.itemsize)
                for axes, tree in self.trees().values()
                for leaf in leaves(tree)
            ),
        )


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Buffers:
    """The arrays of a `Layout` over one block of memory.

    Row `t` of `obs` is what the action of row `t` was taken on; row `t + 1` is the observation
    the next action will be taken on (after a reset, where the episode ended). So it is for `masks`.

    Attributes:
        layout: Sizes and types.
        frames: `history` observations from before the rollout and then `obs`, a tree of
            `[history + T + 1, N, ...]`.
        obs: A tree of `[T + 1, N, ...]`.
        actions: Raw actions, a tree of `[T, N, ...]`.
        noise: `[T, N, k]`.
        masks: Legal actions `[T + 1, N, M]`.
        states: What the policy remembers before the first step, and behind each step, also where
            an episode ended with it, `[T + 1, N, K]`.
        rewards: `[T, N]`.
        terminated: `[T, N]`.
        truncated: `[T, N]`.
        valid: `[T, N]`.
        progress: Steps done in this rollout, per column `[N]`; shows which worker hangs. All are
            said to be done of columns whose turn is still to come.
        ages: Steps since the episodes began, at the first row, per column `[N]`.
        started: Row with the first observation of the current episode, per column `[N]`, below 0
            if it lies in an earlier rollout; one more than that, and so more than `progress`,
            while an environment is in `reset`.
        episode_seeds: Seed of the current episode, per column `[N]`.

    What a column is doing outlives the process that does it in these three.
    """

    frames: Any
    actions: Any
    noise: np.ndarray
    states: np.ndarray
    masks: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    progress: np.ndarray
    ages: np.ndarray
    started: np.ndarray
    episode_seeds: np.ndarray

    def __init__(self, layout: Layout, fd: int | None = None) -> None:
        """Lay the arrays out in the memory of file `fd`, or in private memory without one."""
        self.layout = layout
        size = layout.num_bytes()
        block: Any = mmap.mmap(fd, size) if fd is not None else np.zeros(size, np.uint8)
        end = 0

        def place(axes: tuple[int, int], leaf: Leaf) -> np.ndarray:
            nonlocal end
            array: np.ndarray = np.ndarray((*axes, *leaf.shape), leaf.dtype, block, end)
            end += _padded(array.nbytes)
            return array

        for name, (axes, tree) in layout.trees().items():
            setattr(self, name, map_tree(functools.partial(place, axes), tree))
        for name in ("progress", "ages", "started", "episode_seeds"):
            setattr(self, name, getattr(self, name)[0])
        if fd is None:
            self.valid[:] = True  # until it is known better; in a file it may be known already
        self.obs = map_tree(lambda frames: frames[layout.history :], self.frames)

    def begin(self) -> None:
        """Take note that a rollout begins: no step is done, no episode has ended."""
        self.progress[:] = 0
        self.valid[:] = True
        self.terminated[:] = self.truncated[:] = False

    def ended(self, rows: Any) -> np.ndarray:
        """Where an episode ended, or no transition was made, in these rows."""
        ended: np.ndarray = self.terminated[rows] | self.truncated[rows] | ~self.valid[rows]
        return ended

    def remembered(self, t: int, columns: slice = slice(None)) -> np.ndarray:
        """A copy of what the policy remembers when it acts in row `t`: nothing of old episodes."""
        states: np.ndarray = self.states[t, columns].copy()
        if t > 0:
            states[self.ended((t - 1, columns))] = 0.0
        return states


def anonymous_file(name: str, size: int) -> int:
    """Open a file of this size that no directory lists; returns its descriptor."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp(prefix=f"{name}-")
        os.unlink(path)
    os.ftruncate(fd, size)
    return fd


def write_objects(fd: int, objects: Iterable[Any]) -> list[tuple[int, int]]:
    """Pickle objects into a file, over what it held; returns where each begins and ends.

    Whoever shall read them is told where they are, which takes a few bytes: writing to a pipe waits
    for a reader once it is full, for ever if that one is stopped.
    """
    spans, end = [], 0
    for one in objects:
        start, pickled = end, _pickled(one)
        while end < start + len(pickled):
            end += os.pwrite(fd, pickled[end - start :][:_PART], end)
        spans.append((start, end))
    return spans


def _pickled(one: Any) -> Any:
    """An object as bytes, by the protocol that does not copy arrays in between.

    By value, and so several times slower, what is not this library's: whoever reads it need not
    know a class of a script, or of a cell that ran after it was started.
    """
    ours = type(one).__module__.partition(".")[0] == __name__.partition(".")[0]
    return reduction.ForkingPickler.dumps(one, 5) if ours else cloudpickle.dumps(one, 5)


def read_object(fd: int, span: tuple[int, int]) -> Any:
    """What `write_objects` has put there."""
    start, stop = span
    parts = [os.pread(fd, min(_PART, stop - at), at) for at in range(start, stop, _PART)]
    return reduction.ForkingPickler.loads(b"".join(parts))
