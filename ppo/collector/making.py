"""From where environments come from to the columns they become."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppo.collector.agent_columns import AgentColumns
from ppo.collector.columns import Columns
from ppo.collector.env_columns import EnvColumns, make_by
from ppo.collector.streams import EPISODES, stream
from ppo.collector.vector_columns import VectorColumns
from ppo.envs import AnyEnv, EnvFactory, EnvSource, is_parallel

__all__ = ["episode_streams", "open_columns", "open_env_columns"]


def episode_streams(source: EnvSource, root: np.random.SeedSequence) -> list[np.random.Generator]:
    """The generators of episode seeds, one per factory."""
    return [stream(root, EPISODES, index) for index in range(len(source.factories))]


def open_columns(source: EnvSource, root: np.random.SeedSequence, max_restarts: int = 0) -> Columns:
    """Make the environments of a source in this process, seeded from `root`."""
    if source.vector is not None:
        assert source.autoreset_mode is not None
        return VectorColumns(source.vector, source.autoreset_mode, stream(root, EPISODES, 0))
    seeds = episode_streams(source, root)
    return open_env_columns(
        source.factories, seeds, borrowed=source.instance, max_restarts=max_restarts
    )


def open_env_columns(
    factories: Sequence[EnvFactory],
    seeds: Sequence[np.random.Generator],
    first: int = 0,
    borrowed: AnyEnv | None = None,
    max_restarts: int = 0,
) -> EnvColumns | AgentColumns:
    """Make environments and the columns that step them; the first one says of which kind.

    Args:
        factories: One per environment.
        seeds: One generator of episode seeds per environment.
        first: Index of the first environment.
        borrowed: The caller's own environment, used as number 0 and never closed.
        max_restarts: How many times an environment that raised is made anew.
    """
    made = [make_by(factories[0], first) if borrowed is None or first else borrowed]
    if not is_parallel(made[0]):
        return EnvColumns(factories, seeds, made, first, borrowed, max_restarts)
    try:
        for index, factory in enumerate(factories[1:], first + 1):
            made.append(make_by(factory, index))
            if not is_parallel(made[-1]):
                raise TypeError(
                    f"environment {index} is one of a single agent, but environment {first} has "
                    "several; collect them one kind at a time"
                )
        return AgentColumns(made, seeds, first, borrowed, factories, max_restarts)
    except BaseException:
        for env in made:
            if env is not borrowed:
                env.close()
        raise
