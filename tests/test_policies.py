import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from known_policies import CountPolicy, observations, trained_like
from policy_setup import ACTIONS, IMAGE, PAIR, PLANE, SMALL_CNN, THREE, generator, global_randomness
from torch import nn

from ppo.config import PPOConfig
from ppo.errors import ConfigError, PPOError, SpaceError
from ppo.policies import (
    MLP,
    NatureCNN,
    ObservationNormalizer,
    Policy,
    PolicyConfig,
    make_policy,
)
from ppo.policies.actor_critic import blank_policy
from ppo.policies.bodies import StridedConv2d
from ppo.policies.protocol import policy_device

SQRT2 = math.sqrt(2.0)


# --- initial weights


def assert_orthogonal(layer, gain):
    weight = layer.weight.detach().flatten(1)
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)))
    assert not layer.bias.any()


@ACTIONS
@pytest.mark.parametrize("shared", [False, True])
def test_layers_start_orthogonal_with_the_gain_of_their_role(action_space, shared):
    config = PolicyConfig(hidden_sizes=(16, 5), shared=shared, output_gain=0.03)
    policy = make_policy(PLANE, action_space, config)
    for body in (policy.actor_body, policy.critic_body):
        for layer in body:
            if isinstance(layer, nn.Linear):
                assert_orthogonal(layer, SQRT2)
    assert_orthogonal(policy.action_head.linear, 0.03)
    assert_orthogonal(policy.value_head, 1.0)


def test_convolutions_start_orthogonal_with_gain_root_two():
    encoder = NatureCNN((3, 40, 44), generator(), 16)
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [layer.weight.shape[0] for layer in layers] == [32, 64, 64, 16]
    for layer in layers:
        assert_orthogonal(layer, SQRT2)


def test_the_first_actions_hardly_depend_on_the_observation():
    policy = make_policy(PLANE, THREE)
    log_p = policy.distribution(observations(PLANE, 50)).log_p
    assert (log_p.exp() - 1 / 3).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(40, 44, 3), (3, 40, 44), (40, 44)], ids=str)
def test_floating_images_stay_as_they_are_and_are_seen_as_bytes_are(shape):
    encoder = NatureCNN(shape, generator(), 16)
    bytes_ = torch.randint(0, 256, (5, *shape), generator=generator(), dtype=torch.uint8)
    images = bytes_.float().requires_grad_()
    before = images.detach().clone()
    features = encoder(images)
    assert torch.equal(images, before)
    assert torch.equal(features, encoder(bytes_))
    features.sum().backward()
    assert images.grad.abs().max() > 0.0


@ACTIONS
def test_the_seed_and_nothing_else_decides_the_weights(action_space):
    torch.manual_seed(1)
    first = make_policy(PLANE, action_space, seed=5)
    torch.manual_seed(2)
    same, other = make_policy(PLANE, action_space, seed=5), make_policy(PLANE, action_space, seed=6)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name
    assert not torch.equal(first.actor_body[1].weight, other.actor_body[1].weight)


@pytest.mark.parametrize("space", [PLANE, IMAGE], ids=["vector", "image"])
@ACTIONS
def test_a_policy_touches_no_global_generator(space, action_space):
    before = global_randomness()
    policy = make_policy(space, action_space, SMALL_CNN)
    obs = observations(space)
    actions = policy.act(obs, generator=generator())
    policy.act(obs, deterministic=True)
    policy.act(obs, noise=torch.from_numpy(policy.draw_noise(np.random.default_rng(0), 7)))
    policy.evaluate(obs, actions)
    policy.value(obs)
    policy.snapshot()
    policy.update_normalizer(obs)
    assert global_randomness() == before


