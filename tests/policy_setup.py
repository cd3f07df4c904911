"""What the tests of policies have in common: spaces, sizes and randomness."""

import random

import numpy as np
import pytest
import torch
from gymnasium import spaces

from ppo.policies import PolicyConfig

PLANE = spaces.Box(-10.0, 10.0, (3,), np.float32)
THREE = spaces.Discrete(3)
PAIR = spaces.Box(-1.0, 1.0, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 40, 44), np.uint8)
SMALL_CNN = PolicyConfig(hidden_sizes=(), cnn_features=16)
ACTIONS = pytest.mark.parametrize("action_space", [THREE, PAIR], ids=["discrete", "box"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def global_randomness():
    """The state of every generator that all of a process share."""
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
    )
