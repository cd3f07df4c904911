"""The environment of random spaces accepts what is right and nothing else."""

import copy

import cloudpickle
import numpy as np
import pytest
from environments import RandomSpacesEnv, assert_legal, assert_member, draw_mask, sample
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from space_strategies import action_spaces, observation_spaces
from strategies import law, seeds

from ppo.trees import leaves, rebuild


def legal_action(space, mask, rng):
    """Drawn again until it is legal."""
    while True:
        action = sample(space, rng)
        try:
            assert_legal(space, action, mask)
        except AssertionError:
            continue
        return action


@law
@given(observation_spaces, action_spaces, st.booleans(), seeds)
def test_legal_members_are_taken_and_observations_are_members(seen, taken, masks, seed):
    env, rng = RandomSpacesEnv(seen, taken, masks, 3), np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    ends = []
    for _ in range(7):
        assert_member(seen, obs, "observation")
        obs, _, terminated, truncated, info = env.step(
            legal_action(taken, info.get("action_mask"), rng)
        )
        ends.append((terminated, truncated))
        if terminated or truncated:
            obs, info = env.reset()
    assert ends[2::3] == [(True, False), (False, True)]
    assert not any(map(any, ends[:2]))


@law
@given(observation_spaces, action_spaces, seeds)
def test_it_is_a_function_of_its_seed_and_can_be_pickled(seen, taken, seed):
    env = RandomSpacesEnv(seen, taken, True)
    twin = cloudpickle.loads(cloudpickle.dumps(RandomSpacesEnv(seen, taken, True)))
    for _ in range(2):
        assert repr(env.reset(seed=seed)) == repr(twin.reset(seed=seed))
        action = legal_action(taken, env.mask, np.random.default_rng(seed))
        assert repr(env.step(action)) == repr(twin.step(action))


@law
@given(action_spaces, seeds)
def test_an_action_of_another_type_dtype_or_shape_is_refused(space, seed):
    env, rng = RandomSpacesEnv(spaces.Discrete(2), space), np.random.default_rng(seed)
    env.reset(seed=0)
    right = leaves(sample(space, rng))
    index = rng.integers(len(right))
    leaf = right[index]
    wrong = [None, leaf.astype(np.float16), [leaf], leaf[None], leaf.tolist()]
    for other in wrong:
        changed = [*right[:index], other, *right[index + 1 :]]
        with pytest.raises((AssertionError, TypeError)):
            env.step(rebuild(sample(space, rng), changed))
    action = sample(space, rng)
    for other in ({"more": action}, (action, action), [action]):
        with pytest.raises(AssertionError):
            env.step(other)


@law
@given(action_spaces, seeds)
def test_an_action_outside_of_its_space_is_refused(space, seed):
    rng = np.random.default_rng(seed)
    env = RandomSpacesEnv(spaces.Discrete(2), space)
    env.reset(seed=0)
    right = leaves(sample(space, rng))
    index = rng.integers(len(right))
    beyond = copy.copy(right)
    beyond[index] = (np.asarray(right[index]) * 0 + 127).astype(right[index].dtype)[()]
    if np.issubdtype(right[index].dtype, np.floating):
        beyond[index] = np.full_like(right[index], np.nan)
    elif np.ndim(right[index]):
        beyond[index] = np.full_like(right[index], 127)
    with pytest.raises(AssertionError, match="is not in"):
        env.step(rebuild(sample(space, rng), beyond))


def test_keys_in_another_order_are_refused():
    space = spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Discrete(2)})
    one = np.int64(1)
    assert_member(space, {"a": one, "b": one})
    with pytest.raises(AssertionError, match="keys"):
        assert_member(space, {"b": one, "a": one})
    with pytest.raises(AssertionError, match="keys"):
        assert_member(space, {"a": one})


ILLEGAL = [
    (spaces.Discrete(3, start=5), np.int64(6), np.array([True, False, True])),
    (
        spaces.MultiDiscrete([[2, 3]], start=[[1, 1]]),
        np.array([[1, 3]]),
        (np.array([True, False]), np.array([True, True, False])),
    ),
    (spaces.MultiDiscrete([2, 3]), np.array([1, 0]), np.array([True, False, True, True, True])),
    (
        spaces.MultiBinary(2),
        np.array([1, 0], np.int8),
        np.array([[False, True], [False, True]]),
    ),
]


@pytest.mark.parametrize(("space", "action", "mask"), ILLEGAL)
def test_an_illegal_action_is_refused_also_where_it_is_nested(space, action, mask):
    with pytest.raises(AssertionError, match="under"):
        assert_legal(space, action, mask)
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    nested = spaces.Dict({"a": box, "b": spaces.Tuple((box, space))})
    move = np.zeros(2, np.float32)
    with pytest.raises(AssertionError, match=r"action/b/1: .* under"):
        assert_legal(nested, {"a": move, "b": (move, action)}, {"b": (None, mask)})


@law
@given(action_spaces, seeds)
def test_a_mask_leaves_something_to_do_and_forbids_something(space, seed):
    rng = np.random.default_rng(seed)
    masks = [draw_mask(space, rng) for _ in range(40)]
    for mask in masks[:5]:
        assert_legal(space, legal_action(space, mask, rng), mask)
    kinds = {str(mask) for mask in masks}
    assert len(kinds) > 1 or not any(map(leaves_a_choice, leaves_of(space)))


def leaves_a_choice(leaf):
    if isinstance(leaf, spaces.MultiDiscrete):
        return leaf.nvec.max() > 1
    return isinstance(leaf, spaces.MultiBinary) or (
        isinstance(leaf, spaces.Discrete) and leaf.n > 1
    )


def leaves_of(space):
    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.values() if isinstance(space, spaces.Dict) else space
        return [leaf for item in items for leaf in leaves_of(item)]
    return [space]