@pytest.mark.parametrize("space", [PLANE, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("shared", [False, True])
@ACTIONS
def test_a_blank_policy_draws_nothing_and_becomes_the_one_it_is_loaded_from(
    space, action_space, shared
):
    config = PolicyConfig(hidden_sizes=(8,), cnn_features=16, shared=shared)
    policy = trained_like(make_policy(space, action_space, config))
    before = global_randomness()
    blank = blank_policy(space, action_space, config, policy.state_dict())
    assert global_randomness() == before
    blank.load_state_dict(policy.state_dict())
    obs = observations(space)
    actions = policy.act(obs, generator=generator())
    for ours, theirs in zip(
        blank.evaluate(obs, actions), policy.evaluate(obs, actions), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert all(parameter.requires_grad for parameter in blank.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"value_head.bias": torch.zeros(2)}), r"value_head.bias has .*\[2\]"),
        (lambda t: t.pop("normalizer.mean"), "normalizer.mean has shape missing"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "extra has .*no such tensor"),
        (lambda t: [t.pop(name) for name in list(t)], "0 tensors for 2 hidden layers"),
    ],
)
def test_a_blank_policy_is_refused_for_the_tensors_of_another(change, words):
    tensors = make_policy(PLANE, THREE).state_dict()
    change(tensors)
    with pytest.raises(ValueError, match=words):
        blank_policy(PLANE, THREE, PolicyConfig(), tensors)


# --- shapes, spaces


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "action_space",
    [
        THREE,
        spaces.Discrete(1),
        spaces.Discrete(4, start=-2),
        spaces.Box(-1, 1, (), np.float32),
        PAIR,
        spaces.Box(-1, 1, (2, 3), np.float64),
    ],
    ids=str,
)
def test_vectors_of_any_rank_give_actions_of_any_rank(shape, action_space):
    space = spaces.Box(-1.0, 1.0, shape, np.float32)
    policy = make_policy(space, action_space)
    obs = observations(space)
    for deterministic in (False, True):
        actions = policy.act(obs, generator=generator(), deterministic=deterministic)
        assert actions.shape == (7, *action_space.shape)
        assert actions.dtype == (torch.int64 if action_space.shape is None else actions.dtype)
        log_probs, entropy, values = policy.evaluate(obs, actions)
        assert log_probs.shape == entropy.shape == values.shape == policy.value(obs).shape == (7,)
        assert torch.isfinite(torch.stack([log_probs, entropy, values])).all()


@ACTIONS
@pytest.mark.parametrize("space", [PLANE, IMAGE], ids=["vector", "image"])
def test_no_rows_in_no_rows_out(space, action_space):
    policy = make_policy(space, action_space, SMALL_CNN)
    obs = observations(space, rows=0)
    actions = policy.act(obs, generator=generator())
    assert actions.shape == (0, *action_space.shape)
    assert [len(x) for x in policy.evaluate(obs, actions)] == [0, 0, 0]
    assert len(policy.value(obs)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_observations_of_any_type_are_read_as_float32(dtype):
    policy = make_policy(PLANE, THREE)
    obs = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    assert torch.equal(policy.value(obs), policy.value(obs.float()))
    assert policy.value(obs).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1), ()], ids=str)
def test_observations_of_another_shape_are_refused(shape):
    policy = make_policy(PLANE, THREE)
    obs = torch.zeros(shape)
    for call in (policy.act, policy.value, lambda obs: policy.evaluate(obs, torch.zeros(2))):
        with pytest.raises(SpaceError, match=r"rows of shape \(3,\), got"):
            call(obs)


@pytest.mark.parametrize(
    "space",
    [spaces.Text(3), spaces.Sequence(PLANE), spaces.Dict({"a": spaces.Tuple((spaces.Text(3),))})],
    ids=str,
)
def test_an_unsupported_observation_space_is_refused(space):
    with pytest.raises(SpaceError, match=r"Text|Sequence"):
        make_policy(space, THREE)


@pytest.mark.parametrize(
    "space",
    [spaces.Text(3), spaces.Sequence(THREE), spaces.Box(0, 5, (2,), np.int64)],
    ids=str,
)
def test_an_unsupported_action_space_is_refused(space):
    with pytest.raises(SpaceError, match=type(space).__name__):
        make_policy(PLANE, space)


def test_the_default_policy_meets_the_protocol():
    assert isinstance(make_policy(PLANE, THREE), Policy)
    assert isinstance(CountPolicy(), Policy)
    assert not isinstance(nn.Linear(1, 1), Policy)


def test_the_device_of_a_policy_is_that_of_its_parameters():
    assert policy_device(make_policy(PLANE, THREE).to("meta")).type == "meta"
    assert policy_device(nn.Module()).type == "cpu"


# --- images


