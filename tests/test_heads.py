import math

import numpy as np
import pytest
import torch
from families import normal
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_setup import generator
from torch.nn.functional import softplus

from ppo.distributions import (
    GSDE,
    Bernoulli,
    Beta,
    Categorical,
    DiagonalGaussian,
    Joint,
    MultiCategorical,
    SquashedGaussian,
)
from ppo.errors import SpaceError
from ppo.policies import PolicyConfig
from ppo.policies.heads import make_action_head
from ppo.trees import leaves

WIDTH = 5
BOX = spaces.Box(np.float32([[-1.0, 0.0]]), np.float32([[1.0, 4.0]]))
FREE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
KINDS = [
    (spaces.Discrete(4, start=-2), {}, Categorical, 4, 4),
    (spaces.MultiDiscrete(np.array([[2, 3], [3, 2]]), start=[[1, 0], [0, 5]]), {}, None, 10, 10),
    (spaces.MultiBinary((2, 2)), {}, Bernoulli, 4, 8),
    (FREE, {}, DiagonalGaussian, 2, 0),
    (BOX, {"state_dependent_std": True}, DiagonalGaussian, 2, 0),
    (BOX, {"distribution": "squashed"}, SquashedGaussian, 2, 0),
    (BOX, {"distribution": "squashed", "state_dependent_std": True}, SquashedGaussian, 2, 0),
    (BOX, {"distribution": "beta"}, Beta, 48, 0),
    (FREE, {"distribution": "gsde"}, GSDE, 2 * WIDTH, 0),
    (spaces.Box(-1.0, 1.0, (), np.float64), {}, DiagonalGaussian, 1, 0),
]
EVERY = pytest.mark.parametrize(("space", "options", "family", "noise_size", "mask_size"), KINDS)

small_boxes = st.builds(
    lambda shape: spaces.Box(-1.0, 2.0, shape, np.float32), st.sampled_from([(), (1,), (2, 2)])
)
small_leaves = (
    st.builds(spaces.Discrete, st.integers(1, 4))
    | st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 3), min_size=1, max_size=3))
    | st.builds(spaces.MultiBinary, st.integers(1, 3))
    | small_boxes
)
nested = st.recursive(
    small_leaves,
    lambda inner: (
        st.builds(spaces.Dict, st.dictionaries(st.sampled_from("abc"), inner, min_size=1))
        | st.builds(spaces.Tuple, st.lists(inner, min_size=1, max_size=3).map(tuple))
    ),
    max_leaves=5,
)
distributions = st.sampled_from(["gaussian", "squashed", "beta", "gsde"])


def build(space, seed=0, **options):
    return make_action_head(space, WIDTH, PolicyConfig(**options), generator(seed))


def features(rows=3, seed=0):
    return normal(seed, rows, WIDTH).float()


def draw(head, rows, seed=0):
    return torch.from_numpy(head.draw_noise(np.random.default_rng(seed), rows))


def leaf_spaces(space):
    if isinstance(space, spaces.Dict):
        return [leaf for item in space.spaces.values() for leaf in leaf_spaces(item)]
    if isinstance(space, spaces.Tuple):
        return [leaf for item in space.spaces for leaf in leaf_spaces(item)]
    return [space]


