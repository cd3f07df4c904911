"""Environments that raise: what is said of a fault, and how many may be made anew."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from ppo.collector.columns import Restart
from ppo.errors import EnvError

__all__ = ["Restarts", "check_info", "env_fault"]

_RETURNED = {"reset": "(obs, info)", "step": "(obs, reward, terminated, truncated, info)"}


def env_fault(
    where: str,
    env_index: int,
    error: Exception,
    *,
    seed: int | None,
    episode_step: int,
    t: int,
    action: Any = None,
) -> EnvError:
    """The error that names an environment, what it was doing, and what it raised.

    Args:
        where: The method that raised.
        env_index: Of the environment.
        error: What it raised.
        seed: Of the episode.
        episode_step: Steps that the episode has taken.
        t: Row of the rollout; below 0 if there is none yet.
        action: What was done; None in a reset.
    """
    step = "" if t < 0 else f", rollout step {t}"
    taken = "" if action is None else f", action {action!r}"
    fault = EnvError(
        f"environment {env_index} raised {type(error).__name__} in {where}: {error}"
        f"{_remedy(where, error)} "
        f"(episode seed {seed}, episode step {episode_step}{step}{taken})\n\n"
        f"{''.join(traceback.format_exception(error))}"
    )
    fault.__cause__ = error
    return fault


def _remedy(where: str, error: Exception) -> str:
    """What a method should have returned, if it was not what is unpacked here."""
    trace = error.__traceback__
    here = trace is not None and trace.tb_next is None and "unpack" in str(error)
    return f"; it must return {_RETURNED[where]}" if here and where in _RETURNED else ""


def check_info(info: object) -> None:
    """Raise for what no reset returns: two things that are not an observation and its info.

    That of an old interface returns an observation alone, which may consist of two.
    """
    if not isinstance(info, Mapping):
        raise TypeError(
            f"the second thing is of type {type(info).__name__}, wanted a mapping; it must return "
            f"{_RETURNED['reset']}"
        )


class Restarts:
    """Counts the environments that are made anew, up to a budget.

    Args:
        allowed: How many times, over all environments.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed = self._left = allowed
        self._done: list[Restart] = []

    def spend(self, row: int, env_index: int, fault: Exception) -> None:
        """Count one that begins anew with this row; raises what it failed with if it may not."""
        if self._left == 0:
            if self._allowed == 0:
                raise fault
            raise EnvError(
                f"max_restarts = {self._allowed} restarts are spent; the last fault: {fault}"
            ) from fault
        self._left -= 1
        self._done.append(Restart(max(row - 1, 0), env_index, str(fault)))

    def take(self) -> list[Restart]:
        """Those since the last call."""
        done, self._done = self._done, []
        return done
