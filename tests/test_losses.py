import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, masked_rows, seeds
from torch.fx.experimental.proxy_tensor import make_fx

from ppo.losses import (
    PPOLoss,
    approximate_kl,
    clip_fraction,
    policy_loss,
    ppo_loss,
    value_loss,
)

F32, F64 = torch.float32, torch.float64
NAMES = ("log_probs", "old_log_probs", "advantages", "values", "returns", "entropy", "old_values")
LEARNED = ("log_probs", "values", "entropy")
SETTINGS = {
    "clip_range": 0.2,
    "value_coef": 0.7,
    "entropy_coef": 0.3,
    "value_clip_range": 0.5,
}
MASK = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.5
OPTIONS = {"clip_range_high": 0.3, "dual_clip": 1.5}
ALL = SETTINGS | OPTIONS
clip_ranges = st.sampled_from([0.0, 0.1, 0.2, 0.5])


def rows(size=(64,), dtype=F64, seed=0, **changes):
    """Random arguments of every name; what a policy learns wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {
        name: torch.randn(size, generator=generator, dtype=F64).mul(0.4).to(dtype) for name in NAMES
    }
    arguments |= changes
    for name in LEARNED:
        arguments[name] = arguments[name].detach().clone().requires_grad_()
    return arguments


def gradients(loss, arguments):
    return torch.autograd.grad(loss, [arguments[name] for name in LEARNED])


@law
@given(
    masked_rows(count=7),
    clip_ranges,
    st.sampled_from([None, 0.1, 1.0]),
    st.none() | clip_ranges,
    st.sampled_from([None, 1.1, 3.0]),
)
def test_ppo_loss_and_its_parts_follow_the_definitions(
    drawn, clip_range, value_clip_range, high, dual_clip
):
    arrays, valid = drawn
    new, old, advantages, values, returns, entropy, old_values = (x[valid] for x in arrays)
    arguments = dict(zip(NAMES, torch.as_tensor(arrays), strict=True))
    loss = ppo_loss(
        **arguments,
        clip_range=clip_range,
        value_coef=0.7,
        entropy_coef=0.3,
        value_clip_range=value_clip_range,
        valid=torch.as_tensor(valid),
        clip_range_high=high,
        dual_clip=dual_clip,
    )
    policy = -reference.policy_objective(new, old, advantages, clip_range, high, dual_clip)
    value = reference.value_loss(values, returns, old_values, value_clip_range)
    assert loss.policy_loss.item() == pytest.approx(policy)
    assert loss.value_loss.item() == pytest.approx(value)
    assert loss.entropy.item() == pytest.approx(entropy.mean())
    assert loss.approx_kl.item() == pytest.approx(reference.approximate_kl(new, old))
    fraction = reference.clip_fraction(new, old, clip_range, high)
    assert loss.clip_fraction.item() == pytest.approx(fraction)
    assert loss.total.item() == pytest.approx(policy + 0.7 * value - 0.3 * entropy.mean())


def test_value_loss_has_no_half():
    assert value_loss(torch.tensor([3.0]), torch.tensor([1.0])).item() == 4.0


def test_ppo_loss_is_made_of_the_public_parts():
    a = rows(valid=MASK)
    loss = ppo_loss(**a, **ALL)
    new, old, valid = a["log_probs"], a["old_log_probs"], a["valid"]
    policy = policy_loss(new, old, a["advantages"], clip_range=0.2, valid=valid, **OPTIONS)
    value = value_loss(
        a["values"],
        a["returns"],
        value_clip_range=0.5,
        old_values=a["old_values"],
        valid=valid,
    )
    assert torch.equal(loss.policy_loss, policy)
    assert torch.equal(loss.value_loss, value)
    assert torch.equal(loss.approx_kl, approximate_kl(new, old, valid))
    fraction = clip_fraction(new, old, clip_range=0.2, valid=valid, clip_range_high=0.3)
    assert torch.equal(loss.clip_fraction, fraction)
    torch.testing.assert_close(loss.total, policy + 0.7 * value - 0.3 * loss.entropy)


def test_parts_without_input_are_0():
    a = rows()
    loss = ppo_loss(a["log_probs"], a["old_log_probs"], a["advantages"])
    assert loss.value_loss == loss.entropy == 0
    assert torch.equal(loss.total, loss.policy_loss)


def test_only_the_total_carries_a_gradient():
    loss = ppo_loss(**rows(), **SETTINGS)
    assert isinstance(loss, PPOLoss)
    assert loss.total.requires_grad
    for name, part in loss._asdict().items():
        assert part.ndim == 0
        assert part.requires_grad == (name == "total")


def test_targets_are_constants():
    a = {name: x.requires_grad_() for name, x in rows().items()}
    ppo_loss(**a, **SETTINGS).total.backward()
    for name, x in a.items():
        assert (x.grad is not None) == (name in LEARNED)


def test_an_entropy_coefficient_of_0_leaves_the_entropy_out_of_the_gradient():
    a = rows()
    loss = ppo_loss(**a, entropy_coef=0.0)
    loss.total.backward()
    assert a["entropy"].grad is None
    assert loss.entropy == a["entropy"].mean()


def test_before_the_first_step_the_loss_is_minus_the_mean_advantage():
    a = rows(size=(8,))
    new = a["log_probs"]
    loss = ppo_loss(new, new.detach(), a["advantages"], clip_range=0.0)
    assert loss.policy_loss == -a["advantages"].mean()
    assert loss.approx_kl == loss.clip_fraction == 0
    loss.total.backward()
    torch.testing.assert_close(new.grad, -a["advantages"] / 8)


def test_before_the_first_step_values_that_may_not_change_are_pulled_as_if_they_could():
    values, returns = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, 3.0])
    value_loss(values, returns, value_clip_range=0.0, old_values=values).backward()
    assert torch.equal(values.grad, values.detach() - returns)


@law
@given(masked_rows(count=3), clip_ranges)
def test_the_objective_is_a_pessimistic_bound(drawn, clip_range):
    new, old, advantages = torch.as_tensor(drawn[0])
    surrogate = ((new - old).exp() * advantages).mean()
    assert -policy_loss(new, old, advantages, clip_range=clip_range) <= surrogate + 1e-12


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.1, 1.0, True),
        (1.1, -1.0, True),
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.7, 1.0, True),
        (0.7, -1.0, False),
    ],
)
def test_the_clip_stops_the_gradient_only_where_it_would_lead_further_away(ratio, advantage, flows):
    new = torch.tensor([math.log(ratio)], dtype=F64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=F64)
    policy_loss(new, torch.zeros(1, dtype=F64), advantages).backward()
    torch.testing.assert_close(new.grad, -ratio * advantages if flows else torch.zeros(1).double())


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.25, 1.0, True),
        (1.35, 1.0, False),
        (0.85, -1.0, True),
        (0.75, -1.0, False),
        (1.35, -1.0, True),
    ],
)
def test_the_clip_range_may_be_wider_upwards(ratio, advantage, flows):
    new = torch.tensor([math.log(ratio)], dtype=F64, requires_grad=True)
    advantages, old = torch.tensor([advantage], dtype=F64), torch.zeros(1, dtype=F64)
    policy_loss(new, old, advantages, clip_range=0.2, clip_range_high=0.3).backward()
    torch.testing.assert_close(new.grad, -ratio * advantages if flows else torch.zeros(1).double())
    outside = clip_fraction(new, old, clip_range=0.2, clip_range_high=0.3)
    assert outside == float(not 0.8 < ratio < 1.3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows", "objective"),
    [
        (2.9, -1.0, True, -2.9),
        (3.1, -1.0, False, -3.0),
        (20.0, -2.0, False, -6.0),
        (0.7, -1.0, False, -0.8),  # by the first clip
        (1.1, 2.0, True, 2.2),
        (20.0, 2.0, False, 2.4),  # a bound for negative advantages only
    ],
)
def test_the_dual_clip_bounds_what_a_bad_action_can_cost(ratio, advantage, flows, objective):
    new = torch.tensor([math.log(ratio)], dtype=F64, requires_grad=True)
    advantages, old = torch.tensor([advantage], dtype=F64), torch.zeros(1, dtype=F64)
    loss = policy_loss(new, old, advantages, dual_clip=3.0)
    loss.backward()
    assert -loss.item() == pytest.approx(objective)
    torch.testing.assert_close(new.grad, -ratio * advantages if flows else torch.zeros(1).double())


def test_options_that_change_nothing_change_nothing():
    a = rows()
    same = {"clip_range_high": SETTINGS["clip_range"], "dual_clip": 1e9}
    for actual, expected in zip(
        ppo_loss(**a, **SETTINGS, **same), ppo_loss(**a, **SETTINGS), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)


def test_value_clipping_takes_the_larger_error():
    values, returns, old = torch.tensor([2.0, 0.5]), torch.zeros(2), torch.tensor([1.0, 1.0])
    clipped = value_loss(values, returns, value_clip_range=0.2, old_values=old)
    assert clipped.item() == pytest.approx((4.0 + 0.8**2) / 2)


@pytest.mark.parametrize("value_clip_range", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_finite_differences(value_clip_range, masked):
    a = rows(size=(6,), seed=3)
    valid = torch.tensor([True, False, True, True, False, True]) if masked else None

    def total(log_probs, values, entropy):
        learned = {"log_probs": log_probs, "values": values, "entropy": entropy}
        settings = ALL | {"value_clip_range": value_clip_range}
        return ppo_loss(**(a | learned), **settings, valid=valid).total

    assert torch.autograd.gradcheck(total, [a[name] for name in LEARNED])


@law
@given(seeds, st.sampled_from([F32, F64]), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
def test_invalid_rows_are_as_if_they_were_not_there(seed, dtype, rubbish):
    full = rows((24,), dtype, seed)
    valid = torch.rand(24, generator=torch.Generator().manual_seed(seed)) < 0.5
    valid[0] = True
    short = rows(**{name: x[valid] for name, x in full.items()})
    full = rows(**{name: torch.where(valid, x, rubbish) for name, x in full.items()})
    masked, dropped = ppo_loss(**full, **ALL, valid=valid), ppo_loss(**short, **ALL)
    for actual, expected in zip(masked, dropped, strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(
        gradients(masked.total, full), gradients(dropped.total, short), strict=True
    ):
        assert (actual[~valid] == 0).all()
        torch.testing.assert_close(actual[valid], expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_rubbish_in_one_argument_of_an_invalid_row_stays_there(name, rubbish):
    clean = rows(valid=MASK)
    dirty = rows(**(clean | {name: torch.where(MASK, clean[name], rubbish)}))
    actual, expected = ppo_loss(**dirty, **ALL), ppo_loss(**clean, **ALL)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    for x, y in zip(gradients(actual.total, dirty), gradients(expected.total, clean), strict=True):
        assert torch.equal(x, y)


def test_no_valid_row_is_no_loss_and_no_gradient():
    a = rows(valid=torch.zeros(64, dtype=torch.bool))
    loss = ppo_loss(**a, **SETTINGS)
    assert all(part == 0 for part in loss)
    assert all((gradient == 0).all() for gradient in gradients(loss.total, a))


def test_any_leading_shape_gives_the_same_means():
    flat = rows((24,))
    square = rows(**{name: x.view(4, 6) for name, x in flat.items()})
    for actual, expected in zip(
        ppo_loss(**square, **SETTINGS), ppo_loss(**flat, **SETTINGS), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("new", [-1e4, -80.0, 0.0, 80.0, 1e4, 1e30, -3e38])
@pytest.mark.parametrize("old", [-1e4, 0.0, 1e4, 3e38])
@pytest.mark.parametrize("advantage", [-1e6, -1.0, 0.0, 1.0, 1e6])
def test_finite_inputs_give_a_finite_loss_and_gradient(new, old, advantage):
    log_probs = torch.tensor([new, 0.0], requires_grad=True)
    loss = ppo_loss(log_probs, torch.tensor([old, 0.0]), torch.tensor([advantage, 1.0]))
    loss.total.backward()
    assert all(part.isfinite() for part in loss)
    assert log_probs.grad.isfinite().all()


@law
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=5))
def test_the_mean_of_k3_over_the_old_policy_is_the_kl_divergence(counts):
    old, new = torch.tensor(counts, dtype=F64).T
    old_probs, new_probs = old / old.sum(), new / new.sum()
    # Every action as often as the old policy draws it: the sample mean is the expectation.
    repeats = old.long()
    sampled_new = new_probs.log().repeat_interleave(repeats)
    sampled_old = old_probs.log().repeat_interleave(repeats)
    kl = (old_probs * (old_probs / new_probs).log()).sum()
    torch.testing.assert_close(approximate_kl(sampled_new, sampled_old), kl)


@law
@given(masked_rows(count=2))
def test_approximate_kl_is_never_negative(drawn):
    new, old = torch.as_tensor(drawn[0])
    assert approximate_kl(new, old) >= 0
    assert approximate_kl(new, new) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = rows(dtype=dtype)
    single = rows(**{name: x.float() for name, x in half.items()})
    for actual, expected in zip(
        ppo_loss(**half, **SETTINGS), ppo_loss(**single, **SETTINGS), strict=True
    ):
        assert actual.dtype == F32
        assert torch.equal(actual, expected)


def test_autocast_changes_nothing():
    a = rows(dtype=F32)
    expected = ppo_loss(**a, **SETTINGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ppo_loss(**a, **SETTINGS)
    for actual, wanted in zip(loss, expected, strict=True):
        assert actual.dtype == F32
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_to_one_graph(masked):
    a = rows()
    valid = MASK if masked else None
    compiled = torch.compile(ppo_loss, fullgraph=True, backend="eager")
    actual, expected = (
        compiled(**a, **ALL, valid=valid),
        ppo_loss(**a, **ALL, valid=valid),
    )
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(gradients(actual.total, a), gradients(expected.total, a), strict=True):
        torch.testing.assert_close(x, y)


def test_its_traced_functional_gradient_is_that_of_autograd():
    a = rows(valid=MASK)

    def total(log_probs, values, entropy):
        learned = {"log_probs": log_probs, "values": values, "entropy": entropy}
        return ppo_loss(**(a | learned), **ALL).total

    expected = gradients(ppo_loss(**a, **ALL).total, a)
    learned = [a[name].detach() for name in LEARNED]
    functional = torch.func.grad(total, argnums=(0, 1, 2))
    for actual in (functional(*learned), make_fx(functional)(*learned)(*learned)):
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_no_value_is_read_on_the_host():
    # Tensors without data: whatever branched on a value would fail.
    a = {name: x.to("meta") for name, x in rows(valid=MASK).items()}
    weights = {name: torch.tensor(x, device="meta") for name, x in SETTINGS.items()}
    weights["clip_range_high"] = torch.tensor(0.3, device="meta")
    loss = ppo_loss(**a, **weights, dual_clip=1.5)
    assert all(part.shape == () and part.device.type == "meta" for part in loss)


def test_weights_and_ranges_may_be_tensors():
    a = rows()
    weights = {name: torch.tensor(x, dtype=F64) for name, x in SETTINGS.items()}
    high = torch.tensor(0.3, dtype=F64)
    for given_weights, plain in [
        (weights, SETTINGS),
        (weights | {"clip_range_high": high}, SETTINGS | {"clip_range_high": 0.3}),
        (weights | {"clip_range_high": 0.3}, SETTINGS | {"clip_range_high": 0.3}),
        (SETTINGS | {"clip_range_high": high}, SETTINGS | {"clip_range_high": 0.3}),
    ]:
        one, other = ppo_loss(**a, **given_weights), ppo_loss(**a, **plain)
        for actual, expected in zip(one, other, strict=True):
            torch.testing.assert_close(actual, expected)
        for x, y in zip(gradients(one.total, a), gradients(other.total, a), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "log_probs"])
def test_another_shape_is_refused(name):
    for shape in ((63,), (64, 1), ()):
        with pytest.raises(ValueError, match=rf"^{name} has shape .*\[64\].* not broadcast"):
            ppo_loss(**rows(**{name: torch.zeros(shape)}), **SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_floating_tensor_is_refused(name):
    a = rows()
    with pytest.raises(TypeError, match=rf"^{name} has dtype int64, wanted a floating"):
        ppo_loss(**(a | {name: torch.zeros(64, dtype=torch.int64)}), **SETTINGS)
    with pytest.raises(TypeError, match=rf"^{name} is of type numpy.ndarray, wanted a torch"):
        ppo_loss(**(a | {name: np.zeros(64)}), **SETTINGS)


def test_a_mask_that_is_not_boolean_or_of_another_shape_is_refused():
    with pytest.raises(TypeError, match=r"^valid has dtype float32, wanted bool"):
        ppo_loss(**rows(), valid=torch.ones(64))
    with pytest.raises(ValueError, match=r"^valid has shape \[3\]"):
        ppo_loss(**rows(), valid=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("missing", "present"),
    [("values", "returns"), ("returns", "values"), ("old_values", "value_clip_range")],
)
def test_a_missing_partner_is_named(missing, present):
    with pytest.raises(ValueError, match=rf"^{missing} is None though {present}"):
        ppo_loss(**(dict(rows()) | {missing: None}), **SETTINGS)


def test_a_weight_on_a_missing_entropy_is_refused():
    a = rows()
    del a["entropy"]
    for weight in (0.1, torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"^entropy is None though entropy_coef"):
            ppo_loss(**a, entropy_coef=weight)


@pytest.mark.parametrize("name", ["clip_range", "value_clip_range", "clip_range_high"])
def test_a_negative_or_nan_clip_range_is_refused(name):
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match=rf"^{name} is .*at least 0"):
            ppo_loss(**rows(), **(SETTINGS | {name: wrong}))
    with pytest.raises(TypeError, match=rf"^{name} is '0.2'"):
        ppo_loss(**rows(), **(SETTINGS | {name: "0.2"}))


def test_a_second_clip_of_1_or_less_is_refused():
    for wrong in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"^dual_clip is .*above 1"):
            ppo_loss(**rows(), dual_clip=wrong)
    with pytest.raises(TypeError, match=r"^dual_clip is '3'"):
        ppo_loss(**rows(), dual_clip="3")
