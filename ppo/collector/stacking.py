"""Where the frames of stacked observations lie in a rollout that holds each of them once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ppo.collector.buffers import Buffers
from ppo.frames import FrameStack
from ppo.trees import map_tree

__all__ = ["FrameIndex", "Stacks"]


class FrameIndex:
    """Positions of the frames of every row's stack.

    A stack reaches back as far as its episode does; before, the episode's first frame is repeated.

    Args:
        age: Steps since the episode began, for the first row, `[N]`.
        ended: An episode ended, or no transition was made, in a row, bool `[T, N]`.
        frame_stack: Frames per stack `k`.

    Attributes:
        history: Frames needed from before the first row, `k - 1`.
    """

    def __init__(self, age: np.ndarray, ended: np.ndarray, frame_stack: int) -> None:
        self.history = frame_stack - 1
        ages = [age]
        for over in ended:
            ages.append(np.where(over, 0, ages[-1] + 1))
        back = np.arange(frame_stack)[::-1]
        num_envs = len(age)
        steps = np.arange(len(ages))[:, None, None]
        rows = self.history + steps - np.minimum(back, np.stack(ages)[:, :, None])
        # [T + 1, N, k], into frames whose first two axes are merged.
        self._index = rows * num_envs + np.arange(num_envs)[:, None]
        self._ages = ages

    def stacks(self, frames: Any, copied: Callable[[np.ndarray], Tensor]) -> Any:
        """Stacks of all rows, a tree of `[T, N, k, ...]`, of frames `[k - 1 + T + 1, N, ...]`.

        Args:
            frames: Arrays that may be longer.
            copied: Makes a tensor of an array.
        """
        index = copied(self._index[:-1])
        num_frames = self.history + len(self._index) - 1
        return map_tree(
            lambda array: FrameStack(copied(array[:num_frames]).flatten(0, 1), index), frames
        )

    def last(self, frames: Any) -> Any:
        """Stacks at the observations after the last row, a tree of `[N, k, ...]`."""
        index = self._index[-1]
        return map_tree(lambda array: array.reshape(-1, *array.shape[2:])[index], frames)

    def successor(self, frames: Any, step: int, env_index: int, obs: Any) -> Any:
        """The stack at an observation that follows a row and is in none, a tree of `[k, ...]`."""
        ages = self._ages[step][env_index]
        back = np.minimum(np.arange(1, self.history + 1)[::-1], ages + 1)
        rows = self.history + step + 1 - back

        def stack(array: np.ndarray, last: np.ndarray) -> np.ndarray:
            return np.concatenate([array[rows, env_index], last[None]])

        return map_tree(stack, frames, obs)


class Stacks:
    """The latest frames of some columns, row after row.

    As `FrameIndex` has them for a whole rollout, but while it is collected.
    """

    def __init__(self, buffers: Buffers, columns: slice) -> None:
        self._buffers, self._columns, self._row = buffers, columns, 0
        self._back = np.arange(buffers.layout.history + 1)[::-1]
        self._numbers = np.arange(buffers.layout.num_envs)[columns, None]
        self._ages = buffers.ages[columns]

    def ages(self, t: int) -> np.ndarray:
        """Steps since the episodes began, at row `t`, not before the last one asked for; `[n]`."""
        while self._row < t:
            ended = self._buffers.ended((self._row, self._columns))
            self._ages = np.where(ended, 0, self._ages + 1)
            self._row += 1
        return self._ages

    def at(self, t: int) -> Any:
        """The stacks that are acted on in row `t`, a tree of `[n, k, ...]`."""
        rows = len(self._back) - 1 + t - np.minimum(self._back, self.ages(t)[:, None])
        return map_tree(lambda frames: frames[rows, self._numbers], self._buffers.frames)
