import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from known_policies import observations, trained_like
from policy_setup import ACTIONS, IMAGE, PAIR, PLANE, SMALL_CNN, THREE, generator
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from ppo.distributions import Categorical
from ppo.policies import (
    MLP,
    ActorCritic,
    PolicyConfig,
    make_policy,
)
from ppo.policies.bodies import NatureCNN
from ppo.policies.heads import CategoricalHead

small_policies = st.builds(
    lambda sizes, activation, normalize, clip, shared, obs_shape, action_space: make_policy(
        spaces.Box(-1.0, 1.0, obs_shape, np.float32),
        action_space,
        PolicyConfig(
            hidden_sizes=sizes,
            activation=activation,
            normalize_observations=normalize,
            observation_clip=clip,
            shared=shared,
        ),
    ),
    st.lists(st.sampled_from([1, 8, 32]), max_size=3).map(tuple),
    st.sampled_from(["tanh", "relu"]),
    st.booleans(),
    st.sampled_from([10.0, 1.0]),
    st.booleans(),
    st.sampled_from([(1,), (3,), (2, 3)]),
    st.sampled_from([THREE, spaces.Discrete(1), PAIR, spaces.Box(-1, 1, (2, 2), np.float32)]),
)


@settings(max_examples=60)
@given(small_policies, st.integers(0, 1000), st.integers(1, 40))
def test_a_snapshot_picks_the_actions_of_its_policy(policy, seed, rows):
    trained_like(policy, seed)
    obs = 3.0 * observations(policy.observation_space, rows, seed)
    noise = policy.draw_noise(np.random.default_rng(seed), rows)
    kept_obs, kept_noise = obs.clone(), noise.copy()
    expected = policy.act(obs, noise=torch.from_numpy(noise)).numpy()
    actions = policy.snapshot()(obs.numpy(), noise)
    assert actions.shape == expected.shape
    assert torch.equal(obs, kept_obs)
    np.testing.assert_array_equal(noise, kept_noise)
    if isinstance(policy.action_space, spaces.Box):
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-5)
        return
    scores = (policy.distribution(obs).log_p.detach() + torch.from_numpy(noise)).numpy()
    chosen, best = (scores[np.arange(rows), a] for a in (actions, expected))
    np.testing.assert_allclose(chosen, best, atol=1e-4, err_msg="no near tie")


@settings(max_examples=40)
@given(small_policies, st.integers(0, 1000), st.integers(2, 32), st.data())
def test_a_row_of_a_snapshot_depends_neither_on_other_rows_nor_on_their_number(
    policy, seed, rows, data
):
    """What makes results independent of who acts for which of the rows, bit for bit."""
    trained_like(policy, seed)
    obs = observations(policy.observation_space, rows, seed).numpy()
    noise = policy.draw_noise(np.random.default_rng(seed), rows)
    whole = policy.snapshot()(obs, noise).copy()
    first = data.draw(st.integers(0, rows - 1))
    own = slice(first, data.draw(st.integers(first + 1, rows)))
    actor = pickle.loads(pickle.dumps(policy.snapshot()))
    assert actor.row_wise
    np.testing.assert_array_equal(actor(obs[own], noise[own]), whole[own])


