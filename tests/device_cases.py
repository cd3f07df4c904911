"""One small task for every part of a policy, to be trained on any device."""

import functools

import numpy as np
import pytest
from environments import RandomSpacesEnv
from gymnasium import spaces

from ppo import PolicyConfig

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
NESTED = spaces.Dict(a=VECTOR, b=spaces.Discrete(4), c=spaces.MultiDiscrete([2, 3]))
PAIR = spaces.Box(-1.0, 1.0, (2,), np.float32)
THREE = spaces.Discrete(3)
SEVERAL = spaces.Dict(a=spaces.MultiBinary(2), b=PAIR, c=spaces.MultiDiscrete([3, 2]))
MEMORY = {"memory_size": 4, "memory_steps": 5}
CASES = {
    "discrete": (VECTOR, THREE, {}),
    "box": (VECTOR, PAIR, {}),
    "nested": (NESTED, SEVERAL, {"normalize_observations": True}),
    "embedded": (NESTED, THREE, {"encoders": {"b": {"kind": "embedding"}}}),
    "normalised": (VECTOR, THREE, {"normalize_observations": True}),
    "by state": (VECTOR, PAIR, {"state_dependent_std": True}),
    "squashed": (VECTOR, PAIR, {"distribution": "squashed"}),
    "beta": (VECTOR, PAIR, {"distribution": "beta"}),
    "gsde": (VECTOR, PAIR, {"distribution": "gsde"}),
    "images": (IMAGE, THREE, {"shared": True}),
    "stacked": (NESTED, THREE, {"frame_stack": 2}),
    "lstm": (VECTOR, THREE, {"memory": "lstm", **MEMORY}),
    "gru": (VECTOR, PAIR, {"memory": "gru", "shared": True, **MEMORY}),
    "attention": (NESTED, THREE, {"memory": "attention", "frame_stack": 2, **MEMORY}),
}
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def env_of(case):
    """Makes the environment of a case, with masks where there can be any."""
    observation_space, action_space, _ = case
    masked = not isinstance(action_space, spaces.Box)
    return functools.partial(RandomSpacesEnv, observation_space, action_space, masked, length=7)


def config_of(case):
    """The settings of its policy."""
    return PolicyConfig(**{"hidden_sizes": (4,), "cnn_features": 8, **case[2]})
