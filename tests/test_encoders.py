import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_spaces import batches, observation_spaces
from policy_setup import generator, global_randomness
from strategies import law, seeds
from torch import nn

from ppo.errors import ConfigError, SpaceError
from ppo.policies import MLP, NatureCNN, PolicyConfig, TreeEncoder, make_body, make_encoder
from ppo.policies.encoders import Chain, EmbeddingEncoder, FlatEncoder, OneHotEncoder
from ppo.policies.tanh import Tanh
from ppo.spaces import sub_spaces
from ppo.trees import leaves, leaves_with_paths, map_tree, rebuild

CAMERA = spaces.Box(0, 255, (36, 36, 3), np.uint8)
ROBOT = spaces.Dict(
    arm=spaces.Dict(camera=CAMERA, joints=spaces.Box(-1.0, 1.0, (2, 2))),
    goal=spaces.Discrete(3, start=1),
    lights=spaces.MultiBinary(2),
)
SMALL = {"cnn_features": 4, "hidden_sizes": (5,)}


def encode(space, config, leaf):
    return make_encoder(space, config, generator())(leaf)


def changed(leaf):
    """Another value at every place, valid for every space that has two."""
    if leaf.dtype == torch.uint8:
        return 255 - leaf
    return 1 - leaf if leaf.dtype in (torch.int8, torch.int64) else leaf + 1.0


