"""What a worker that is gone or hangs was doing, from what it left in shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppo.collector.buffers import Buffers
from ppo.spaces import Space, make_action_adapter
from ppo.trees import map_tree

__all__ = ["PLAYING", "whereabouts"]

PLAYING = ("reset", "run", "steps")
"""Commands in which environments move, and in which a lost worker can be replaced."""


def whereabouts(
    buffers: Buffers,
    share: np.ndarray,
    command: tuple[Any, ...],
    action_space: Space,
    num_agents: int = 1,
) -> str:
    """Environment, episode, step and action that a worker was at; nothing if it was done.

    Args:
        buffers: The rollout's arrays.
        share: Columns of the worker.
        command: What it was told, one of `PLAYING`.
        action_space: Of the environments.
        num_agents: Columns of each environment.
    """
    progress, started = buffers.progress[share], buffers.started[share]
    resetting = started > progress
    index = int(share[resetting.argmax() if resetting.any() else progress.argmin()])
    number, step = index // num_agents, int(buffers.progress[index])
    seed = f"episode seed {buffers.episode_seeds[index]}"
    if command[0] == "reset":
        return f" at environment {number} in reset ({seed})"
    if step >= command[2]:
        return ""
    adapter = make_action_adapter(action_space, squash=buffers.layout.squash)
    columns = slice(number * num_agents, (number + 1) * num_agents)
    raw = map_tree(lambda rows: rows[step, columns], buffers.actions)
    taken = adapter.rows(adapter(raw))
    shown = taken[0] if num_agents == 1 else taken
    action = f"rollout step {step}, action {shown!r}"
    if resetting.any():
        return f" at environment {number} in reset ({seed}, {action})"
    length = step - int(buffers.started[index])
    return f" at environment {number} in step ({seed}, episode step {length}, {action})"
