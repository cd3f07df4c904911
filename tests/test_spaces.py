import json
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ppo.errors import PPOError, SpaceError
from ppo.spaces import (
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    check_policy_spaces,
    is_image,
    make_action_adapter,
    observation_dtype,
    space_from_dict,
    space_to_dict,
    sub_spaces,
)
from ppo.trees import leaves, leaves_with_paths, map_tree

UNSUPPORTED = [
    spaces.Text(5),
    spaces.Sequence(spaces.Discrete(2)),
    spaces.Graph(spaces.Discrete(2), None),
    spaces.OneOf((spaces.Discrete(2),)),
]
NESTED = spaces.Dict(
    {
        "arm": spaces.Dict(
            {"joints": spaces.Box(-1.0, 1.0, (2, 3)), "touch": spaces.MultiBinary((2, 2))}
        ),
        "go": spaces.Tuple((spaces.Discrete(3, start=5), spaces.MultiDiscrete([[2, 3], [4, 2]]))),
        "here": spaces.Box(0.0, 1.0, ()),
    }
)


def box(low, high, shape=(2,), dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


# --- observations


@pytest.mark.parametrize("space", UNSUPPORTED, ids=str)
def test_an_unsupported_observation_space_is_named_with_its_place_and_a_remedy(space):
    with pytest.raises(SpaceError, match=rf"got {type(space).__name__}, wanted Box.*; wrap"):
        check_observation_space(space)
    nested = spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), space))})
    with pytest.raises(SpaceError, match=r"at 'a/1' is not supported"):
        check_observation_space(nested)


@pytest.mark.parametrize("space", [spaces.Dict({}), spaces.Tuple(())], ids=str)
def test_an_empty_observation_is_refused(space):
    with pytest.raises(SpaceError, match="nothing to observe"):
        check_observation_space(space)


def test_a_nested_observation_is_stored_leaf_by_leaf():
    layout = ObservationLayout(check_observation_space(NESTED))
    dtypes = {path: leaf.dtype for path, leaf in leaves_with_paths(layout.leaves)}
    assert dtypes == {
        "arm/joints": np.float32,
        "arm/touch": np.int8,
        "go/0": np.int64,
        "go/1": np.int64,
        "here": np.float32,
    }
    arrays = layout.empty(4, 3)
    NESTED.seed(0)
    obs = NESTED.sample()
    layout.write(arrays, (1, 2), obs)
    assert arrays["go"][0][1, 2] == obs["go"][0] - 5, "classes are counted from 0"
    np.testing.assert_array_equal(arrays["arm"]["joints"][1, 2], obs["arm"]["joints"])
    np.testing.assert_array_equal(arrays["go"][1][1, 2], obs["go"][1])
    copy = layout.copy(obs)
    obs["arm"]["joints"][:] = 7.0
    assert not (copy["arm"]["joints"] == 7.0).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda obs: obs.pop("here"), "keys"),
        (lambda obs: obs.update(there=1), "keys"),
        (lambda obs: obs.update(go=(5,)), "tuple of 2"),
        (lambda obs: obs.update(arm=3), "keys"),
        (lambda obs: obs["arm"].update(joints=np.zeros(6)), r"\(6,\).*\(2, 3\)"),
    ],
)
def test_an_observation_of_another_structure_is_refused(change, words):
    layout = ObservationLayout(NESTED)
    obs = NESTED.sample()
    change(obs)
    with pytest.raises(ValueError, match=words):
        layout.copy(obs)
    with pytest.raises(ValueError, match=words):
        layout.as_batch(obs)


BYTES = spaces.Box(0, 255, (2,), np.uint8)


