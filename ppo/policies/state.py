"""What a policy remembers of the episodes it is in: its memory, and the frames it stacks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ppo.trees import leaves, map_tree

__all__ = ["PolicyState", "frame_stack_of", "state_size_of"]


def state_size_of(policy: object) -> int:
    """Numbers `K` in the memory of a policy; 0 if it has none."""
    return int(getattr(policy, "state_size", 0))


def frame_stack_of(policy: object) -> int:
    """Latest observations that a policy sees at once."""
    return int(getattr(policy, "frame_stack", 1))


@dataclasses.dataclass
class PolicyState:
    """Memory and latest frames of a policy, for `N` episodes side by side.

    Attributes:
        memory: Its recurrent state, `[N, K]`; zeros at the beginning of an episode.
        frames: Its latest observations, oldest first, a tree of `[N, k, ...]`; None before the
            first one, and for a policy that stacks none.
        age: Steps since the episode began, `[N]`.
    """

    memory: np.ndarray
    frames: Any
    age: np.ndarray

    @classmethod
    def begin(cls, policy: object, num_rows: int) -> PolicyState:
        """The state at the beginning of `num_rows` episodes."""
        memory = np.zeros((num_rows, state_size_of(policy)), np.float32)
        return cls(memory, None, np.zeros(num_rows, np.int64))

    def __len__(self) -> int:
        return len(self.age)

    def see(self, obs: Any, frame_stack: int) -> Any:
        """Take in observations `[N, ...]`; returns what the policy gets, `[N, k, ...]` if k > 1."""
        if frame_stack == 1:
            return obs
        fresh = self.age == 0
        if self.frames is None:
            self.frames = map_tree(lambda rows: np.stack([rows] * frame_stack, 1), obs)
        for stack, rows in zip(leaves(self.frames), leaves(obs), strict=True):
            stack[:, :-1] = stack[:, 1:].copy()
            stack[:, -1] = rows
            stack[fresh] = rows[fresh, None]
        return self.frames

    def after(self, ended: np.ndarray) -> None:
        """Take note of a step; where an episode `ended` `[N]`, forget it."""
        self.age += 1
        self.reset(ended)

    def reset(self, ended: np.ndarray) -> None:
        """Forget the episodes that `ended` `[N]`."""
        if ended.any():
            self.memory[ended] = 0.0
            self.age[ended] = 0

    def copy(self) -> PolicyState:
        """The same in memory of its own."""
        frames = None if self.frames is None else map_tree(np.copy, self.frames)
        return PolicyState(self.memory.copy(), frames, self.age.copy())
