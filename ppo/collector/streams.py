"""Random streams that belong to (seed, purpose, environment) and never to a process."""

from __future__ import annotations

import numpy as np

__all__ = ["EPISODES", "EVALUATION", "NOISE", "POLICY", "stream"]

EPISODES, NOISE, POLICY, EVALUATION = range(4)
"""Purposes: seeds of episodes, action noise, policies that draw by themselves, and all three of an
evaluation, which is to see other episodes than a training with the same seed."""


def stream(root: np.random.SeedSequence, purpose: int, index: int) -> np.random.Generator:
    """Generator of one purpose and one environment; no two of them share numbers.

    Spawning from a `SeedSequence` keeps the streams of seed `s` and `s + 1` apart, which adding
    the environment's index to the seed does not.
    """
    key = (*root.spawn_key, purpose, index)
    return np.random.default_rng(np.random.SeedSequence(root.entropy, spawn_key=key))
