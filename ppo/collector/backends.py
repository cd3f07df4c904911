"""Who steps the environments: this process, or a pool of worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium

from ppo.collector.acting import run_actor
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.columns import Columns, Harvest
from ppo.collector.replay import Bookmark, Place
from ppo.policies.protocol import Actor

__all__ = ["Backend", "InProcess"]


class Backend(Protocol):
    """All columns of a rollout, wherever they are stepped."""

    num_envs: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]

    def attach(self, layout: Layout) -> Buffers:
        """Make the arrays of a rollout; they are written to from now on."""

    def bookmarks(self) -> list[Bookmark]:
        """The place of every column in its episode."""

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Go to these places, before the first `reset`; says which columns got there."""

    def reset(self) -> list[bool]:
        """Start the first episodes; says which columns give action masks."""

    def run(self, actor: Actor, num_steps: int) -> Harvest:
        """Collect a whole rollout with the actor, where the environments are."""

    def begin(self, num_steps: int) -> None:
        """Announce a rollout in which the caller acts: `step` follows that many times."""

    def step(self, t: int) -> None:
        """Take `actions[t]` in all columns; return when row `t` is complete."""

    def harvest(self) -> Harvest:
        """End the rollout begun by `begin`."""

    def close(self) -> None:
        """Release everything that is ours."""


class InProcess:
    """Columns stepped in this process."""

    def __init__(self, columns: Columns) -> None:
        self.num_envs = columns.num_envs
        self.observation_space = columns.observation_space
        self.action_space = columns.action_space
        self._columns = columns

    def attach(self, layout: Layout) -> Buffers:
        """Make the arrays of a rollout in private memory."""
        self._buffers = Buffers(layout)
        self._columns.attach(self._buffers)
        return self._buffers

    def bookmarks(self) -> list[Bookmark]:
        """The place of every column in its episode."""
        return self._columns.bookmarks()

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Go to these places; says which columns got there."""
        return self._columns.restore(places, squash)

    def reset(self) -> list[bool]:
        """Start the first episodes; says which columns give action masks."""
        return self._columns.reset()

    def run(self, actor: Actor, num_steps: int) -> Harvest:
        """Collect a whole rollout with the actor."""
        run_actor(self._columns, self._buffers, actor, num_steps)
        return self._columns.harvest()

    def begin(self, num_steps: int) -> None:
        """Nothing to announce."""

    def step(self, t: int) -> None:
        """Take `actions[t]` in all columns."""
        self._columns.step(t)

    def harvest(self) -> Harvest:
        """End the rollout."""
        return self._columns.harvest()

    def close(self) -> None:
        """Close the environments that are ours."""
        self._columns.close()