def test_every_layout_of_an_image_gives_the_same_features():
    rng = np.random.default_rng(0)
    first = torch.from_numpy(rng.integers(0, 256, (5, 3, 40, 44), dtype=np.uint8))
    last = first.movedim(1, -1)
    encoders = [NatureCNN(tuple(obs.shape[1:]), generator(), 16) for obs in (first, last)]
    torch.testing.assert_close(encoders[0](first), encoders[1](last))
    flat, single = NatureCNN((40, 44), generator(), 16), NatureCNN((1, 40, 44), generator(), 16)
    torch.testing.assert_close(flat(first[:, 0]), single(first[:, :1]))
    assert (encoders[0](first).std(0) > 0).any()


@pytest.mark.parametrize(
    ("kernel", "stride", "width"), [(8, 4, 44), (8, 4, 43), (4, 2, 10), (4, 2, 11), (3, 1, 9)]
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_strided_convolution_is_a_convolution(kernel, stride, width, memory):
    layer = StridedConv2d(3, 5, kernel, stride, scale=0.25).double()
    images = torch.randn(2, 3, 40, width, dtype=torch.float64).to(memory_format=memory)
    inputs, same = images.clone().requires_grad_(), images.clone().requires_grad_()
    outputs = layer(inputs)
    wanted = nn.functional.conv2d(0.25 * same, layer.weight, layer.bias, stride)
    torch.testing.assert_close(outputs, wanted)
    slopes = torch.randn_like(wanted)
    found = torch.autograd.grad(outputs, [inputs, *layer.parameters()], slopes)
    exact = torch.autograd.grad(wanted, [same, *layer.parameters()], slopes)
    torch.testing.assert_close(found, exact)


def test_a_strided_convolution_moves_no_images(monkeypatch):
    layer, given = StridedConv2d(4, 5, 8, 4), []
    images = torch.randn(2, 4, 44, 44).to(memory_format=torch.channels_last)
    plain = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, "conv2d", lambda x, *rest: (given.append(x), plain(x, *rest))[1]
    )
    layer(images)
    assert given[0].data_ptr() == images.data_ptr()
    assert given[0].shape == (2, 16, 44, 11)


def relative_error(numbers, truth):
    return float((numbers - truth).detach().norm() / truth.detach().norm())


def by_definition(encoder, obs, gates=(None,) * 4):
    """Features of images `[B, C, H, W]` in double precision, and what they come from.

    With gates given, units are rectified where these are shut, whatever their sign.

    Returns:
        Features, parameters, and the gates: where each layer's units are above 0.
    """
    weights = [p.detach().double().requires_grad_() for p in encoder.parameters()]
    x, found = obs.double() / 255.0, []
    pairs = zip(weights[::2], weights[1::2], strict=True)
    for (weight, bias), stride, gate in zip(pairs, (4, 2, 1, None), gates, strict=True):
        if stride is None:
            x = nn.functional.linear(x.flatten(1), weight, bias)
        else:
            x = nn.functional.conv2d(x, weight, bias, stride)
        found.append(x > 0.0 if gate is None else gate.reshape(x.shape))
        x = x * found[-1]
    return x, weights, found