@pytest.mark.parametrize(
    ("space", "obs", "words"),
    [
        (BYTES, np.array([0.0, 0.5], np.float32), r"0\.5 at \[1\] \(float32\).*a number of uint8"),
        (BYTES, np.array([300, 0]), r"300 at \[0\].*a Box of int64"),
        (BYTES, [-1, 0], r"-1 at \[0\]"),
        (BYTES, np.array([1.0, np.nan]), "nan"),
        (spaces.MultiDiscrete([3, 3]), np.array([4, 1]), r"4 at \[0\].*one of its classes"),
        (spaces.MultiDiscrete([3, 3]), np.array([1, -1]), r"-1 at \[1\]"),
        (spaces.MultiDiscrete([3, 3], start=[1, 1]), np.array([0, 1]), r"0 at \[0\]"),
        (spaces.MultiBinary(2), np.array([0, 2], np.int8), r"2 at \[1\]"),
        (spaces.Discrete(3), 3, r"has 3 \(int64\).*Discrete\(3\).*with more classes"),
        (spaces.Discrete(3), np.int16(-1), "has -1"),
        (spaces.Discrete(3, start=1), np.int64(0), "has 0"),
        (spaces.Discrete(3), np.array(1.5), "has 1.5"),
    ],
    ids=str,
)
def test_an_observation_outside_its_space_is_refused_and_not_made_another(space, obs, words):
    layout = ObservationLayout(spaces.Dict(a=space))
    with pytest.raises(ValueError, match=words):
        layout.copy({"a": obs})
    with pytest.raises(ValueError, match=words):
        layout.as_batch({"a": obs})
    batch = {"a": np.stack([obs, obs])}
    with pytest.raises(ValueError, match="the observation has"):
        layout.as_batch(batch)
    with pytest.raises(ValueError, match="the observation has"):
        layout.write_batch(layout.empty(2), slice(None), batch)


@pytest.mark.parametrize(
    ("space", "obs", "stored"),
    [
        (BYTES, np.array([0.0, 255.0]), [0, 255]),
        (BYTES, [1, 2], [1, 2]),
        (BYTES, np.array([True, False]), [1, 0]),
        (spaces.MultiDiscrete([3, 3], start=[1, -1]), np.array([3, 1], np.int32), [2, 2]),
        (spaces.MultiBinary(2), np.array([True, False]), [1, 0]),
        (spaces.Discrete(3, start=-1), np.float32(1.0), 2),
        (spaces.Discrete(3, start=-1), np.int16(-1), 0),
        (spaces.Discrete(2), True, 1),
        (spaces.Discrete(300, start=-1), np.uint8(255), 256),
        (box(-1.0, 1.0), np.array([7.0, -3.0]), [7, -3]),
    ],
    ids=str,
)
def test_an_observation_of_another_type_is_taken_if_it_is_the_same_number(space, obs, stored):
    """Boxes of floats are left by many environments: their bounds are not looked at."""
    layout = ObservationLayout(space)
    array = layout.empty(1)
    layout.write_batch(array, slice(None), np.asarray(obs)[None])
    for found in (layout.copy(obs), layout.as_batch(obs)[0][0], array[0]):
        assert found.dtype == observation_dtype(space)
        assert found.tolist() == stored


def test_one_nested_observation_is_told_from_a_batch():
    layout = ObservationLayout(NESTED)
    one = NESTED.sample()
    rows, single = layout.as_batch(one)
    assert single
    assert {len(leaf) for leaf in leaves(rows)} == {1}
    several, single = layout.as_batch(map_tree(lambda leaf: np.stack([leaf] * 3), one))
    assert not single
    assert {len(leaf) for leaf in leaves(several)} == {3}
    assert several["go"][0].tolist() == [one["go"][0] - 5] * 3
    broken = {**one, "here": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="shape"):
        layout.as_batch(broken)


def test_spaces_whose_leaves_lie_in_another_order_are_told_apart():
    class Built:
        observation_space = spaces.Dict(OrderedDict(a=spaces.Discrete(2), b=spaces.Discrete(2)))

    turned = spaces.Dict(OrderedDict(b=spaces.Discrete(2), a=spaces.Discrete(2)))
    check_policy_spaces(Built(), Built.observation_space, spaces.Discrete(2))
    with pytest.raises(SpaceError, match="built for observation_space"):
        check_policy_spaces(Built(), turned, spaces.Discrete(2))


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


