"""What holds for every family of distributions."""

import numpy as np
import pytest
import torch
from families import FAMILIES, ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo.distributions
from ppo.distributions import GSDE, DiagonalGaussian, Distribution, Joint, SquashedGaussian
from ppo.trees import leaves

SEEDS = st.integers(0, 2**31)
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
DRAWING = pytest.mark.parametrize(
    "kind", sorted({f.kind for f in FAMILIES.values()} - {Joint}, key=lambda kind: kind.__name__)
)


def noise(dist, seed=0):
    """Noise of a family, `[ROWS, noise_size]`, in float64."""
    parts = leaves(dist.parts) if isinstance(dist, Joint) else [dist]
    rng = np.random.default_rng(seed)
    drawn = [part.draw_noise(rng, (ROWS, part.noise_size)) for part in parts]
    return torch.from_numpy(np.concatenate(drawn, -1)).double()


def action_of(dist, seed=0):
    return dist.sample(noise(dist, seed))


def test_every_family_is_among_those_tested():
    everything = {getattr(ppo.distributions, name) for name in ppo.distributions.__all__}
    assert everything - {Distribution} == {family.kind for family in FAMILIES.values()}


@EVERY
@settings(max_examples=20)
@given(seed=SEEDS)
def test_kl_is_never_negative_and_zero_only_of_equals(family, seed):
    p, q = family.dist(seed), family.dist(seed + 10)
    torch.testing.assert_close(p.kl(p), torch.zeros(ROWS).double(), atol=1e-12, rtol=0.0)
    assert (p.kl(q) > -1e-12).all()
    assert (p.kl(q) > 1e-12).any()  # in some rows a mask leaves one choice


@EVERY
def test_results_have_one_number_per_row_and_actions_one_row_each(family):
    dist = family.dist(0)
    sample = action_of(dist)
    for action in (sample, dist.mode()):
        assert all(len(leaf) == ROWS for leaf in leaves(action))
        assert dist.log_prob(action).shape == (ROWS,)
    assert dist.entropy().shape == dist.kl(family.dist(5)).shape == (ROWS,)
    assert [leaf.shape for leaf in leaves(sample)] == [leaf.shape for leaf in leaves(dist.mode())]


@EVERY
def test_a_row_depends_on_its_own_parameters_and_noise_only(family):
    dist, numbers = family.dist(0), noise(family.dist(0))
    other = numbers.clone()
    other[1:] = noise(dist, seed=1)[1:]
    first, second = dist.sample(numbers), dist.sample(other)
    for one, two in zip(leaves(first), leaves(second), strict=True):
        assert torch.equal(one[0], two[0])


@EVERY
@pytest.mark.parametrize("name", ["log_prob", "entropy", "kl"])
def test_gradients_are_the_derivatives(family, name):
    action, other = action_of(family.dist(7)), family.dist(9)
    arguments = {"log_prob": (action,), "entropy": (), "kl": (other,)}[name]
    parameters = [parameter.requires_grad_() for parameter in family.parameters(3)]

    def result(*parameters):
        # Parameters that play no part (the mean in an entropy) still belong to the graph.
        nothing = sum(0.0 * parameter.sum() for parameter in parameters)
        return getattr(family.build(*parameters), name)(*arguments) + nothing

    assert torch.autograd.gradcheck(result, parameters)


@EVERY
@settings(max_examples=15)
@given(seed=SEEDS, scale=st.sampled_from([1.0, 10.0, 60.0]))
def test_everything_stays_finite_in_float32_far_from_the_beginning(family, seed, scale):
    parameters = [p.float() for p in family.parameters(seed, scale)]
    # The logarithms of standard deviations are kept in bounds by the heads.
    index = {DiagonalGaussian: 1, SquashedGaussian: 1, GSDE: 2, Joint: 2}.get(family.kind)
    if index is not None:
        parameters[index] = parameters[index].clamp(-5.0, 2.0)
    parameters = [parameter.requires_grad_() for parameter in parameters]
    dist = family.build(*parameters)
    action = dist.sample(noise(dist, seed).float())
    results = [dist.log_prob(action), dist.entropy(), dist.kl(dist)]
    assert all(result.dtype == torch.float32 for result in results)
    assert all(torch.isfinite(result).all() for result in results)
    sum(result.sum() for result in results).backward()
    for parameter in parameters:
        assert torch.isfinite(parameter.grad).all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(family, dtype):
    half = [parameter.to(dtype) for parameter in family.parameters(2)]
    dist, wanted = family.build(*half), family.build(*(parameter.float() for parameter in half))
    action = wanted.sample(noise(wanted).float())
    for own, reference in (
        (dist.log_prob(action), wanted.log_prob(action)),
        (dist.entropy(), wanted.entropy()),
        (dist.kl(dist), wanted.kl(wanted)),
    ):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, reference)


@DRAWING
def test_noise_in_pieces_is_noise_at_once(kind):
    whole = kind.draw_noise(np.random.default_rng(3), (7, 24))
    rng = np.random.default_rng(3)
    pieces = [kind.draw_noise(rng, (rows, 24)) for rows in (1, 4, 2)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert whole.dtype == np.float32
    assert np.isfinite(whole).all()


@DRAWING
def test_noise_touches_no_global_generator(kind):
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    kind.draw_noise(np.random.default_rng(3), (7, 24))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@EVERY
def test_nothing_but_the_given_noise_is_random(family):
    dist, numbers = family.dist(0), noise(family.dist(0))
    state = torch.get_rng_state()
    action, log_p = dist.sample(numbers), dist.log_prob(dist.sample(numbers))
    entropy = dist.entropy()
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(leaves(action), leaves(dist.sample(numbers)), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(log_p, dist.log_prob(action))
    assert torch.equal(entropy, dist.entropy())