# Half precision rounds by 0.4 % at most. A gate that this opens or shuts lets a whole gradient
# through or not: they are few, and change the gradient by 6 to 25 % (that of plain autocast by the
# same). So gates and gradients are looked at separately.
@pytest.mark.parametrize(
    ("precision", "least", "most", "most_moved"),
    [("float32", 0.0, 1e-5, 1e-4), ("bfloat16", 1e-3, 0.01, 0.01)],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_encoder_sees_pixels_between_zero_and_one_and_rounds_to_its_precision(
    channels, precision, least, most, most_moved
):
    encoder = NatureCNN((channels, 40, 44), generator(), 16, precision)
    rng = np.random.default_rng(0)
    obs = torch.from_numpy(rng.integers(0, 256, (64, channels, 40, 44), np.uint8))
    slopes = torch.from_numpy(rng.standard_normal((64, 16)))
    gates = []
    for module in encoder.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, units: gates.append(units > 0.0))
    features = encoder(obs)
    features.backward(slopes.float())
    truth, _, exact_gates = by_definition(encoder, obs)
    assert features.dtype == torch.float32
    assert least <= relative_error(features, truth) <= most
    for ours, exact in zip(gates, exact_gates, strict=True):
        assert (ours.reshape(exact.shape) != exact).float().mean() <= most_moved
    through_them, weights, _ = by_definition(encoder, obs, gates)
    through_them.backward(slopes)
    for parameter, weight in zip(encoder.parameters(), weights, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert least <= relative_error(parameter.grad, weight.grad) <= most


@pytest.mark.parametrize("shape", [(3, 35, 64), (64, 35, 3), (35, 35)], ids=str)
def test_an_image_too_small_for_the_encoder_is_refused_with_a_remedy(shape):
    space = spaces.Box(0, 255, shape, np.uint8)
    with pytest.raises(ValueError, match=r"at least 36 x 36 pixels, got .*FlattenObservation"):
        make_policy(space, THREE)


@pytest.mark.parametrize("hidden_sizes", [(), (8,), (8, 4)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_an_image_may_go_through_further_layers(hidden_sizes, shared):
    config = PolicyConfig(hidden_sizes=hidden_sizes, cnn_features=16, shared=shared)
    policy = make_policy(IMAGE, THREE, config)
    assert policy.action_head.linear.in_features == (*(16,), *hidden_sizes)[-1]
    obs = observations(IMAGE)
    assert policy.evaluate(obs, policy.act(obs, deterministic=True)).values.shape == (7,)


def test_a_byte_vector_is_no_image():
    space = spaces.Box(0, 255, (128,), np.uint8)
    policy = trained_like(make_policy(space, THREE))
    assert isinstance(policy.actor_body, MLP)
    assert isinstance(policy.normalizer, ObservationNormalizer)
    assert policy.act(observations(space), deterministic=True).shape == (7,)


# --- separate and shared bodies


@ACTIONS
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("space", [PLANE, IMAGE], ids=["vector", "image"])
def test_the_groups_of_parameters_hold_each_parameter_once(space, action_space, shared):
    config = PolicyConfig(hidden_sizes=(8,), cnn_features=16, shared=shared)
    policy = make_policy(space, action_space, config)
    groups = policy.parameter_groups()
    assert sorted(groups) == (["policy"] if shared else ["actor", "critic"])
    ids = [id(parameter) for group in groups.values() for parameter in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in policy.parameters()}


@pytest.mark.parametrize("shared", [False, True])
def test_only_a_shared_body_learns_from_both_losses(shared):
    policy = make_policy(PLANE, THREE, PolicyConfig(shared=shared))
    obs = observations(PLANE)
    policy.value(obs).sum().backward()
    touched = {name for name, p in policy.named_parameters() if p.grad is not None}
    actor = {name for name in touched if name.startswith("actor_body")}
    assert bool(actor) is shared
    assert "value_head.weight" in touched
    assert "action_head.linear.weight" not in touched


def test_a_shared_policy_is_smaller_by_one_body():
    sizes = [
        sum(p.numel() for p in make_policy(PLANE, THREE, PolicyConfig(shared=shared)).parameters())
        for shared in (False, True)
    ]
    assert sizes[0] - sizes[1] == 3 * 64 + 64 + 64 * 64 + 64


# --- acting


@ACTIONS
def test_a_deterministic_action_is_the_mode(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    obs = observations(PLANE)
    expected = policy.distribution(obs).mode()
    assert torch.equal(policy.act(obs, deterministic=True), expected)


@ACTIONS
def test_an_action_is_a_function_of_its_row_and_its_noise(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    obs = observations(PLANE)
    noise = torch.from_numpy(policy.draw_noise(np.random.default_rng(0), 7))
    together = policy.act(obs, noise=noise)
    apart = torch.cat([policy.act(obs[n : n + 1], noise=noise[n : n + 1]) for n in range(7)])
    torch.testing.assert_close(together, apart)
    assert not together.requires_grad


@ACTIONS
def test_the_generator_decides_the_actions(action_space):
    policy = make_policy(PLANE, action_space)
    obs = observations(PLANE, 50)
    draws = [policy.act(obs, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    shuffle = generator()
    assert not torch.equal(policy.act(obs, generator=shuffle), policy.act(obs, generator=shuffle))


def test_discrete_actions_come_with_their_probabilities():
    policy = trained_like(make_policy(PLANE, THREE))
    obs = observations(PLANE, 1).expand(30_000, 3)
    counts = torch.bincount(policy.act(obs, generator=generator()), minlength=3) / 30_000
    expected = policy.distribution(obs[:1]).log_p.exp()[0]
    assert (counts - expected).abs().max() < 0.015


@ACTIONS
@pytest.mark.parametrize("shared", [False, True])
def test_evaluate_says_what_the_distribution_and_the_value_say(action_space, shared):
    policy = trained_like(make_policy(PLANE, action_space, PolicyConfig(shared=shared)))
    obs = observations(PLANE)
    actions = policy.act(obs, generator=generator())
    log_probs, entropy, values = policy.evaluate(obs, actions)
    distribution = policy.distribution(obs)
    assert torch.equal(log_probs, distribution.log_prob(actions))
    assert torch.equal(entropy, distribution.entropy())
    assert torch.equal(values, policy.value(obs))
    assert log_probs.requires_grad
    assert values.requires_grad
    spared = policy.evaluate(obs, actions, entropy=False)
    assert torch.equal(spared.log_probs, log_probs)
    assert torch.equal(spared.values, values)
    assert len(spared.entropy) == 0


@ACTIONS
def test_acting_and_evaluating_leave_the_policy_alone(action_space):
    policy = trained_like(make_policy(PLANE, action_space))
    before = copy.deepcopy(policy.state_dict())
    obs = 100.0 * observations(PLANE)
    actions = policy.act(obs, generator=generator())
    policy.evaluate(obs, actions)
    policy.value(obs)
    policy.snapshot()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --- log_std


@pytest.mark.parametrize("drifted", [-1000.0, -7.0, -5.0, 0.3, 2.0, 9.0, 1000.0])
def test_the_log_std_in_use_stays_within_its_bounds_and_can_come_back(drifted):
    policy = make_policy(PLANE, PAIR)
    head = policy.action_head
    with torch.no_grad():
        head.log_std.fill_(drifted)
    used = head.bounded_log_std()
    torch.testing.assert_close(used, torch.full((2,), min(max(drifted, -5.0), 2.0)))
    used.sum().backward()
    assert torch.equal(head.log_std.grad, torch.ones(2))
    obs = observations(PLANE)
    evaluation = policy.evaluate(obs, policy.act(obs, generator=generator()))
    assert all(torch.isfinite(x).all() for x in evaluation)


def test_the_initial_log_std_is_the_configured_one():
    policy = make_policy(PLANE, PAIR, PolicyConfig(log_std_init=-1.25))
    assert policy.distribution(observations(PLANE)).log_std.tolist() == [-1.25, -1.25]


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"hidden_sizes": (64, 0)}, "hidden_sizes"),
        ({"hidden_sizes": (-1,)}, "hidden_sizes"),
        ({"activation": "sigmoidal"}, "activation"),
        ({"memory": "rnn"}, "memory"),
        ({"memory": "attention", "memory_size": 6}, "memory_size"),
        ({"memory_window": 0}, "memory_window"),
        ({"memory_steps": 0}, "memory_steps"),
        ({"frame_stack": 0}, "frame_stack"),
        ({"state_dependent_std": True, "distribution": "beta"}, "state_dependent_std"),
        ({"shared": True, "critic_only": ("a",)}, "critic_only"),
        ({"shared": True, "critic_hidden_sizes": (4,)}, "critic_hidden_sizes"),
        ({"encoders": {"a": {"kind": "rnn"}}}, "encoders: 'a'"),
        ({"encoders": {"a": {"features": 0}}}, "encoders: 'a'"),
        ({"encoders": {"a": 3}}, "encoders: 'a'"),
        ({"distribution": "gauss"}, "distribution"),
        ({"cnn_features": 0}, "cnn_features"),
        ({"output_gain": 0.0}, "output_gain"),
        ({"output_gain": float("nan")}, "output_gain"),
        ({"observation_clip": -1.0}, "observation_clip"),
        ({"log_std_init": 3.0}, "log_std_init"),
        ({"log_std_init": float("nan")}, "log_std_init"),
        ({"log_std_min": 0.0, "log_std_max": -1.0}, "log_std_init"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings, culprit):
    with pytest.raises(ConfigError, match=culprit) as caught:
        PolicyConfig(**settings)
    assert isinstance(caught.value, PPOError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("config", [PPOConfig(), {"memory": "lstm"}, None])
def test_a_config_of_another_kind_is_refused(config):
    with pytest.raises(TypeError, match=r"must be a PolicyConfig, got \w+; .*config.policy"):
        make_policy(PLANE, THREE, config)
