"""`Report`: what callbacks, loggers and progress bars are told after each update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import numpy as np

from ppo.rollout import Episode

__all__ = ["Callback", "Report", "asks_to_stop", "episode_means"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """State of a run after an update.

    Attributes:
        steps: Transitions so far, over all environments and all calls of `learn`.
        goal: Transitions at which this call of `learn` ends.
        updates: Updates so far.
        metrics: Finite or NaN floats by name: `policy_loss`, `value_loss`, `entropy`,
            `approx_kl`, `clip_fraction`, `explained_variance`, `grad_norm`, `learning_rate`,
            `steps_per_second`, `episode_return` and `episode_length` (means over the last 100
            episodes; NaN before the first), and with `on_fault="restart"` the `restarts` of this
            call of `learn`.
        episodes: Episodes that finished in the latest rollout.
    """

    steps: int
    goal: int
    updates: int
    metrics: Mapping[str, float]
    episodes: tuple[Episode, ...]


Callback = Callable[[Report], object]
"""Called with a `Report` after each update; returning False stops the run."""


def asks_to_stop(answer: object) -> bool:
    """True for False and NumPy's False, but not for None: most callbacks return nothing."""
    return isinstance(answer, bool | np.bool_) and not answer


def episode_means(episodes: Collection[Episode]) -> dict[str, float]:
    """`episode_return` and `episode_length`: means over these episodes, NaN over none."""
    return {
        name: float(np.mean([getattr(episode, name) for episode in episodes] or math.nan))
        for name in ("episode_return", "episode_length")
    }
