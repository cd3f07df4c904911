"""`CollectorState`: all that a collector carries from one rollout to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from typing_extensions import Self

from ppo.collector.buffers import Buffers
from ppo.collector.replay import Bookmark, Place, digest, stream_at
from ppo.policies.state import PolicyState, frame_stack_of, state_size_of
from ppo.trees import leaves, leaves_with_paths, map_tree

__all__ = ["CollectorState"]


@dataclasses.dataclass(frozen=True)
class CollectorState:
    """Where every column is, and where the random streams are, between two rollouts.

    Attributes:
        bookmarks: One per column `N`.
        actions: Raw actions since the reset of each column, trees of `[L, ...]`; None for none.
        noise: States of the generators of action noise, one per column.
        generator: State of the generator of policies that draw by themselves.
        squash: Raw Box actions are from before a tanh.
        frames: What the next actions are taken on and `H` observations before it, a tree of
            `[H + 1, N, ...]`.
        masks: Legal actions there, `[N, M]`.
        policy: What the policy remembers.
    """

    bookmarks: tuple[Bookmark, ...]
    actions: tuple[Any, ...]
    noise: tuple[Mapping[str, Any], ...]
    generator: np.ndarray
    squash: bool
    frames: Any
    masks: np.ndarray
    policy: PolicyState

    def places(self) -> list[Place]:
        """Where each column is."""
        obs = map_tree(lambda array: array[-1], self.frames)
        return [
            Place(mark, actions, digest(map_tree(lambda rows, index=index: rows[index], obs)))
            for index, (mark, actions) in enumerate(zip(self.bookmarks, self.actions, strict=True))
        ]

    def new_episodes(self, playing: np.ndarray) -> str:
        """Why the columns that are not `playing` `[N]` begin new episodes, for a warning."""
        (lost,) = np.nonzero(~playing)
        kind = self.bookmarks[lost[0]].kind
        why = (
            "did not come out where it was when its episode was played again, so it takes "
            "randomness from elsewhere than the seed of reset, or is not what it was"
            if self.bookmarks[lost[0]].seed is not None
            else "cannot be put into the middle of its episodes"
        )
        return (
            f"{len(lost)} of {len(playing)} environments begin new episodes: {kind} {why}. "
            "Training goes on as well as before, but its numbers are not those of the "
            "uninterrupted run."
        )

    def has_leaves(self, obs: Any, actions: Any, mask_size: int) -> bool:
        """Whether observations and actions are stored as these trees of `Leaf` say."""
        logs = [log for log in self.actions if log is not None]
        return (
            _stored_as(obs, self.frames, 2)
            and all(_stored_as(actions, log, 1) for log in logs)
            and self.masks.shape[1] == mask_size
        )

    def to_plain(self) -> dict[str, Any]:
        """The same in dictionaries, tuples, numbers and arrays (see `ppo.packing`)."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Not `asdict`: what an environment gave stays as it is.
        plain["bookmarks"] = tuple(dict(vars(mark)) for mark in self.bookmarks)
        plain["policy"] = dict(vars(self.policy))
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_plain` made.

        Raises:
            ValueError: It makes no sense; other errors where its parts do not.
        """
        marks = tuple(Bookmark(**mark) for mark in plain["bookmarks"])
        state = cls(**{**plain, "bookmarks": marks, "policy": PolicyState(**plain["policy"])})
        state._check()
        return state

    def _check(self) -> None:
        count = len(self.bookmarks)
        _check(count > 0 and len(self.noise) == len(self.actions) == count, "number of columns")
        for mark, noise, actions in zip(self.bookmarks, self.noise, self.actions, strict=True):
            _check(type(mark.kind) is str, "kind of environment")
            _check(mark.seed is None or _is_number(mark.seed, 2**31), "seed of an episode")
            _check(type(mark.episode_return) is float, "return of an episode")
            _check(_is_number(mark.episode_length, 2**62), "length of an episode")
            played = [len(leaf) for leaf in leaves(actions) if leaf is not None]
            _check(set(played) <= {mark.episode_length}, "number of actions")
            stream_at(mark.seeds)
            stream_at(noise)
        torch.Generator().set_state(torch.from_numpy(self.generator))
        _check(type(self.squash) is bool, "flag for squashed actions")
        rows = [leaf.shape[:2] for leaf in leaves(self.frames)]
        _check(len(set(rows)) == 1 and rows[0][0] > 0 and rows[0][1] == count, "frames")
        _check(all(np.isfinite(leaf).all() for leaf in leaves(self.frames)), "frames")
        _check(self.masks.dtype == np.bool_ and self.masks.shape[:1] == (count,), "action masks")
        _check(not self.masks.size or bool(self.masks.any(1).all()), "action masks")
        policy = self.policy
        _check(policy.age.dtype == np.int64 and policy.age.shape == (count,), "age of the memory")
        _check(bool((policy.age >= 0).all()), "age of the memory")
        _check(policy.memory.dtype == np.float32 and policy.memory.ndim == 2, "memory")
        stacks = [] if policy.frames is None else leaves(policy.frames)
        _check(all(len(array) == count for array in [policy.memory, *stacks]), "memory")
        _check(all(np.isfinite(array).all() for array in [policy.memory, *stacks]), "memory")

    def put(self, columns: np.ndarray, buffers: Buffers) -> None:
        """Write what the next actions are taken on, for the chosen columns bool `[N]`."""
        first = buffers.layout.history
        for old, new in zip(leaves(self.frames), leaves(buffers.frames), strict=True):
            kept = min(len(old), first + 1)
            new[first + 1 - kept : first + 1, columns] = old[-kept:, columns]
        buffers.masks[0, columns] = self.masks[columns]

    def policy_state(self, columns: np.ndarray, policy: object) -> PolicyState:
        """What a policy remembers of the chosen columns; nothing if it is of another kind."""
        known = self.policy.copy()
        stack = 1 if known.frames is None else leaves(known.frames)[0].shape[1]
        if (known.memory.shape[1], stack) != (state_size_of(policy), frame_stack_of(policy)):
            return PolicyState.begin(policy, len(columns))
        known.reset(~columns)
        return known


def _stored_as(wanted: Any, arrays: Any, axes: int) -> bool:
    ours = [(path, leaf.shape, leaf.dtype) for path, leaf in leaves_with_paths(wanted)]
    theirs = [(path, leaf.shape[axes:], leaf.dtype) for path, leaf in leaves_with_paths(arrays)]
    return ours == theirs


def _is_number(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"the {what} of the running episodes makes no sense")
