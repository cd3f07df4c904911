"""Acting and stepping in one process: columns that run a whole rollout by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Columns, Part
from ppo.policies.protocol import Actor

__all__ = ["GROUP_SIZE", "run_actor"]

GROUP_SIZE = 32
"""Environments per call of an actor.

A matrix product rounds differently for different numbers of rows. Actors therefore always see the
same groups of environments, whoever owns them: a process that owns a part of a group computes the
group's full size, with zeros in the rows of the others. An actor that is `row_wise` gets nothing
but that part.
"""


class _Group:
    """The part of one group of environments that lies in `columns`."""

    def __init__(
        self, columns: Part, buffers: Buffers, start: int, num_steps: int, row_wise: bool
    ) -> None:
        layout = buffers.layout
        stop = min(start + GROUP_SIZE, layout.num_envs)
        own = slice(max(start, columns.first), min(stop, columns.first + columns.num_envs))
        if row_wise:
            start, stop = own.start, own.stop
        size = stop - start
        self._rows = slice(own.start - start, own.stop - start)
        self._obs = np.zeros((size, *layout.obs.shape), layout.obs.dtype)
        self._own_obs, self._given_obs = self._obs[self._rows], buffers.obs[:, own]
        self._noise = np.zeros((num_steps, size, layout.noise_size), np.float32)
        self._noise[:, self._rows] = buffers.noise[:num_steps, own]
        self._actions = buffers.actions[:, own]
        self._states = np.zeros((size, layout.state_size), np.float32)
        self._buffers, self._own, self._remembers = buffers, own, layout.state_size > 0

    def act(self, actor: Any, t: int) -> None:
        """Write `actions[t]` of these columns, and `states[t + 1]` where there is a memory."""
        self._own_obs[...] = self._given_obs[t]
        noise = self._noise[t]
        if not self._remembers:
            self._actions[t] = actor(self._obs, noise)[self._rows]
            return
        self._states[self._rows] = self._buffers.remembered(t, self._own)
        actions, states = actor(self._obs, noise, self._states)
        self._actions[t] = actions[self._rows]
        self._buffers.states[t + 1, self._own] = states[self._rows]


def _groups(columns: Part, buffers: Buffers, num_steps: int, row_wise: bool) -> Iterator[_Group]:
    first_group = columns.first // GROUP_SIZE * GROUP_SIZE
    for start in range(first_group, columns.first + columns.num_envs, GROUP_SIZE):
        yield _Group(columns, buffers, start, num_steps, row_wise)


def run_actor(
    columns: Columns, buffers: Buffers, actor: Actor, num_steps: int, first_step: int = 0
) -> None:
    """Act and step, from row `first_step` to row `num_steps - 1`, one part after the other.

    What 32 environments consist of stays in the cache, what hundreds do does not.
    """
    row_wise = getattr(actor, "row_wise", False)
    parts = columns.parts(GROUP_SIZE)
    for part in parts[1:]:  # so that the least progress is where the work is
        buffers.progress[part.first : part.first + part.num_envs] = num_steps
    for part in parts:
        groups = list(_groups(part, buffers, num_steps, row_wise))
        buffers.progress[part.first : part.first + part.num_envs] = first_step
        for t in range(first_step, num_steps):
            for group in groups:
                group.act(actor, t)
            part.step(t)
