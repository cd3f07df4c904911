"""Acting and stepping in one process: columns that run a whole rollout by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Columns, Part
from ppo.collector.stacking import Stacks
from ppo.policies.protocol import Actor

__all__ = ["GROUP_SIZE", "run_actor"]

GROUP_SIZE = 32
"""Environments per call of an actor.

A matrix product rounds differently for different numbers of rows. Actors therefore always see the
same groups of environments, whoever owns them: a process that owns a part of a group computes the
group's full size, with zeros in the rows of the others. An actor's own `group_size` divides it;
one that is `row_wise` gets nothing but that part.
"""


class _Group:
    """Columns `own` of one group of environments, of which an actor sees the columns `seen`."""

    def __init__(
        self, buffers: Buffers, own: range, seen: range, actor: Any, num_steps: int
    ) -> None:
        layout, size = buffers.layout, len(seen)
        columns = slice(own.start, own.stop)
        self._rows = slice(own.start - seen.start, own.stop - seen.start)
        stacked = (layout.history + 1,) if layout.history else ()
        # Where all rows are its own, such an actor reads what environments have written.
        self._whole = hasattr(actor, "for_rollout") and len(own) == size and not stacked
        self._obs = np.zeros((size, *stacked, *layout.obs.shape), layout.obs.dtype)
        self._stacks = Stacks(buffers, columns) if stacked else None
        self._own_obs, self._given_obs = self._obs[self._rows], buffers.obs[:, columns]
        self._given_obs.flags.writeable = False
        noise = np.zeros((num_steps, size, layout.noise_size), np.float32)
        noise[:, self._rows] = buffers.noise[:num_steps, columns]
        self._actor = _of_rollout(actor, noise)
        self._actions = buffers.actions[:, columns]
        self._states = np.zeros((size, layout.state_size), np.float32)
        self._buffers, self._own, self._remembers = buffers, columns, layout.state_size > 0

    def act(self, t: int) -> None:
        """Write `actions[t]` of these columns, and `states[t + 1]` where there is a memory."""
        obs = self._given_obs[t]
        if not self._whole:
            self._own_obs[...] = obs if self._stacks is None else self._stacks.at(t)
            obs = self._obs
        if not self._remembers:
            self._actions[t] = self._actor(obs, t)[self._rows]
            return
        self._states[self._rows] = self._buffers.remembered(t, self._own)
        actions, states = self._actor(obs, t, self._states)
        self._actions[t] = actions[self._rows]
        self._buffers.states[t + 1, self._own] = states[self._rows]


def _of_rollout(actor: Any, noise: np.ndarray) -> Callable[..., Any]:
    """The function of observations, step `t` and states to what an actor returns of them."""
    if hasattr(actor, "for_rollout"):
        made: Callable[..., Any] = actor.for_rollout(noise)
        return made
    return lambda obs, t, *states: actor(obs, noise[t], *states)


def _groups(columns: Part, buffers: Buffers, actor: Any, num_steps: int) -> Iterator[_Group]:
    size = getattr(actor, "group_size", GROUP_SIZE)
    row_wise = getattr(actor, "row_wise", False)
    end = columns.first + columns.num_envs
    for start in range(columns.first // size * size, end, size):
        group = range(start, min(start + size, buffers.layout.num_envs))
        own = range(max(start, columns.first), min(group.stop, end))
        yield _Group(buffers, own, own if row_wise else group, actor, num_steps)


def run_actor(
    columns: Columns, buffers: Buffers, actor: Actor, num_steps: int, first_step: int = 0
) -> None:
    """Act and step, from row `first_step` to row `num_steps - 1`, one part after the other.

    What 32 environments consist of stays in the cache, what hundreds do does not.
    """
    parts = columns.parts(GROUP_SIZE)
    for part in parts[1:]:  # so that the least progress is where the work is
        buffers.progress[part.first : part.first + part.num_envs] = num_steps
    for part in parts:
        groups = list(_groups(part, buffers, actor, num_steps))
        buffers.progress[part.first : part.first + part.num_envs] = first_step
        for t in range(first_step, num_steps):
            for group in groups:
                group.act(t)
            part.step(t)