def entries(space):
    """Number of classes of every discrete position of a space, in order."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.reshape(-1).tolist()
    if isinstance(space, spaces.MultiBinary):
        return [2] * math.prod(space.shape)
    return []


# --- every head


@EVERY
def test_a_head_says_how_much_noise_and_mask_it_takes(
    space, options, family, noise_size, mask_size
):
    head = build(space, **options)
    dist = head(features())
    assert type(dist) is (family or MultiCategorical)
    assert (head.noise_size, head.mask_size) == (noise_size, mask_size)
    assert dist.noise_size == noise_size
    noise = head.draw_noise(np.random.default_rng(0), 3)
    assert noise.shape == (3, noise_size)
    assert noise.dtype == np.float32
    assert head.squashed is (family is SquashedGaussian)


@EVERY
def test_an_action_has_one_flat_row_per_row_of_features(
    space, options, family, noise_size, mask_size
):
    head = build(space, **options)
    dist = head(features())
    action = dist.sample(draw(head, 3))
    shape = (3,) if isinstance(space, spaces.Discrete) else (3, math.prod(space.shape))
    assert action.shape == dist.mode().shape == shape
    assert action.dtype == (torch.float32 if isinstance(space, spaces.Box) else torch.int64)
    assert dist.log_prob(action).shape == (3,)


@EVERY
def test_every_parameter_of_a_head_learns(space, options, family, noise_size, mask_size):
    head = build(space, **options)
    dist = head(features())
    (dist.log_prob(dist.sample(draw(head, 3)).detach()) + dist.entropy()).sum().backward()
    for name, parameter in head.named_parameters():
        assert (parameter.grad != 0.0).any(), name


@EVERY
def test_a_head_without_values_takes_those_of_another(
    space, options, family, noise_size, mask_size
):
    head = build(space, **options)
    blank = make_action_head(space, WIDTH, PolicyConfig(**options), None)
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}
    assert {name: tensor.shape for name, tensor in blank.state_dict().items()} == shapes
    blank = blank.to_empty(device="cpu")
    blank.load_state_dict(head.state_dict())
    noise = draw(head, 3)
    sample, other = head(features()).sample(noise), blank(features()).sample(noise)
    assert torch.equal(sample, other)
    assert torch.equal(head(features()).log_prob(sample), blank(features()).log_prob(sample))


@EVERY
def test_output_layers_are_orthogonal_with_the_configured_gain(
    space, options, family, noise_size, mask_size
):
    head = build(space, output_gain=0.5, **options)
    weight = head.linear.weight.detach()
    rows = weight.shape[0]
    gram = weight @ weight.T if rows <= WIDTH else weight.T @ weight
    torch.testing.assert_close(gram, 0.25 * torch.eye(len(gram)))
    assert (head.linear.bias == 0.0).all()


def test_initial_weights_come_from_the_generator_alone():
    state = torch.get_rng_state()
    for space, options, *_ in KINDS:
        one, twin = build(space, **options), build(space, **options)
        other = build(space, seed=1, **options)
        assert torch.equal(one.linear.weight, twin.linear.weight)
        assert not torch.equal(one.linear.weight, other.linear.weight)
    assert torch.equal(torch.get_rng_state(), state)


# --- noise


@settings(max_examples=40)
@given(nested, distributions.filter(lambda name: name != "gsde"))
def test_noise_in_pieces_is_noise_at_once(space, distribution):
    head = build(space, distribution=distribution)
    whole = head.draw_noise(np.random.default_rng(3), 7)
    rng = np.random.default_rng(3)
    pieces = [head.draw_noise(rng, rows) for rows in (1, 4, 2)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@settings(max_examples=40)
@given(nested, distributions)
def test_noise_touches_no_global_generator(space, distribution):
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    head = build(space, distribution=distribution)
    head(features()).sample(draw(head, 3))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize(("steps", "distinct"), [(None, 1), (1, 8), (3, 3), (8, 1), (100, 1)])
def test_gsde_keeps_its_matrix_for_the_configured_steps(steps, distinct):
    head = build(FREE, distribution="gsde", gsde_steps=steps)
    noise = head.draw_noise(np.random.default_rng(0), 8)
    assert noise.shape == (8, 2 * WIDTH)
    assert len(np.unique(noise, axis=0)) == distinct
    length = steps or 8
    for row in range(8):
        np.testing.assert_array_equal(noise[row], noise[row - row % length])


def test_gsde_noise_for_whole_periods_in_pieces_is_noise_at_once():
    head = build(FREE, distribution="gsde", gsde_steps=3)
    whole = head.draw_noise(np.random.default_rng(0), 9)
    rng = np.random.default_rng(0)
    pieces = [head.draw_noise(rng, 3) for _ in range(3)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_gsde_repeats_its_noise_inside_of_a_nested_action_too():
    space = spaces.Dict({"a": FREE, "b": spaces.Discrete(3)})
    noise = build(space, distribution="gsde", gsde_steps=4).draw_noise(np.random.default_rng(0), 8)
    assert len(np.unique(noise[:, : 2 * WIDTH], axis=0)) == 2
    assert len(np.unique(noise[:, 2 * WIDTH :], axis=0)) == 8


def test_no_noise_at_all_is_fine():
    for distribution in ("gaussian", "squashed", "beta", "gsde"):
        head = build(spaces.Dict({"a": BOX}), distribution=distribution)
        assert head.draw_noise(np.random.default_rng(0), 0).shape == (0, head.noise_size)


# --- nested spaces and masks


@settings(max_examples=60)
@given(nested, distributions, st.integers(0, 2**31))
def test_a_nested_action_is_one_flat_leaf_per_leaf_of_the_space(space, distribution, seed):
    head = build(space, distribution=distribution)
    rows = 4
    dist = head(features(rows, seed))
    action = dist.sample(draw(head, rows, seed))
    own = leaf_spaces(space)
    for leaf, values in zip(own, leaves(action), strict=True):
        size = () if isinstance(leaf, spaces.Discrete) else (math.prod(leaf.shape),)
        assert values.shape == (rows, *size)
    assert isinstance(dist, Joint) is isinstance(space, spaces.Dict | spaces.Tuple)
    if isinstance(space, spaces.Dict):
        assert list(action) == list(space.spaces)
    assert head.noise_size == dist.noise_size
    assert head.mask_size == sum(sum(entries(leaf)) for leaf in own)
    has_box = any(isinstance(leaf, spaces.Box) for leaf in own)
    assert head.squashed is (distribution == "squashed" and has_box)
    assert torch.isfinite(dist.log_prob(action)).all()
    assert torch.isfinite(dist.entropy()).all()


@settings(max_examples=80)
@given(nested, st.integers(0, 2**31), st.data())
def test_a_flat_mask_reaches_the_leaves_in_order(space, seed, data):
    head = build(space, output_gain=3.0)
    rows = 20
    rng = np.random.default_rng(seed)
    positions = [n for leaf in leaf_spaces(space) for n in entries(leaf)]
    blocks = []
    for n in positions:
        block = rng.random((rows, n)) < data.draw(st.sampled_from([0.0, 0.4, 1.0]))
        block[np.arange(rows), rng.integers(n, size=rows)] = True
        blocks.append(block)
    mask = np.concatenate([np.zeros((rows, 0), np.bool_), *blocks], axis=1)
    dist = head(features(rows, seed), torch.from_numpy(mask))
    for action in (dist.sample(draw(head, rows, seed)), dist.mode()):
        discrete = [
            leaf.reshape(rows, -1) for leaf in leaves(action) if not leaf.is_floating_point()
        ]
        columns = [column for leaf in discrete for column in leaf.unbind(1)]
        for block, column in zip(blocks, columns, strict=True):
            assert block[np.arange(rows), column.numpy()].all()
        assert torch.isfinite(dist.log_prob(action)).all()


@settings(max_examples=30)
@given(nested)
def test_a_mask_that_allows_everything_is_no_mask(space):
    head = build(space)
    everything = torch.ones(3, head.mask_size, dtype=torch.bool)
    noise = draw(head, 3)
    plain, masked = head(features()), head(features(), everything)
    for one, two in zip(leaves(plain.sample(noise)), leaves(masked.sample(noise)), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(plain.entropy(), masked.entropy())


def test_leaves_have_layers_of_their_own_whatever_their_keys():
    space = spaces.Dict({"a.b/c": spaces.Discrete(2), "train": spaces.Tuple((BOX, FREE))})
    names = build(space).state_dict().keys()
    assert names == {
        *(f"heads.{k}.linear.{kind}" for k in range(3) for kind in ("weight", "bias")),
        "heads.1.log_std",
        "heads.2.log_std",
    }


# --- Box


@pytest.mark.parametrize("distribution", ["gaussian", "squashed"])
def test_a_state_dependent_std_is_an_output_that_begins_at_the_configured_one(distribution):
    options = {"distribution": distribution, "state_dependent_std": True, "log_std_init": -1.25}
    head = build(BOX, output_gain=0.01, **options)
    log_std = head(features()).log_std
    assert log_std.shape == (3, 2)
    torch.testing.assert_close(log_std, torch.full((3, 2), -1.25), atol=0.05, rtol=0.0)
    assert not torch.equal(log_std[0], log_std[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dependent_std": True},
        {"distribution": "squashed"},
        {"distribution": "squashed", "state_dependent_std": True},
        {"distribution": "gsde"},
    ],
    ids=str,
)
@pytest.mark.parametrize("drifted", [-1000.0, 1000.0])
def test_a_log_std_stays_in_its_bounds_and_can_come_back(options, drifted):
    head = build(BOX, log_std_min=-2.0, log_std_max=1.0, **options)
    learnt = head.log_std_linear.bias if "state_dependent_std" in options else head.log_std
    with torch.no_grad():
        learnt.fill_(drifted)
    wanted = math.exp(min(max(drifted, -2.0), 1.0))
    x = torch.ones(3, WIDTH)  # of mean square 1, so that it holds for gSDE too
    dist = head(x)
    torch.testing.assert_close(dist.log_std.exp().expand(3, 2), torch.full((3, 2), wanted))
    dist.log_std.sum().backward()
    assert (learnt.grad != 0.0).all()


def test_the_first_outputs_of_a_beta_head_are_alpha_and_the_others_beta():
    head = build(BOX, distribution="beta")  # so saved weights mean what they meant
    outputs = head.linear(features())
    dist = head(features())
    torch.testing.assert_close(dist.alpha, softplus(outputs[:, :2]) + 1.0)
    torch.testing.assert_close(dist.beta, softplus(outputs[:, 2:]) + 1.0)


def test_beta_shapes_are_above_one_and_near_the_uniform_in_the_beginning():
    dist = build(BOX, distribution="beta")(features())
    expected = 1.0 + float(softplus(torch.zeros(())))
    torch.testing.assert_close(dist.alpha, torch.full((3, 2), expected), atol=0.05, rtol=0.0)
    wild = build(BOX, distribution="beta", output_gain=1e4)(features())
    assert (wild.alpha >= 1.0).all()
    assert (wild.beta >= 1.0).all()
    assert torch.isfinite(wild.log_prob(wild.mode())).all()


def test_bounds_are_those_of_the_space_component_by_component():
    for distribution in ("beta", "squashed"):
        head = build(BOX, distribution=distribution)
        dist = head(features(1))
        assert dist.low.tolist() == [-1.0, 0.0]
        assert dist.high.tolist() == [1.0, 4.0]
    beta = build(BOX, distribution="beta")
    action = beta(features(200)).sample(draw(beta, 200))
    for column, (low, high) in enumerate([(-1.0, 1.0), (0.0, 4.0)]):
        assert low <= action[:, column].min() < low + 0.2 * (high - low)
        assert high >= action[:, column].max() > high - 0.2 * (high - low)


def test_gsde_does_not_train_the_features_by_its_exploration():
    head = build(FREE, distribution="gsde")
    x = features().requires_grad_()
    head(x).entropy().sum().backward()
    assert head.log_std.grad.abs().sum() > 0.0
    assert x.grad is None
    head(x).mode().sum().backward()
    assert x.grad.abs().sum() > 0.0


# --- what is refused


@pytest.mark.parametrize("distribution", ["beta", "squashed"])
@pytest.mark.parametrize(
    "space",
    [
        FREE,
        spaces.Box(0.0, np.inf, (2,), np.float32),
        spaces.Box(np.float32([0.0, 1.0]), np.float32([1.0, 1.0])),
        spaces.Box(-3e38, 3e38, (1,), np.float32),
        spaces.Box(-1e300, 1e300, (1,), np.float64),
    ],
    ids=str,
)
def test_distributions_on_bounds_need_bounds(distribution, space):
    with pytest.raises(SpaceError, match="RescaleAction"):
        build(space, distribution=distribution)
    with pytest.raises(SpaceError, match="gaussian"):
        build(spaces.Dict({"a": BOX, "b": space}), distribution=distribution)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Sequence(BOX),
        spaces.Graph(BOX, BOX),
        spaces.Box(0, 5, (2,), np.int64),
        spaces.Box(0, 255, (2,), np.uint8),
    ],
    ids=lambda space: type(space).__name__,
)
def test_an_unsupported_action_space_is_named_with_its_path_and_a_remedy(space):
    with pytest.raises(SpaceError, match=f"got {type(space).__name__}.*wrap"):
        build(space)
    with pytest.raises(SpaceError, match=r"leaf 'arm/1'"):
        build(spaces.Dict({"arm": spaces.Tuple((BOX, space))}))


@pytest.mark.parametrize("space", [spaces.Dict({}), spaces.Tuple(())], ids=str)
def test_a_space_without_leaves_is_refused(space):
    with pytest.raises(SpaceError, match="no leaves"):
        build(space)