def test_every_class_of_a_multi_discrete_space_counts_from_its_own_start():
    space = spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[5, 0], [-1, 7]])
    actions = make_action_adapter(space)(np.array([[[0, 0], [0, 0]], [[1, 2], [3, 1]]]))
    assert actions.tolist() == [[[5, 0], [-1, 7]], [[6, 2], [2, 8]]]
    assert all(space.contains(action) for action in actions)


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


def test_a_squashed_action_is_as_far_between_its_bounds_as_the_tangent_is():
    space = spaces.Box(np.array([-1.0, -5.0], np.float32), np.array([0.0, 7.0], np.float32))
    raw = np.arctanh([[0.5, -0.5], [0.0, 0.9]])
    actions = make_action_adapter(space, squash=True)(raw)
    np.testing.assert_allclose(actions, [[-0.25, -2.0], [-0.5, 6.4]], rtol=1e-6)


@pytest.mark.parametrize("space", [*UNSUPPORTED, box(0, 5, dtype=np.int64)], ids=str)
def test_an_unsupported_action_space_is_named_with_a_remedy(space):
    with pytest.raises(SpaceError, match=rf"got {type(space).__name__}, wanted .*wrap"):
        make_action_adapter(space)


def test_a_nested_action_has_exactly_the_types_that_its_space_declares():
    adapter = make_action_adapter(NESTED)
    raw = map_tree(lambda leaf: np.ones((3, *leaf.shape), leaf.dtype), adapter.leaves)
    rows = adapter.rows(adapter(raw))
    assert len(rows) == 3
    for action in rows:
        assert NESTED.contains(action)
        assert action["go"][0] == 6
        assert type(action["here"]) is np.ndarray
        for space, leaf in zip(leaves(sub_spaces(NESTED)), leaves(action), strict=True):
            assert leaf.dtype == space.dtype


def test_squashed_actions_reach_their_bounds_and_never_leave_them():
    space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([-1.0, 5.0], np.float32))
    actions = make_action_adapter(space, squash=True)(np.array([[-99.0, 99.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(actions, np.array([[-2.0, 5.0], [-1.5, 2.5]], np.float32))


# --- masks


@pytest.mark.parametrize(
    ("space", "mask", "flat"),
    [
        (spaces.Discrete(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (spaces.Discrete(3, start=4), [True, False, False], [1, 0, 0]),
        (spaces.MultiDiscrete([2, 3]), (np.array([0, 1]), np.array([1, 1, 0])), [0, 1, 1, 1, 0]),
        (spaces.MultiDiscrete([2, 3]), np.array([0, 1, 1, 1, 0]), [0, 1, 1, 1, 0]),
        (
            spaces.MultiDiscrete([[2], [2]]),
            ((np.array([0, 1]),), (np.array([1, 0]),)),
            [0, 1, 1, 0],
        ),
        (spaces.MultiBinary(2), np.array([[1, 0], [1, 1]]), [1, 0, 1, 1]),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(0, 1)}), {"a": [0, 1]}, [0, 1]),
        (
            spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Discrete(2)}),
            {"b": [0, 1]},
            [1, 1, 0, 1],
        ),
        (spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 1))), ([1, 0], None), [1, 0]),
        (
            spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))),
            np.array([1, 0, 0, 1]),
            [1, 0, 0, 1],
        ),
        (spaces.Box(0, 1), None, []),
    ],
    ids=str,
)
def test_a_mask_is_read_in_every_form_it_comes_in(space, mask, flat):
    masks = ActionMasks(space)
    assert masks.size == len(flat)
    assert masks.read(mask).tolist() == [bool(x) for x in flat]


