"""The columns of a rollout, and what they leave besides rows; see the modules that make them.

Everything that touches an episode boundary is theirs: who resets, what the true successor was, what
an episode returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.replay import Bookmark, Place
from ppo.rollout import Episode
from ppo.trees import map_tree

__all__ = [
    "Columns",
    "Final",
    "Harvest",
    "Part",
    "Restart",
    "draw_seed",
    "give_up_row",
    "give_up_rows",
]


class Final(NamedTuple):
    """The successor observation of a truncated step, which no row of the rollout holds."""

    step: int
    env_index: int
    obs: Any


class Restart(NamedTuple):
    """An environment, or a whole worker, that was replaced, and the fault it was replaced for."""

    step: int
    env_index: int
    fault: str


class Harvest(NamedTuple):
    """What a rollout leaves besides its rows."""

    finals: list[Final]
    episodes: list[tuple[int, Episode]]  # with the step they ended at
    restarts: Sequence[Restart] = ()

    @classmethod
    def joined(cls, harvests: Sequence[Harvest]) -> Harvest:
        """Those of several processes, in the order (step, environment) of a single one."""
        finals = [final for harvest in harvests for final in harvest.finals]
        episodes = [episode for harvest in harvests for episode in harvest.episodes]
        restarts = [restart for harvest in harvests for restart in harvest.restarts]
        finals.sort(key=lambda final: (final.step, final.env_index))
        episodes.sort(key=lambda item: (item[0], item[1].env_index))
        restarts.sort(key=lambda restart: (restart.step, restart.env_index))
        return cls(finals, episodes, restarts)


class Part(NamedTuple):
    """Some columns that can be stepped by themselves."""

    first: int
    num_envs: int
    step: Callable[[int], None]


class Columns(Protocol):
    """Some columns `[first, first + num_envs)` of a rollout and the environments behind them."""

    first: int
    num_envs: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]

    def attach(self, buffers: Buffers) -> None:
        """Write into these arrays from now on."""

    def bookmarks(self) -> list[Bookmark]:
        """The place of every column in its episode."""

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Go to these places, before the first `reset`; says which columns got there.

        `squash`: raw Box actions are from before a tanh.
        """

    def reset(self) -> list[bool]:
        """Start the first episodes; their observations go to `obs[0]`, their masks to `masks[0]`.

        Columns that are in an episode after `restore` stay there, and write nothing. Returns for
        every column whether its environment gives action masks.
        """

    def step(self, t: int) -> None:
        """Take `actions[t]`; write row `t`, `obs[t + 1]` and `masks[t + 1]`.

        `Buffers.begin` comes before the first time that a row is written: of ends, only those that
        are there may be.
        """

    def parts(self, size: int) -> Sequence[Part]:
        """All columns in order, cut at multiples of `size` where each of them goes its own way.

        One part may be rows ahead of another.
        """

    def harvest(self) -> Harvest:
        """Hand over what has gathered since the last call."""

    def close(self) -> None:
        """Close the environments that are ours."""


def draw_seed(rng: np.random.Generator) -> int:
    """A seed for `reset`, below 2**31 as some environments demand."""
    return int(rng.integers(2**31 - 1))


def give_up_row(buffers: Buffers, t: int, env_index: int) -> list[Final]:
    """Make a row no transition, as what came of its action is not known.

    If its episode was going on, the row before becomes a truncation: its true successor is the
    observation the lost action was taken on, which is returned. A first row has none before it
    here; the rollout before ended with that very observation.
    """
    here = t, env_index
    buffers.valid[here] = buffers.terminated[here] = buffers.truncated[here] = False
    buffers.rewards[here] = 0.0
    if t == 0 or buffers.ended((t - 1, env_index)):
        return []
    buffers.truncated[t - 1, env_index] = True
    return [Final(t - 1, env_index, map_tree(lambda rows: rows[here].copy(), buffers.obs))]


def give_up_rows(
    buffers: Buffers, t: int, share: np.ndarray, finals: Sequence[Final]
) -> list[Final]:
    """Give up row `t` of these columns, and earlier ones that end without a known successor."""
    known = {(final.step, final.env_index) for final in finals}
    found: list[Final] = []
    for index in map(int, share):
        cut = buffers.truncated[:t, index] & ~buffers.terminated[:t, index]
        for step in [*map(int, np.flatnonzero(cut)), t]:
            if (step, index) not in known:
                found += give_up_row(buffers, step, index)
    return found
