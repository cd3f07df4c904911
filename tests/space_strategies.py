"""Hypothesis strategies for nested observation and action spaces, small enough to try hundreds."""

import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st

shapes = st.sampled_from([(), (1,), (2,), (3,), (2, 2), (1, 2, 2)])
some_shapes = st.sampled_from([(1,), (2,), (3,), (2, 2)])
numbers = st.integers(1, 4)
starts = st.sampled_from([0, 0, 1, -2, 5])
floats = st.sampled_from([np.float32, np.float64])
KEYS = ("arm", "camera", "goal")  # not action_mask, which means something


@st.composite
def boxes(draw, dtypes=floats):
    """Bounded, half-bounded or unbounded, differently in every entry."""
    shape, dtype = draw(shapes), draw(dtypes)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    low = np.asarray(rng.integers(-5, 3, shape), dtype)
    high = (low + rng.integers(1, 6, shape)).astype(dtype)
    if np.issubdtype(dtype, np.floating):
        kind = draw(st.sampled_from(["bounded", "below", "above", "none", "mixed"]))
        open_below = {"bounded": False, "below": False, "above": True, "none": True}
        open_above = {"bounded": False, "below": True, "above": False, "none": True}
        low = np.where(open_below.get(kind, rng.random(shape) < 0.5), -np.inf, low)
        high = np.where(open_above.get(kind, rng.random(shape) < 0.5), np.inf, high)
    return spaces.Box(low.astype(dtype), high.astype(dtype), shape, dtype)


bytes_vectors = st.builds(lambda size: spaces.Box(0, 255, (size,), np.uint8), numbers)
images = st.sampled_from(
    [(36, 36), (36, 40, 1), (3, 36, 37)],
).map(lambda shape: spaces.Box(0, 255, shape, np.uint8))
discretes = st.builds(lambda n, start: spaces.Discrete(n, start=start), numbers, starts)
multi_binaries = st.one_of(numbers, some_shapes).map(spaces.MultiBinary)


@st.composite
def multi_discretes(draw):
    shape = draw(some_shapes)
    counts = draw(st.lists(numbers, min_size=4, max_size=4))[: int(np.prod(shape))]
    start = np.full(shape, draw(starts))
    return spaces.MultiDiscrete(np.reshape(counts, shape), start=start)


def nested(leaves, depth):
    """Leaves, or dictionaries and tuples of one to three such, down to that depth."""
    tree = leaves
    for _ in range(depth):
        dicts = st.dictionaries(st.sampled_from(KEYS), tree, min_size=1, max_size=3)
        tuples = st.lists(tree, min_size=1, max_size=2).map(tuple)
        tree = choose(leaves, dicts.map(spaces.Dict), tuples.map(spaces.Tuple))
    return tree


def choose(*strategies):
    """Each as often as the others, however many alternatives it has itself."""
    return st.sampled_from(strategies).flatmap(lambda strategy: strategy)


observation_leaves = choose(
    boxes(),
    boxes(st.sampled_from([np.int8, np.int32, np.int64])),
    bytes_vectors,
    discretes,
    multi_discretes(),
    multi_binaries,
    # Encoding an image is slow: a few draws in a hundred have one.
    choose(*[boxes()] * 7, images),
)
observation_spaces = nested(observation_leaves, 2)
action_spaces = nested(choose(boxes(), discretes, multi_discretes(), multi_binaries), 2)
