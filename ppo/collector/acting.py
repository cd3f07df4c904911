"""Acting and stepping in one process: columns that run a whole rollout by themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Columns
from ppo.policies.protocol import Actor

__all__ = ["GROUP_SIZE", "run_actor"]

GROUP_SIZE = 32
"""Environments per call of an actor.

A matrix product rounds differently for different numbers of rows. Actors therefore always see the
same groups of environments, whoever owns them: a process that owns a part of a group computes the
group's full size, with zeros in the rows of the others.
"""


class _Group:
    """The part of one group of environments that lies in `columns`."""

    def __init__(self, columns: Columns, buffers: Buffers, start: int) -> None:
        layout = buffers.layout
        size = min(GROUP_SIZE, layout.num_envs - start)
        first = max(start, columns.first)
        stop = min(start + size, columns.first + columns.num_envs)
        self.own = slice(first, stop)
        self.rows = slice(first - start, stop - start)
        self.obs = np.zeros((size, *layout.obs.shape), layout.obs.dtype)
        self.noise = np.zeros((size, layout.noise_size), np.float32)


def _groups(columns: Columns, buffers: Buffers) -> Iterator[_Group]:
    first_group = columns.first // GROUP_SIZE * GROUP_SIZE
    for start in range(first_group, columns.first + columns.num_envs, GROUP_SIZE):
        yield _Group(columns, buffers, start)


def run_actor(
    columns: Columns, buffers: Buffers, actor: Actor, num_steps: int, first_step: int = 0
) -> None:
    """Act and step, from row `first_step` to row `num_steps - 1`."""
    groups = list(_groups(columns, buffers))
    obs, noise, actions = buffers.obs, buffers.noise, buffers.actions
    for t in range(first_step, num_steps):
        for group in groups:
            group.obs[group.rows] = obs[t, group.own]
            group.noise[group.rows] = noise[t, group.own]
            actions[t, group.own] = actor(group.obs, group.noise)[group.rows]
        columns.step(t)
