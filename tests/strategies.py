"""Hypothesis strategies shared by the tests, and how hard they try."""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

# The first call of a torch operation is slow, which is no failure.
law = settings(max_examples=60, deadline=None)

coefficients = st.sampled_from([0.0, 1.0, 0.9, 0.99]) | st.floats(0.0, 1.0)
seeds = st.integers(0, 2**32 - 1)
# On both sides of every change of path in the scan: 16 steps, whole chunks, two levels.
horizons = st.integers(1, 40) | st.sampled_from([64, 127, 128, 129, 150])
trailing_shapes = st.sampled_from([(), (1,), (3,), (2, 2)])


@dataclass(frozen=True)
class Trajectory:
    """A rollout ``[T, ...]`` in NumPy; the value after a step is that of the next row."""

    rewards: np.ndarray
    values: np.ndarray
    next_values: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    def __iter__(self):
        return iter((self.rewards, self.values, self.next_values, self.terminated, self.truncated))

    def astype(self, dtype):
        numbers = (x.astype(dtype) for x in (self.rewards, self.values, self.next_values))
        return Trajectory(*numbers, self.terminated, self.truncated)

    def __getitem__(self, index):
        return Trajectory(*(x[index] for x in self))


@st.composite
def trajectories(draw, horizons=horizons, trailing_shapes=trailing_shapes):
    rng = np.random.default_rng(draw(seeds))
    shape = (draw(horizons), *draw(trailing_shapes))
    frequency = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    rewards, values, final_values = rng.normal(size=(3, *shape)) * 3
    terminated = rng.random(shape) < draw(frequency)
    truncated = rng.random(shape) < draw(frequency)
    successors = np.concatenate([values[1:], final_values[-1:]])
    next_values = np.where(terminated | truncated, final_values, successors)
    return Trajectory(rewards, values, next_values, terminated, truncated)


@st.composite
def masked_rows(draw, count=4, max_rows=12):
    """``count`` arrays ``[B]`` of modest numbers and a mask that keeps at least one row."""
    rng = np.random.default_rng(draw(seeds))
    rows = draw(st.integers(1, max_rows))
    valid = rng.random(rows) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    valid[rng.integers(rows)] = True
    return rng.normal(size=(count, rows)), valid
