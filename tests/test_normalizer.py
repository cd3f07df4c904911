import copy
import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from known_policies import observations, trained_like
from nested_spaces import batches
from policy_setup import ACTIONS, IMAGE, PLANE, THREE
from torch import nn

from ppo.policies import (
    ObservationNormalizer,
    PolicyConfig,
    TreeNormalizer,
    make_normalizer,
    make_policy,
)
from ppo.trees import leaves

BYTES = spaces.Box(0, 255, (4,), np.uint8)
NESTED = spaces.Dict(
    arm=spaces.Tuple([PLANE, IMAGE]), bytes=BYTES, goal=THREE, lights=spaces.MultiBinary(2)
)


def two_pass(batches):
    data = np.concatenate([batch.double().numpy() for batch in batches])
    return data.mean(0), data.std(0)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sampled_from([0.0, 3.0, 1e4, -1e6]),
    st.sampled_from([1e-3, 1.0, 50.0]),
    st.integers(0, 1000),
)
def test_the_normaliser_knows_mean_and_std_of_everything_it_saw(sizes, shift, scale, seed):
    rng = np.random.default_rng(seed)
    batches = [torch.from_numpy(rng.normal(shift, scale, (n, 2))).float() for n in sizes]
    normalizer = ObservationNormalizer((2,))
    for batch in batches:
        normalizer.update(batch)
    assert normalizer.count == sum(sizes)
    if sum(sizes):
        mean, std = two_pass(batches)
        np.testing.assert_allclose(normalizer.mean.numpy(), mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(normalizer.var.sqrt().numpy(), std, rtol=1e-6, atol=1e-7)


def test_what_was_seen_comes_out_with_mean_zero_and_std_one():
    data = torch.from_numpy(np.random.default_rng(0).normal(1e4, 1.0, (5000, 2))).float()
    normalizer = ObservationNormalizer((2,))
    for part in data.split(700):
        normalizer.update(part)
    out = normalizer(data)
    assert out.dtype == torch.float32
    assert out.mean(0).abs().max() < 1e-2
    assert (out.std(0) - 1.0).abs().max() < 1e-2


def test_the_normaliser_is_the_identity_before_it_saw_anything():
    obs = torch.tensor([[0.1, -9.9], [12.0, -1e9]])
    normalizer = ObservationNormalizer((2,), clip=10.0)
    expected = torch.tensor([[0.1, -9.9], [10.0, -10.0]])
    assert torch.equal(normalizer(obs), expected)
    normalizer.update(torch.zeros(0, 2))
    assert torch.equal(normalizer(obs), expected)


def test_normalised_observations_are_clipped():
    normalizer = ObservationNormalizer((1,), clip=2.0)
    normalizer.update(torch.tensor([[-1.0], [1.0]]))
    assert normalizer(torch.tensor([[-50.0], [0.5], [50.0]])).flatten().tolist() == [-2.0, 0.5, 2.0]


def test_a_constant_component_gives_finite_numbers():
    normalizer = ObservationNormalizer((2,))
    normalizer.update(torch.tensor([[5.0, 1.0], [5.0, 2.0]]))
    out = normalizer(torch.tensor([[5.0, 1.5], [5.1, 1.5]]))
    assert out[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(out).all()


@ACTIONS
def test_a_state_dict_carries_the_normaliser(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    twin = make_policy(PLANE, action_space, seed=99)
    twin.load_state_dict(policy.state_dict())
    obs = observations(PLANE)
    assert torch.equal(twin.value(obs), policy.value(obs))
    assert torch.equal(twin.act(obs, deterministic=True), policy.act(obs, deterministic=True))
    more = observations(PLANE, 30, 4)
    policy.update_normalizer(more)
    twin.update_normalizer(more)
    assert torch.equal(twin.value(obs), policy.value(obs))
    assert torch.equal(twin.normalizer.mean, policy.normalizer.mean)


def test_moments_are_kept_in_float64():
    dtypes = {name: x.dtype for name, x in ObservationNormalizer((2,)).state_dict().items()}
    assert dtypes == dict.fromkeys(("count", "mean", "var"), torch.float64)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copied_policy_is_the_same_and_independent(clone):
    policy = trained_like(make_policy(PLANE, THREE))
    twin, obs = clone(policy), observations(PLANE)
    before = policy.value(obs)
    assert torch.equal(twin.value(obs), before)
    trained_like(twin, seed=3)
    assert torch.equal(policy.value(obs), before)


def test_the_normaliser_can_be_switched_off():
    policy = make_policy(PLANE, THREE, PolicyConfig(normalize_observations=False))
    obs = observations(PLANE)
    before = policy.value(obs)
    policy.update_normalizer(obs + 50.0)
    assert torch.equal(policy.value(obs), before)
    assert not any(name.startswith("normalizer") for name in policy.state_dict())


# --- nested observations


def test_every_box_but_the_images_is_normalised_by_its_own_moments():
    normalizer = make_normalizer(NESTED, PolicyConfig(observation_clip=1.5))
    assert normalizer.paths == ("arm/0", "bytes")
    alone = [ObservationNormalizer(space.shape, 1.5) for space in (PLANE, BYTES)]
    for obs in batches(NESTED, 6, count=3):
        normalizer.update(dict(reversed(obs.items())))
        for single, leaf in zip(alone, (obs["arm"][0], obs["bytes"]), strict=True):
            single.update(leaf)
    (obs,) = batches(NESTED, 4, seed=1)
    out = normalizer(obs)
    assert torch.equal(out["arm"][0], alone[0](obs["arm"][0]))
    assert torch.equal(out["bytes"], alone[1](obs["bytes"]))
    assert out["arm"][1] is obs["arm"][1]
    assert out["goal"] is obs["goal"]
    assert out["lights"] is obs["lights"]
    assert list(out) == list(obs)


def test_what_needs_no_normalisation_passes_as_it_is():
    off = PolicyConfig(normalize_observations=False)
    for space, config in (
        (IMAGE, PolicyConfig()),
        (THREE, PolicyConfig()),
        (PLANE, off),
        (NESTED, off),
        (spaces.Dict(a=THREE, b=IMAGE), PolicyConfig()),
    ):
        normalizer = make_normalizer(space, config)
        assert type(normalizer) is nn.Identity
        (obs,) = batches(space, 3)
        assert all(map(torch.equal, leaves(normalizer(obs)), leaves(obs)))


def test_a_single_box_has_a_normaliser_under_the_names_it_always_had():
    normalizer = make_normalizer(PLANE, PolicyConfig(observation_clip=3.0))
    assert type(normalizer) is ObservationNormalizer
    assert normalizer.clip == 3.0
    assert list(normalizer.state_dict()) == ["count", "mean", "var"]
    as_numbers = PolicyConfig(encoders={"": {"kind": "flat"}})
    assert type(make_normalizer(IMAGE, as_numbers)) is ObservationNormalizer


@pytest.mark.parametrize("frames", [2, 3])
def test_frames_are_normalised_alike_and_the_newest_counts(frames):
    config = PolicyConfig(frame_stack=frames)
    normalizer, alone = make_normalizer(NESTED, config), ObservationNormalizer((3,))
    (stacked,) = batches(NESTED, 6, frames)
    (single,) = batches(NESTED, 6, seed=1)
    for obs, newest in ((stacked, stacked["arm"][0][:, -1]), (single, single["arm"][0])):
        normalizer.update(obs)
        alone.update(newest)
    assert normalizer.normalizers[0].count == 12
    out = normalizer(stacked)["arm"][0]
    assert out.shape == (6, frames, 3)
    for frame in range(frames):
        assert torch.equal(out[:, frame], alone(stacked["arm"][0][:, frame]))


def test_a_state_dict_carries_the_moments_of_every_leaf():
    normalizer, twin = (make_normalizer(NESTED, PolicyConfig()) for _ in range(2))
    assert isinstance(normalizer, TreeNormalizer)
    (obs,) = batches(NESTED, 6)
    normalizer.update(obs)
    twin.load_state_dict(normalizer.state_dict())
    assert len(normalizer.state_dict()) == 6
    assert all(map(torch.equal, leaves(twin(obs)), leaves(normalizer(obs))))
    assert not torch.equal(twin(obs)["arm"][0], obs["arm"][0])
