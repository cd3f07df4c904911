"""Actors of images: the encoder of their policy, frozen, and the same choice of actions."""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from gymnasium import spaces
from known_policies import observations, trained_like
from policy_setup import IMAGE, PAIR, THREE
from torch import nn

from ppo import PolicyConfig, make_policy
from ppo.policies.image_actor import ImageActor

SHAPES = {"first": IMAGE, "last": spaces.Box(0, 255, (40, 44, 3), np.uint8), "none": None}


def image_policy(space=IMAGE, actions=THREE, **options):
    config = PolicyConfig(**{"hidden_sizes": (), "cnn_features": 16, **options})
    return trained_like(
        make_policy(space or spaces.Box(0, 255, (40, 44), np.uint8), actions, config)
    )


def given(policy, rows=7, seed=0):
    """Observations, stacked as the policy takes them, and noise."""
    frames = [
        observations(policy.observation_space, rows, seed + k) for k in range(policy.frame_stack)
    ]
    obs = torch.stack(frames, 1) if policy.frame_stack > 1 else frames[0]
    return obs, policy.draw_noise(np.random.default_rng(seed), rows)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden_sizes", [(), (8,)], ids=str)
@pytest.mark.parametrize("actions", [THREE, PAIR], ids=["discrete", "box"])
@pytest.mark.parametrize("frame_stack", [1, 3])
@pytest.mark.parametrize("channels", SHAPES)
def test_it_picks_the_actions_of_its_policy(
    channels, frame_stack, actions, hidden_sizes, precision
):
    policy = image_policy(
        SHAPES[channels],
        actions,
        frame_stack=frame_stack,
        hidden_sizes=hidden_sizes,
        precision=precision,
    )
    obs, noise = given(policy)
    actor = policy.snapshot()
    assert isinstance(actor, ImageActor)
    chosen = actor(obs.numpy(), noise)
    with torch.no_grad():
        expected = policy.act(obs, noise=torch.from_numpy(noise)).numpy()
    if actions is PAIR:
        np.testing.assert_allclose(chosen, expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_its_features_are_those_of_the_policy_bit_for_bit(precision):
    policy = image_policy(precision=precision)
    obs, _ = given(policy)
    wanted = policy.actor_body(obs)
    assert torch.equal(policy.snapshot()._encoder(obs), wanted)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("frame_stack", [1, 3])
def test_one_that_was_sent_acts_alike_and_shares_no_memory(precision, frame_stack):
    policy = image_policy(precision=precision, frame_stack=frame_stack, hidden_sizes=(8,))
    obs, noise = given(policy)
    actor = policy.snapshot()
    sent = bytes(ForkingPickler.dumps(actor, 5))
    assert b"rebuild_storage" not in sent  # as multiprocessing sends tensors
    again = pickle.loads(sent)
    assert torch.equal(again._encoder(obs), actor._encoder(obs))
    np.testing.assert_array_equal(again(obs.numpy(), noise), actor(obs.numpy(), noise))


def test_it_is_a_copy():
    policy = image_policy(actions=PAIR)
    obs, noise = given(policy)
    actor = policy.snapshot()
    before = actor(obs.numpy(), noise).copy()
    trained_like(policy, seed=5)
    np.testing.assert_array_equal(actor(obs.numpy(), noise), before)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_it_converts_no_weights_when_it_acts():
    actor = image_policy(precision="bfloat16").snapshot()
    assert {tensor.dtype for tensor in actor._encoder.parameters()} == {torch.bfloat16}


def test_it_multiplies_and_moves_no_weights_when_it_acts():
    actor = image_policy().snapshot()
    for one in (actor, pickle.loads(pickle.dumps(actor))):
        layers = [part for part in one._encoder.modules() if isinstance(part, nn.Conv2d)]
        assert [layer.scale for layer in layers] == [1.0, 1.0, 1.0]
        for layer in layers:
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_it_acts_on_one_thread_and_leaves_the_setting_alone(monkeypatch):
    policy, before = image_policy(), torch.get_num_threads()
    obs, noise = given(policy)
    actor, counts = policy.snapshot(), []
    actor._encoder.register_forward_hook(lambda *_: counts.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        actor(obs.numpy(), noise)
        assert (counts, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
