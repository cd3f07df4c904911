import json

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ppo.errors import PPOError, SpaceError
from ppo.spaces import (
    check_observation_space,
    is_image,
    make_action_adapter,
    observation_dtype,
    space_from_dict,
    space_to_dict,
)

UNSUPPORTED = [
    spaces.Dict({"a": spaces.Discrete(2)}),
    spaces.Tuple((spaces.Discrete(2),)),
    spaces.MultiBinary(3),
    spaces.MultiDiscrete([2, 3]),
    spaces.Text(5),
]


def box(low, high, shape=(2,), dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


# --- observations


@pytest.mark.parametrize("space", [*UNSUPPORTED, spaces.Discrete(3)], ids=str)
def test_an_unsupported_observation_space_is_named_with_a_remedy(space):
    with pytest.raises(SpaceError, match=rf"got {type(space).__name__}, wanted Box; .*wrap"):
        check_observation_space(space)


def test_a_box_of_any_type_can_be_observed():
    for dtype in (np.float32, np.float64, np.int64, np.uint8):
        space = box(0, 10, dtype=dtype)
        assert check_observation_space(space) is space


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (box(0, 255, (84, 84), np.uint8), True),
        (box(0, 255, (3, 84, 84), np.uint8), True),
        (box(0, 255, (84, 84, 4), np.uint8), True),
        (box(0, 255, (84,), np.uint8), False),
        (box(0, 255, (2, 3, 84, 84), np.uint8), False),
        (box(0, 254, (84, 84), np.uint8), False),
        (box(1, 255, (84, 84), np.uint8), False),
        (box(0, 255, (84, 84), np.int64), False),
        (box(0, 255, (84, 84), np.float32), False),
        (spaces.Discrete(3), False),
    ],
)
def test_images_are_full_range_bytes_of_two_or_three_axes(space, expected):
    assert is_image(space) is expected


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.uint8, np.uint8),
        (np.float64, np.float32),
        (np.float32, np.float32),
        (np.int64, np.float32),
        (np.int8, np.float32),
    ],
)
def test_bytes_stay_bytes_and_everything_else_is_stored_as_float32(dtype, stored):
    assert observation_dtype(box(0, 10, dtype=dtype)) == stored


# --- actions


@given(st.integers(1, 9), st.integers(-5, 5), st.data())
def test_classes_become_actions_of_a_discrete_space(n, start, data):
    space = spaces.Discrete(n, start=start)
    adapt = make_action_adapter(space)
    raw = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)))
    actions = adapt(raw)
    assert all(space.contains(action) for action in actions)
    np.testing.assert_array_equal(actions - start, raw)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_discrete_actions_have_the_type_that_the_space_declares(dtype):
    space = spaces.Discrete(3, dtype=dtype)
    assert make_action_adapter(space)(np.array([0, 2])).dtype == dtype


bounds = st.sampled_from([(-1.0, 1.0), (0.0, 5.0), (-np.inf, 1.0), (-2.0, np.inf)])


@given(
    bounds,
    st.sampled_from([np.float32, np.float64, np.float16]),
    npst.array_shapes(min_dims=0, max_dims=3, max_side=3),
    st.integers(0, 1000),
)
def test_raw_vectors_are_clipped_to_a_box_of_any_shape(bounds, dtype, shape, seed):
    space = spaces.Box(*bounds, shape, dtype)
    adapt = make_action_adapter(space)
    raw = np.random.default_rng(seed).normal(0, 3, (5, *shape)).astype(np.float32)
    kept = raw.copy()
    actions = adapt(raw)
    assert all(space.contains(np.asarray(action)) for action in actions)
    np.testing.assert_array_equal(actions, np.clip(raw, *bounds).astype(dtype))
    np.testing.assert_array_equal(raw, kept)
    actions[...] = 0.5
    np.testing.assert_array_equal(raw, kept, "the environment got the memory of the raw action")


def test_every_component_is_clipped_to_its_own_bounds():
    space = spaces.Box(np.array([-1.0, -5.0], np.float32), np.array([0.0, 7.0], np.float32))
    actions = make_action_adapter(space)(np.array([[9.0, 9.0], [-9.0, -9.0]], np.float32))
    np.testing.assert_array_equal(actions, [[0.0, 7.0], [-1.0, -5.0]])


