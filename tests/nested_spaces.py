"""Hypothesis strategies for nested observation spaces, and observations as policies get them."""

import numpy as np
import torch
from gymnasium import spaces
from hypothesis import strategies as st

from ppo.spaces import sub_spaces
from ppo.trees import map_tree

_SIZES = st.integers(2, 4)
_LEAVES = st.one_of(
    st.sampled_from([(), (1,), (3,), (2, 2)]).map(lambda shape: spaces.Box(-9.0, 9.0, shape)),
    st.just(spaces.Box(0, 255, (3,), np.uint8)),
    st.builds(lambda n, start: spaces.Discrete(n, start=start), _SIZES, st.integers(-2, 2)),
    st.lists(_SIZES, min_size=1, max_size=3).map(spaces.MultiDiscrete),
    st.just(spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]))),
    st.sampled_from([spaces.MultiBinary(3), spaces.MultiBinary((2, 2))]),
)


def observation_spaces():
    """Leaves that need no image encoder, nested or not."""
    return st.recursive(
        _LEAVES,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple)
            | st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3).map(
                spaces.Dict
            )
        ),
        max_leaves=4,
    )


def batches(space, rows, frames=1, seed=0, count=1):
    """Trees of random leaves `[B, ...]`, or `[B, frames, ...]`, of the types policies get."""
    rng = np.random.default_rng(seed)
    axes = (rows,) if frames == 1 else (rows, frames)

    def draw(leaf):
        shape = (*axes, *leaf.shape)
        if isinstance(leaf, spaces.Box) and leaf.dtype == np.uint8:
            array = rng.integers(0, 256, shape, np.uint8)
        elif isinstance(leaf, spaces.Box):
            array = rng.normal(0.0, 2.0, shape).astype(np.float32)
        elif isinstance(leaf, spaces.MultiBinary):
            array = rng.integers(0, 2, shape, np.int8)
        else:
            sizes = leaf.n if isinstance(leaf, spaces.Discrete) else leaf.nvec
            array = rng.integers(0, sizes, shape, np.int64)
        return torch.from_numpy(np.asarray(array))

    return [map_tree(draw, sub_spaces(space)) for _ in range(count)]