@pytest.mark.parametrize(
    ("space", "mask", "words"),
    [
        (spaces.Discrete(3), [0, 0, 0], "no legal action"),
        (spaces.MultiDiscrete([2, 2]), [1, 1, 0, 0], "no legal action"),
        (spaces.MultiBinary(2), [[1, 1], [0, 0]], "no legal action"),
        (spaces.Discrete(3), [1, 1], "2 entries .* wanted 3"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": [1, 1]}, "keys of"),
        (spaces.Tuple((spaces.Discrete(2),)), ([1, 1], [1, 1]), "must have 1 items"),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_or_leaves_nothing_is_refused(space, mask, words):
    with pytest.raises(ValueError, match=words):
        ActionMasks(space).read(mask)


def test_a_mask_among_the_observations_is_found_by_its_key_and_size():
    masks = ActionMasks(spaces.Discrete(3))
    assert masks.lie_in(spaces.Dict({"x": spaces.Box(0, 1), "action_mask": spaces.MultiBinary(3)}))
    assert not masks.lie_in(spaces.Dict({"action_mask": spaces.MultiBinary(4)}))
    assert not masks.lie_in(spaces.MultiBinary(3))
    assert not ActionMasks(spaces.Box(0, 1)).lie_in(spaces.Dict({"action_mask": spaces.Box(0, 1)}))


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


discretes = st.builds(
    lambda n, start, dtype: spaces.Discrete(n, start=start, dtype=dtype),
    st.integers(1, 10**6),
    st.integers(-100, 100),
    st.sampled_from([np.int64, np.int32]),
)
multi_discretes = st.builds(
    lambda shape, start: spaces.MultiDiscrete(np.full(shape, 3), start=np.full(shape, start)),
    npst.array_shapes(max_dims=3, max_side=3),
    st.integers(-5, 5),
)
multi_binaries = st.builds(
    spaces.MultiBinary, st.integers(1, 9) | npst.array_shapes(max_dims=3, max_side=3)
)
nested = st.recursive(
    boxes() | discretes | multi_discretes | multi_binaries,
    lambda inner: (
        st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3).map(
            lambda items: spaces.Dict(OrderedDict(items))
        )
        | st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple)
    ),
    max_leaves=4,
)


@given(nested)
def test_a_space_survives_json(space):
    text = json.dumps(space_to_dict(space), allow_nan=False)
    twin = space_from_dict(json.loads(text))
    assert twin == space
    check_policy_spaces(SimpleNamespace(observation_space=twin), space, space)
    assert twin.dtype == space.dtype
    if isinstance(space, spaces.Box):
        np.testing.assert_array_equal(twin.low, space.low)
        np.testing.assert_array_equal(twin.high, space.high)


@pytest.mark.parametrize(
    "space",
    [
        box(-1.0, 1.0, (0,)),
        box(-1.0, 1.0, (0, 3)),
        box(0, 2**63 - 1, dtype=np.int64),
        box(-(2**63), 2**63 - 1, dtype=np.int64),
        box(0, 2**64 - 1, dtype=np.uint64),
        box(np.array([1, 2**53 + 1]), np.array([2**60 + 1, 2**62 + 1]), dtype=np.int64),
        spaces.Box(np.array([0, 1], np.uint64), np.array([1, 2**64 - 1], np.uint64), dtype="u8"),
    ],
    ids=str,
)
def test_an_empty_box_and_the_largest_integers_survive_json(space):
    twin = space_from_dict(json.loads(json.dumps(space_to_dict(space), allow_nan=False)))
    assert twin == space
    assert twin.low.tolist() == space.low.tolist()  # exactly
    assert twin.high.tolist() == space.high.tolist()


@pytest.mark.parametrize("space", UNSUPPORTED, ids=str)
def test_an_unsupported_space_cannot_be_described(space):
    with pytest.raises(SpaceError, match=type(space).__name__):
        space_to_dict(space)


GOOD_BOX = {"type": "Box", "low": -1.0, "high": 1.0, "shape": [2], "dtype": "float32"}
GOOD_DISCRETE = {"type": "Discrete", "n": 3, "start": 0}


def deep(levels):
    space = GOOD_DISCRETE
    for _ in range(levels):
        space = {"type": "Tuple", "spaces": [space]}
    return space


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
        {"type": "MultiDiscrete", "nvec": [2, 3], "start": [0], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": 2, "start": 0, "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [0, 2], "start": [0, 0], "dtype": "int64"},
        {"type": "MultiBinary", "shape": [10**13]},
        {"type": "Dict", "spaces": {"a": 1}},
        {"type": "Dict", "spaces": [["a", GOOD_DISCRETE], ["a", GOOD_DISCRETE]]},
        {"type": "Tuple", "spaces": [GOOD_BOX, {}]},
        deep(80),
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