@pytest.mark.parametrize("space", [*UNSUPPORTED, box(0, 5, dtype=np.int64)], ids=str)
def test_an_unsupported_action_space_is_named_with_a_remedy(space):
    with pytest.raises(SpaceError, match=rf"got {type(space).__name__}, wanted .*wrap"):
        make_action_adapter(space)


# --- JSON

lows = st.floats(-1e6, 0.0, width=32) | st.just(-np.inf)
highs = st.floats(1.0, 1e6, width=32) | st.just(np.inf)


@st.composite
def boxes(draw):
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, max_side=3))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.int64, np.uint8]))
    if np.issubdtype(dtype, np.integer):
        low = draw(npst.arrays(dtype, shape, elements=st.integers(0, 5)))
        high = draw(npst.arrays(dtype, shape, elements=st.integers(6, 255)))
    else:
        low = draw(npst.arrays(np.float64, shape, elements=lows)).astype(dtype)
        high = draw(npst.arrays(np.float64, shape, elements=highs)).astype(dtype)
    return spaces.Box(low, high, shape, dtype)


@given(
    boxes()
    | st.builds(
        lambda n, start, dtype: spaces.Discrete(n, start=start, dtype=dtype),
        st.integers(1, 10**6),
        st.integers(-100, 100),
        st.sampled_from([np.int64, np.int32]),
    )
)
def test_a_space_survives_json(space):
    text = json.dumps(space_to_dict(space), allow_nan=False)
    twin = space_from_dict(json.loads(text))
    assert twin == space
    assert twin.dtype == space.dtype
    if isinstance(space, spaces.Box):
        np.testing.assert_array_equal(twin.low, space.low)
        np.testing.assert_array_equal(twin.high, space.high)


@pytest.mark.parametrize("space", UNSUPPORTED, ids=str)
def test_an_unsupported_space_cannot_be_described(space):
    with pytest.raises(SpaceError, match=type(space).__name__):
        space_to_dict(space)


GOOD_BOX = {"type": "Box", "low": -1.0, "high": 1.0, "shape": [2], "dtype": "float32"}
GOOD_DISCRETE = {"type": "Discrete", "n": 3, "start": 0}


def changed(good, **changes):
    return {**good, **changes}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"type": "Graph"},
        {"type": None},
        {"type": ["Box"]},
        {"type": "Box"},
        changed(GOOD_BOX, shape=[-2]),
        changed(GOOD_BOX, shape=3),
        changed(GOOD_BOX, shape=["x"]),
        changed(GOOD_BOX, low=[1, 2, 3]),
        changed(GOOD_BOX, low="wide"),
        changed(GOOD_BOX, low=None),
        changed(GOOD_BOX, low={}),
        changed(GOOD_BOX, low=5.0),
        changed(GOOD_BOX, dtype="object"),
        changed(GOOD_BOX, dtype="no such type"),
        changed(GOOD_BOX, dtype="float32,float32"),
        changed(GOOD_BOX, shape=[10**13]),
        changed(GOOD_BOX, shape=[10**30]),
        changed(GOOD_BOX, shape=[1] * 100),
        changed(GOOD_DISCRETE, n=0),
        changed(GOOD_DISCRETE, n=-1),
        changed(GOOD_DISCRETE, n="many"),
        changed(GOOD_DISCRETE, n=None),
        changed(GOOD_DISCRETE, n=float("inf")),
        changed(GOOD_DISCRETE, start=[]),
        {"type": "Discrete", "n": 3},
        [],
        "Box",
    ],
    ids=str,
)
def test_a_damaged_description_is_a_library_error(data):
    with pytest.raises(SpaceError):
        space_from_dict(data)


# No number between "small" and "hopeless": a space of a few gigabytes would be built.
numbers = st.sampled_from([-1, 0, 2, 50, 0.5, 1e300, 10**30, 2**63, float("inf"), float("nan")])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(
    st.sampled_from([GOOD_BOX, GOOD_DISCRETE]),
    st.sampled_from(["type", "low", "high", "shape", "dtype", "n", "start"]),
    json_values,
)
def test_one_strange_entry_gives_a_space_or_a_library_error(good, key, value):
    try:
        space_from_dict(changed(good, **{key: value}))
    except PPOError as error:
        assert str(error)  # noqa: PT017