def binary_classes(space):
    """The space with two classes wherever there are classes, so that `changed` stays in it."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: binary_classes(item) for key, item in space.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([binary_classes(item) for item in space])
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(2)
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(np.full(space.shape, 2))
    return space


@st.composite
def configs(draw, space):
    """A fitting kind for every leaf, a few frames."""
    fitting = {
        spaces.Discrete: ["one_hot", "embedding", "mlp", None],
        spaces.MultiDiscrete: ["one_hot", "embedding", "mlp", None],
        spaces.MultiBinary: ["flat", "mlp", None],
        spaces.Box: ["flat", "mlp", None],
    }
    encoders = {
        path: {"kind": draw(st.sampled_from(fitting[type(leaf)]))}
        for path, leaf in leaves_with_paths(sub_spaces(space))
    }
    frames = draw(st.sampled_from([1, 1, 3]))
    return PolicyConfig(encoders=encoders, frame_stack=frames, **SMALL)


@settings(law, max_examples=40)
@given(st.data(), seeds)
def test_every_leaf_reaches_its_own_features_and_no_others(data, seed):
    space = binary_classes(data.draw(observation_spaces()))
    config = data.draw(configs(space))
    encoder = make_encoder(space, config, generator())
    (obs,) = batches(space, 3, config.frame_stack, seed)
    before = encoder(obs)
    assert before.dtype == torch.float32
    assert before.shape == (3, encoder.num_features)
    bare = not isinstance(encoder, TreeEncoder)
    parts = [encoder] if bare else encoder.encoders
    ends = np.cumsum([part.num_features for part in parts])
    for index, (part, end) in enumerate(zip(parts, ends, strict=True)):
        values = leaves(obs)
        values[index] = changed(values[index])
        moved = (encoder(rebuild(obs, values)) != before).any(0)
        own = slice(end - part.num_features, end)
        assert moved[own].any()
        assert moved.sum() == moved[own].sum()


@settings(law, max_examples=40)
@given(st.data(), seeds)
def test_skipped_leaves_do_not_reach_and_need_not_be_there(data, seed):
    space = spaces.Dict(
        seen=data.draw(observation_spaces()), unseen=data.draw(observation_spaces())
    )
    config = PolicyConfig(critic_only=("unseen",), **SMALL)
    actor = make_encoder(space, config, generator(), skip=config.critic_only)
    critic = make_encoder(space, config, generator())
    one, other = batches(space, 3, 1, seed, 2)
    assert torch.equal(actor(one), actor({"seen": one["seen"]}))
    assert torch.equal(actor(one), actor({"unseen": other["unseen"], "seen": one["seen"]}))
    width = actor.num_features
    assert torch.equal(critic(one)[:, :width], actor(one))
    assert critic.num_features > width


def test_a_group_and_a_single_leaf_can_be_skipped():
    whole = ("arm/camera", "arm/joints", "goal", "lights")
    for skip, paths in (
        ((), whole),
        (("arm",), whole[2:]),
        (("arm/camera", "lights"), ("arm/joints", "goal")),
    ):
        encoder = make_encoder(ROBOT, PolicyConfig(critic_only=skip, **SMALL), None, skip=skip)
        assert encoder.paths == paths
    named_alike = spaces.Dict(arm=spaces.Discrete(2), arms=spaces.Discrete(2))
    assert make_encoder(named_alike, PolicyConfig(), None, skip=["arm"]).paths == ("arms",)


def test_the_order_of_keys_in_an_observation_does_not_matter():
    encoder = make_encoder(ROBOT, PolicyConfig(**SMALL), generator())
    (obs,) = batches(ROBOT, 2)
    assert torch.equal(encoder(dict(reversed(obs.items()))), encoder(obs))


def test_one_hot_counts_positions_on():
    obs = torch.tensor([2, 0])
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.equal(encode(spaces.Discrete(3, start=5), PolicyConfig(), obs), expected)
    many = spaces.MultiDiscrete(np.array([[2, 3], [1, 2]]))
    obs = torch.tensor([[[1, 2], [0, 0]], [[0, 1], [0, 1]]])
    expected = torch.tensor([[0, 1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 1]]).float()
    assert torch.equal(encode(many, PolicyConfig(), obs), expected)
    frames = encode(many, PolicyConfig(frame_stack=2), torch.stack([obs, obs.flip(0)], 1))
    assert torch.equal(frames, torch.cat([expected, expected.flip(0)], 1))


def test_an_embedding_looks_up_a_vector_for_each_position():
    space = spaces.MultiDiscrete([2, 3])
    config = PolicyConfig(encoders={"": {"kind": "embedding", "features": 4}}, frame_stack=2)
    encoder = make_encoder(space, config, generator())
    obs = torch.tensor([[[1, 0], [0, 2]]])
    table = encoder.table.weight
    assert table.shape == (5, 4)
    assert torch.equal(encoder(obs), torch.cat([table[[1, 2]], table[[0, 4]]]).reshape(1, -1))
    encoder(obs).sum().backward()
    assert (table.grad.abs().sum(1) > 0).tolist() == [True, True, True, False, True]


def test_embeddings_begin_standard_normal():
    config = PolicyConfig(encoders={"": {"kind": "embedding", "features": 32}})
    table = make_encoder(spaces.Discrete(500), config, generator()).table.weight
    assert abs(table.mean()) < 0.03
    assert abs(table.std() - 1.0) < 0.03


@pytest.mark.parametrize(
    ("space", "obs", "features"),
    [
        (spaces.Box(-1.0, 1.0, ()), torch.tensor([0.5, -0.5]), [[0.5], [-0.5]]),
        (spaces.Box(-9.0, 9.0, (2, 1)), torch.tensor([[[1.0], [2.0]]]), [[1.0, 2.0]]),
        (spaces.Box(0, 255, (2,), np.uint8), torch.tensor([[255, 7]]).byte(), [[255.0, 7.0]]),
        (spaces.MultiBinary(3), torch.tensor([[1, 0, 1]]).to(torch.int8), [[1.0, 0.0, 1.0]]),
        (spaces.MultiBinary((1, 2)), torch.tensor([[[0, 1]]]).to(torch.int8), [[0.0, 1.0]]),
    ],
    ids=str,
)
def test_numbers_stay_as_they_are(space, obs, features):
    expected = torch.tensor(features)
    assert torch.equal(encode(space, PolicyConfig(), obs), expected)
    body = make_body(space, PolicyConfig(), (), generator())
    assert torch.equal(body(obs), expected)
    assert body(obs).dtype == torch.float32
    assert body.num_features == expected.shape[1]
    stacked = torch.stack([obs, obs], 1)
    stack = PolicyConfig(frame_stack=2)
    assert torch.equal(encode(space, stack, stacked), torch.cat([expected, expected], 1))


def test_a_batch_may_be_empty():
    config = PolicyConfig(encoders={"goal": {"kind": "embedding"}}, **SMALL)
    (obs,) = batches(ROBOT, 2)
    encoder = make_encoder(ROBOT, config, generator())
    assert encoder(map_tree(lambda leaf: leaf[:0], obs)).shape == (0, encoder.num_features)


@pytest.mark.parametrize("shape", [(2, 36, 40), (36, 40, 2), (36, 40)], ids=str)
def test_frames_of_an_image_are_channels(shape):
    frames, pixels = 3, np.random.default_rng(0).integers(0, 256, (5, 3, *shape), np.uint8)
    config = PolicyConfig(frame_stack=frames, cnn_features=8)
    encoder = make_encoder(spaces.Box(0, 255, shape, np.uint8), config, generator())
    images = torch.from_numpy(pixels)
    if shape == (36, 40, 2):
        joined = images.movedim(-1, 2).flatten(1, 2)
    else:
        joined = images.reshape(5, -1, 36, 40)
    single = NatureCNN(tuple(joined.shape[1:]), generator(), 8)
    torch.testing.assert_close(encoder(images), single(joined))


def test_a_layer_on_top_has_the_width_and_activation_asked_for():
    config = PolicyConfig(encoders={"goal": {"kind": "mlp", "features": 7}}, activation="relu")
    encoder = make_encoder(spaces.Dict(goal=ROBOT["goal"]), config, generator())
    ((one_hot, layers),) = encoder.encoders
    assert isinstance(one_hot, OneHotEncoder)
    assert [type(layer) for layer in layers] == [nn.Flatten, nn.Linear, nn.ReLU]
    assert layers[1].weight.shape == (7, 3)
    obs = torch.tensor([0, 2])
    assert torch.equal(encoder({"goal": obs}), layers[1].weight.T[obs].relu())


def test_an_image_may_be_taken_as_numbers():
    tiny = spaces.Box(0, 255, (2, 2, 3), np.uint8)
    config = PolicyConfig(encoders={"": {"kind": "flat"}})
    assert isinstance(make_encoder(tiny, config, generator()), FlatEncoder)
    with pytest.raises(ConfigError, match=r"'seen': .*36 x 36 pixels, .*'flat'"):
        make_encoder(spaces.Dict(seen=tiny), PolicyConfig(), generator())


# --- bodies


def test_the_body_of_a_vector_is_an_mlp_with_the_names_it_always_had():
    body = make_body(spaces.Box(-1.0, 1.0, (3,)), PolicyConfig(), (4, 5), generator())
    assert type(body) is MLP
    assert list(body.state_dict()) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert [type(layer) for layer in body] == [nn.Flatten, *[nn.Linear, Tanh] * 2]
    assert body.num_features == 5


def test_the_body_of_an_image_is_the_encoder_with_layers_behind_it():
    config = PolicyConfig(cnn_features=6)
    alone = make_body(CAMERA, config, (), generator())
    assert type(alone) is NatureCNN
    assert alone.num_features == 6
    body = make_body(CAMERA, config, (5,), generator())
    assert isinstance(body, Chain)
    assert [type(part) for part in body] == [NatureCNN, MLP]
    assert body.num_features == 5


def test_the_body_of_several_leaves_is_the_encoder_with_layers_behind_it():
    body = make_body(ROBOT, PolicyConfig(**SMALL), (5,), generator(), skip=["arm/camera"])
    encoder, layers = body
    assert encoder.paths == ("arm/joints", "goal", "lights")
    assert layers[1].in_features == encoder.num_features == 4 + 3 + 2
    (obs,) = batches(ROBOT, 2)
    assert body(obs).shape == (2, body.num_features) == (2, 5)
    assert isinstance(make_body(ROBOT, PolicyConfig(**SMALL), (), None), TreeEncoder)


def test_a_layer_norm_precedes_every_activation():
    mlp = MLP(3, (4, 5), "tanh", generator(), layer_norm=True)
    kinds = [nn.Linear, nn.LayerNorm, Tanh]
    assert [type(layer) for layer in mlp] == [nn.Flatten, *kinds, *kinds]
    inputs = 50.0 * torch.randn(6, 3, generator=generator(1))
    before_activation = nn.Sequential(*list(mlp)[:3])(inputs)
    torch.testing.assert_close(before_activation.mean(1), torch.zeros(6), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(before_activation.square().mean(1), torch.ones(6))
    config = PolicyConfig(layer_norm=True, encoders={"goal": {"kind": "mlp"}}, **SMALL)
    body = make_body(ROBOT, config, (4,), generator())
    norms = [module for module in body.modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.normalized_shape for norm in norms] == [(64,), (4,)]


# --- weights


EVERY_KIND = PolicyConfig(
    encoders={
        "arm/joints": {"kind": "mlp", "features": 3},
        "goal": {"kind": "embedding", "features": 2},
        "lights": {"kind": "mlp", "features": 3},
    },
    layer_norm=True,
    **SMALL,
)


def test_initial_weights_come_from_the_generator_alone():
    before = global_randomness()
    bodies = [make_body(ROBOT, EVERY_KIND, (4,), generator(seed)) for seed in (0, 0, 1)]
    make_body(ROBOT, EVERY_KIND, (4,), None)
    assert global_randomness() == before
    same, twin, other = ([*body.parameters()] for body in bodies)
    assert all(torch.equal(*pair) for pair in zip(same, twin, strict=True))
    drawn = [pair for pair in zip(same, other, strict=True) if pair[0].ndim > 1]
    assert not any(torch.equal(*pair) for pair in drawn)


def test_a_body_without_values_can_be_loaded():
    body = make_body(ROBOT, EVERY_KIND, (4,), generator())
    blank = make_body(ROBOT, EVERY_KIND, (4,), None)
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    blank.to_empty(device="cpu")
    for tensor in (*blank.parameters(), *blank.buffers()):
        tensor.data.fill_(77)
    blank.load_state_dict(body.state_dict())
    (obs,) = batches(ROBOT, 5)
    assert torch.equal(blank(obs), body(obs))


# --- what is refused


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.OneOf([spaces.Discrete(2)]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_a_space_without_encoder_is_named_with_its_path_and_a_remedy(space):
    name = type(space).__name__
    with pytest.raises(SpaceError, match=rf"'arm/1': got {name}, wanted Box, .* wrap the env"):
        make_encoder(
            spaces.Dict(arm=spaces.Tuple([CAMERA, space])), PolicyConfig(**SMALL), generator()
        )
    with pytest.raises(SpaceError, match=rf"the observation: got {name}"):
        make_encoder(space, PolicyConfig(), generator())


@pytest.mark.parametrize(
    ("path", "kind", "remedy"),
    [
        ("goal", "flat", "use 'one_hot', 'embedding', 'mlp'"),
        ("goal", "cnn", "use 'one_hot', 'embedding', 'mlp'"),
        ("lights", "one_hot", "use 'flat', 'mlp'"),
        ("arm/joints", "cnn", "use 'flat', 'mlp'"),
        ("arm/camera", "embedding", "use 'cnn', 'flat', 'mlp'"),
    ],
)
def test_a_kind_that_does_not_fit_is_named_with_those_that_do(path, kind, remedy):
    config = PolicyConfig(encoders={path: {"kind": kind}})
    with pytest.raises(ConfigError, match=f"'{path}' is .*'{kind}' does not fit, {remedy}"):
        make_encoder(ROBOT, config, generator())


@pytest.mark.parametrize("path", ["goal", "lights"])
def test_a_width_without_meaning_is_refused(path):
    config = PolicyConfig(encoders={path: {"features": 8}}, **SMALL)
    with pytest.raises(ConfigError, match=rf"'{path}' has features=8, .* use 'mlp'"):
        make_encoder(ROBOT, config, generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoders": {"arm/camra": {}}}, "path in encoders 'arm/camra'; did you mean 'arm/camera"),
        ({"encoders": {"arm": {}}}, "path in encoders 'arm'; "),
        ({"critic_only": ("lihgts",)}, "path in critic_only 'lihgts'; did you mean 'lights'"),
        ({"critic_only": ("amr",)}, "path in critic_only 'amr'; did you mean 'arm'"),
    ],
)
def test_a_path_that_leads_nowhere_is_named_with_the_nearest(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_encoder(ROBOT, PolicyConfig(**settings), generator())


def test_an_observation_that_is_not_nested_has_the_empty_path_only():
    for config in (
        PolicyConfig(encoders={"camera": {}}),
        PolicyConfig(critic_only=("camera",)),
    ):
        with pytest.raises(ConfigError, match=r"'camera' leads nowhere, .* not nested"):
            make_encoder(CAMERA, config, generator())


def test_something_must_be_left_for_the_actor():
    config = PolicyConfig(critic_only=("arm", "goal", "lights"))
    with pytest.raises(ConfigError, match="nothing to see for the actor"):
        make_encoder(ROBOT, config, generator(), skip=config.critic_only)


def test_two_leaves_of_the_same_path_are_refused():
    space = spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(2))})
    with pytest.raises(SpaceError, match=r"same path, got .*'a/b'"):
        make_encoder(space, PolicyConfig(), generator())


def test_classes_are_encoded_on_the_device_they_are_on():
    for encoder in (OneHotEncoder([2, 3]), EmbeddingEncoder([2, 3], 4, None)):
        assert encoder.to("meta")(torch.zeros(5, 2, dtype=torch.int64, device="meta")).is_meta