@ACTIONS
def test_a_rollout_of_a_snapshot_is_step_after_step(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    actor, rng = policy.snapshot(), np.random.default_rng(0)
    noise = np.stack([policy.draw_noise(rng, 7) for _ in range(5)])
    act = actor.for_rollout(noise)
    for t in (0, 3, 1):
        obs = observations(PLANE, seed=t).numpy()
        np.testing.assert_array_equal(act(obs, t), actor(obs, noise[t]))


@ACTIONS
def test_a_snapshot_is_a_copy(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    obs = observations(PLANE).numpy()
    noise = policy.draw_noise(np.random.default_rng(0), 7)
    actor = policy.snapshot()
    before = actor(obs, noise).copy()
    trained_like(policy, seed=5)
    np.testing.assert_array_equal(actor(obs, noise), before)


@ACTIONS
def test_actions_of_a_snapshot_are_not_overwritten_by_the_next_call(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    actor, rng = policy.snapshot(), np.random.default_rng(0)
    first = actor(observations(PLANE).numpy(), policy.draw_noise(rng, 7))
    kept = first.copy()
    actor(observations(PLANE, seed=1).numpy(), policy.draw_noise(rng, 7))
    np.testing.assert_array_equal(first, kept)


def test_a_snapshot_takes_the_bounded_std():
    policy = make_policy(PLANE, PAIR)
    with torch.no_grad():
        policy.action_head.log_std.fill_(50.0)
    obs, noise = np.zeros((2, 3), np.float32), np.ones((2, 2), np.float32)
    np.testing.assert_allclose(policy.snapshot()(obs, noise), math.exp(2.0), rtol=1e-5)


class DoublingMLP(MLP):
    def forward(self, x):
        return 2.0 * super().forward(x)


class DarkerCNN(NatureCNN):
    def forward(self, obs):
        return 0.5 * super().forward(obs)


class SharperHead(CategoricalHead):
    def forward(self, features):
        return Categorical(5.0 * self.linear(features))


class CautiousPolicy(ActorCritic):
    """A user's subclass that acts in its own way."""

    def act(self, obs, **arguments):
        return torch.zeros_like(super().act(obs, **arguments))


class TemperedPolicy(ActorCritic):
    """A user's subclass with a distribution of its own."""

    def distribution(self, obs):
        distribution = super().distribution(obs)
        distribution.log_p = torch.log_softmax(distribution.log_p / 5.0, -1)
        return distribution


def double(module):
    """Let a module return twice what it computes."""
    module.register_forward_hook(lambda module, inputs, output: 2.0 * output)


def double_inputs(module):
    module.register_forward_pre_hook(lambda module, inputs: (2.0 * inputs[0],))


def replace_method(module, name):
    method = getattr(module, name)
    setattr(module, name, lambda *args: method(*args) * 2.0)


def prune_linear(policy):
    prune.l1_unstructured(policy.actor_body[1], "weight", amount=0.5)


def detach_weight(linear):
    """What an older pruning leaves behind: a tensor that is no parameter."""
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.weight = weight


def without_bias(policy):
    policy.actor_body[1] = nn.Linear(3, 64, bias=False)


def with_another_parameter(policy):
    linear = policy.actor_body[1]
    linear.weight = type("Quantized", (nn.Parameter,), {})(linear.weight.detach())


CHANGES_OF_VECTORS = {
    "hook": lambda policy: double(policy.actor_body),
    "hook of a layer": lambda policy: double(policy.actor_body[1]),
    "hook of inputs": lambda policy: double_inputs(policy.actor_body[3]),
    "hook of an activation": lambda policy: double(policy.actor_body[4]),
    "hook of a normaliser": lambda policy: double(policy.normalizer),
    "hook of a head": lambda policy: double(policy.action_head.linear),
    "forward of its own": lambda policy: replace_method(policy.actor_body[1], "forward"),
    "act of its own": lambda policy: replace_method(policy, "act"),
    "distribution of its own": lambda policy: replace_method(policy, "distribution"),
    "std of its own": lambda policy: replace_method(policy.action_head, "bounded_log_std"),
    "pruned layer": prune_linear,
    "pruned std": lambda policy: prune.l1_unstructured(policy.action_head, "log_std", 0.5),
    "parametrised layer": lambda policy: weight_norm(policy.actor_body[1]),
    "weight that is no parameter": lambda policy: detach_weight(policy.actor_body[1]),
    "parameter of a subclass": with_another_parameter,
    "layer without bias": without_bias,
}
CHANGES_OF_MEMORY = {
    "hook of the core": lambda policy: double(policy.actor_memory.core),
    "hook of the critic": lambda policy: double(policy.critic_body[1]),
    "step of its own": lambda policy: replace_method(policy.critic_memory, "step"),
    "pruned core": lambda policy: prune.l1_unstructured(
        policy.actor_memory.core, "weight_hh_l0", amount=0.5
    ),
}
CHANGES_OF_IMAGES = {
    "hook": lambda policy: double(policy.actor_body),
    "hook of a convolution": lambda policy: double(policy.actor_body[0].convolutions[0]),
    "hook of hidden layers": lambda policy: double(policy.actor_body[1]),
    "hook of a head": lambda policy: double(policy.action_head.linear),
    "pruned convolution": lambda policy: prune.l1_unstructured(
        policy.actor_body[0].convolutions[0], "weight", amount=0.5
    ),
    "weight that is no parameter": lambda policy: detach_weight(
        policy.actor_body[0].convolutions[0]
    ),
    "parametrised layer": lambda policy: weight_norm(policy.actor_body[0].linear[0]),
}


def unusual_policies():
    for activation in ("elu", "gelu", "silu"):
        yield activation, make_policy(PLANE, THREE, PolicyConfig(activation=activation))
    yield "large", make_policy(PLANE, THREE, PolicyConfig(hidden_sizes=(256, 256)))
    yield "stacked vectors", make_policy(PLANE, THREE, PolicyConfig(frame_stack=2))
    yield (
        "image and memory",
        make_policy(IMAGE, THREE, dataclasses.replace(SMALL_CNN, memory="lstm")),
    )
    policy = make_policy(IMAGE, THREE, SMALL_CNN)
    policy.actor_body.convolutions[2] = nn.Conv2d(32, 64, 4, 2, padding_mode="circular")
    yield "foreign convolution", policy
    policy = make_policy(IMAGE, THREE, SMALL_CNN)
    policy.actor_body.linear.append(nn.Dropout(0.5))
    yield "layer behind an encoder", policy
    policy = make_policy(IMAGE, THREE, SMALL_CNN)
    policy.normalizer = nn.LayerNorm(44)
    yield "normalised image", policy
    yield "image in float64", make_policy(IMAGE, THREE, SMALL_CNN).double()
    policy = make_policy(IMAGE, THREE, SMALL_CNN)
    policy.actor_body = DarkerCNN(IMAGE.shape, generator(), 16)
    yield "subclass of an encoder", policy
    policy = make_policy(PLANE, THREE)
    policy.actor_body = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64))
    yield "foreign body", policy
    policy = make_policy(PLANE, THREE)
    policy.actor_body.append(nn.Dropout(0.5))
    yield "appended layer", policy
    policy = make_policy(PLANE, THREE)
    policy.actor_body.append(nn.Linear(64, 64))
    yield "two linear layers in a row", policy
    policy = make_policy(PLANE, THREE)
    policy.actor_body.insert(0, nn.Tanh())
    yield "activation first", policy
    policy = make_policy(PLANE, THREE)
    policy.action_head = SharperHead(THREE, 64, PolicyConfig(), generator())
    yield "subclass of a head", policy
    policy = make_policy(PLANE, THREE)
    policy.normalizer = nn.LayerNorm(3)
    yield "foreign normaliser", policy
    policy = make_policy(PLANE, THREE)
    policy.actor_body = DoublingMLP(3, (64,), "tanh", generator())
    yield "subclass of MLP", policy
    for name, change in CHANGES_OF_VECTORS.items():
        for memory in (None, "lstm", "gru"):
            policy = make_policy(PLANE, PAIR, PolicyConfig(memory=memory))
            change(policy)
            yield f"{name}, memory {memory}", policy
    for name, change in CHANGES_OF_MEMORY.items():
        for memory in ("lstm", "gru"):
            policy = make_policy(PLANE, PAIR, PolicyConfig(memory=memory))
            change(policy)
            yield f"{name}, {memory}", policy
    for name, change in CHANGES_OF_IMAGES.items():
        policy = make_policy(IMAGE, THREE, dataclasses.replace(SMALL_CNN, hidden_sizes=(8,)))
        change(policy)
        yield f"{name}, image", policy
    for subclass in (CautiousPolicy, TemperedPolicy):
        yield subclass.__name__, subclass(PLANE, THREE, PolicyConfig(), generator())


@pytest.mark.parametrize(
    "policy", [pytest.param(policy, id=name) for name, policy in unusual_policies()]
)
def test_what_is_no_small_plain_mlp_has_no_snapshot(policy):
    """A snapshot that computes something else than its policy would collect foreign actions."""
    assert policy.snapshot() is None


def test_a_hook_of_all_modules_forbids_a_snapshot():
    policy = make_policy(PLANE, THREE)
    with register_module_forward_hook(lambda module, inputs, output: None):
        assert policy.snapshot() is None
    assert policy.snapshot() is not None
