import copy

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_paths import EACH_PATH, as_elsewhere, path_taken
from strategies import coefficients, law, seeds, trajectories

from ppo.advantages import (
    AdvantageEstimate,
    discounted_returns,
    gae,
    lambda_returns,
    n_step_returns,
    normalize,
)

F32, F64 = torch.float32, torch.float64
single_columns = trajectories(trailing_shapes=st.just(()))
BOTH = pytest.mark.parametrize("dtype", [F32, F64])
LIBRARIES = pytest.mark.parametrize(
    "convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"]
)


def tensors(trajectory, dtype=F64):
    return [
        torch.tensor(x) if x.dtype == bool else torch.tensor(x, dtype=dtype) for x in trajectory
    ]


def close(actual, expected, dtype=F64):
    tolerance = 1e-9 if dtype == F64 else 1e-3
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def expected_advantages(trajectory, gamma, gae_lambda):
    return reference.columns(reference.advantages, *trajectory, gamma=gamma, gae_lambda=gae_lambda)


@law
@given(trajectories(), coefficients, coefficients, st.sampled_from([F32, F64]))
def test_gae_is_the_discounted_sum_of_td_errors(trajectory, gamma, gae_lambda, dtype):
    result = gae(*tensors(trajectory, dtype), gamma=gamma, gae_lambda=gae_lambda)
    assert result.advantages.dtype == result.returns.dtype == dtype
    expected = expected_advantages(trajectory, gamma, gae_lambda)
    close(result.advantages, expected, dtype)
    close(result.returns, expected + trajectory.values, dtype)


@EACH_PATH
@law
@given(trajectories(), coefficients, coefficients, st.sampled_from([F32, F64]))
def test_gae_is_the_same_whatever_the_size_of_its_blocks(
    path, trajectory, gamma, gae_lambda, dtype
):
    arguments, settings = tensors(trajectory, dtype), {"gamma": gamma, "gae_lambda": gae_lambda}
    with path_taken(path):
        result = gae(*arguments, **settings)
    expected = expected_advantages(trajectory, gamma, gae_lambda)
    close(result.advantages, expected, dtype)
    close(result.returns, expected + trajectory.values, dtype)
    with path_taken(path):
        trajectory.next_values[trajectory.terminated] = np.nan
        dirty = gae(*tensors(trajectory, dtype), **settings)
    for actual, clean in zip(dirty, result, strict=True):
        assert torch.equal(actual, clean)


@law
@given(trajectories(), coefficients, coefficients)
def test_gae_is_the_same_off_the_cpu(trajectory, gamma, gae_lambda):
    trajectory.next_values[trajectory.terminated] = np.nan
    arguments, settings = tensors(trajectory), {"gamma": gamma, "gae_lambda": gae_lambda}
    with as_elsewhere():
        result = gae(*(x.requires_grad_(x.is_floating_point()) for x in arguments), **settings)
    assert not result.advantages.requires_grad
    for actual, expected in zip(result, gae(*tensors(trajectory), **settings), strict=True):
        close(actual, expected)


@BOTH
@pytest.mark.parametrize("shape", [(2048,), (128, 8), (9000,), (2048, 256), (130, 20, 33)])
def test_large_rollouts_are_as_exact_as_small_ones(shape, dtype):
    rng = np.random.default_rng(0)
    numbers = [torch.as_tensor(x).to(dtype) for x in rng.normal(size=(3, *shape))]
    done, cut = torch.as_tensor(rng.random((2, *shape)) < 0.01)
    numbers[2][done] = torch.inf
    result = gae(*numbers, done, cut, gamma=0.99, gae_lambda=0.95)
    r, v, successor = (x.double() for x in numbers)
    expected = r + 0.99 * torch.where(done, 0.0, successor) - v
    decay = 0.99 * 0.95 * (~(done | cut)).double()
    for t in range(shape[0] - 2, -1, -1):
        expected[t] += decay[t] * expected[t + 1]
    tolerance = 1e-5 if dtype == F32 else 1e-12
    np.testing.assert_allclose(result.advantages, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(result.returns, expected + v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_that_are_not_finite_make_no_noise(kind):
    rewards, values, next_values, terminated, truncated = example()
    terminated[:], truncated[:] = False, False
    rewards[3], values[12], next_values[12] = np.nan, np.inf, np.inf
    numbers = (x.astype(kind) for x in (rewards, values, next_values))
    advantages, returns = gae(*numbers, terminated, truncated)
    for x in (advantages, returns):
        assert np.isnan(x[:13]).all()
        assert np.isfinite(x[13:]).all()


@law
@given(trajectories(), coefficients, coefficients, st.sampled_from([np.float32, np.float64]))
def test_numpy_arrays_give_the_numbers_that_tensors_give(trajectory, gamma, gae_lambda, dtype):
    trajectory = trajectory.astype(dtype)
    given_arrays = gae(*trajectory, gamma=gamma, gae_lambda=gae_lambda)
    given_tensors = gae(
        *(torch.from_numpy(x.copy()) for x in trajectory), gamma=gamma, gae_lambda=gae_lambda
    )
    for array, tensor in zip(given_arrays, given_tensors, strict=True):
        assert isinstance(array, np.ndarray)
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, tensor.numpy())


GOLDEN = [
    ("terminated", np.nan, [-1.48, -4, 6.152, 4.1]),
    ("terminated", np.inf, [-1.48, -4, 6.152, 4.1]),
    ("truncated", 10.0, [5, 5, 6.152, 4.1]),
    ("both", np.nan, [-1.48, -4, 6.152, 4.1]),
]


@BOTH
@LIBRARIES
@pytest.mark.parametrize(("end", "final_value", "advantages"), GOLDEN)
def test_gae_at_an_end_gives_the_known_numbers(end, final_value, advantages, convert, dtype):
    kind = np.float32 if dtype == F32 else np.float64
    here, nowhere = np.array([False, True, False, False]), np.zeros(4, bool)
    values = np.array([5, 6, 7, 8], kind)
    result = gae(
        convert(np.array([1, 2, 3, 4], kind)),
        convert(values),
        convert(np.array([6, final_value, 8, 9], kind)),
        convert(here if end != "truncated" else nowhere),
        convert(here if end != "terminated" else nowhere),
        gamma=0.9,
        gae_lambda=0.8,
    )
    assert isinstance(result, AdvantageEstimate)
    np.testing.assert_allclose(result.advantages, advantages, rtol=1e-6)
    np.testing.assert_allclose(result.returns, values + np.array(advantages), rtol=1e-6)


@law
@given(single_columns, single_columns, st.sampled_from(["terminated", "truncated"]))
def test_concatenated_episodes_are_as_each_alone(first, second, end):
    getattr(first, end)[-1] = True
    joined = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    together = gae(*joined)
    for together_, *alone in zip(together, gae(*first), gae(*second), strict=True):
        close(together_, np.concatenate(alone))


@EACH_PATH
@pytest.mark.parametrize("horizon", [5, 40, 200])
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_gae_does_not_leak_across_an_end(horizon, end, path):
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, horizon))
    flags = {"terminated": np.zeros(horizon, bool), "truncated": np.zeros(horizon, bool)}
    t = horizon // 2
    flags[end][t] = True
    with path_taken(path):
        before = gae(rewards, values, next_values, **flags).advantages
        rewards[t + 1 :] += 1e6
        after = gae(rewards, values, next_values, **flags).advantages
    np.testing.assert_array_equal(before[: t + 1], after[: t + 1])
    assert (before[t + 1 :] != after[t + 1 :]).all()


@law
@given(trajectories(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_next_values_are_ignored_where_terminated(trajectory, rubbish):
    clean = gae(*trajectory)
    trajectory.next_values[trajectory.terminated] = rubbish
    for actual, expected in zip(gae(*trajectory), clean, strict=True):
        np.testing.assert_array_equal(actual, expected)


@law
@given(trajectories())
def test_termination_wins_over_truncation(trajectory):
    r, v, nv, terminated, truncated = trajectory
    for actual, expected in zip(
        gae(r, v, nv, terminated, truncated | terminated),
        gae(r, v, nv, terminated, truncated & ~terminated),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


@law
@given(trajectories())
def test_the_last_row_bootstraps_like_any_other(trajectory):
    longer = gae(*trajectory, gae_lambda=0.0).advantages
    np.testing.assert_array_equal(gae(*trajectory[-1:], gae_lambda=0.0).advantages, longer[-1:])


@law
@given(trajectories())
def test_no_truncated_means_that_none_was(trajectory):
    *rest, truncated = trajectory
    for actual, expected in zip(gae(*rest), gae(*rest, np.zeros_like(truncated)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_steady_reward_under_a_time_limit_has_no_advantage():
    horizon, gamma = 50, 0.9
    values = np.full(horizon, 1 / (1 - gamma))
    truncated = np.arange(horizon) % 10 == 9
    estimate = gae(
        np.ones(horizon), values, values, np.zeros(horizon, bool), truncated, gamma=gamma
    )
    np.testing.assert_allclose(estimate.advantages, 0, atol=1e-12)


@law
@given(trajectories(), coefficients, coefficients)
def test_advantage_is_lambda_return_minus_value(trajectory, gamma, gae_lambda):
    settings = {"gamma": gamma, "gae_lambda": gae_lambda}
    targets = lambda_returns(*trajectory, **settings)
    advantages, returns = gae(*trajectory, **settings)
    np.testing.assert_array_equal(targets, returns)
    close(advantages, targets - trajectory.values)


@law
@given(trajectories(horizons=st.integers(1, 24)), coefficients, coefficients)
def test_lambda_return_is_the_weighted_mean_of_n_step_returns(trajectory, gamma, gae_lambda):
    rewards, _, *successors = trajectory
    expected = reference.columns(
        reference.lambda_returns, rewards, *successors, gamma=gamma, gae_lambda=gae_lambda
    )
    close(lambda_returns(*trajectory, gamma=gamma, gae_lambda=gae_lambda), expected)


@law
@given(trajectories(), coefficients)
def test_lambda_0_is_the_one_step_return(trajectory, gamma):
    rewards, _, *successors = trajectory
    one_step = n_step_returns(rewards, *successors, n=1, gamma=gamma)
    close(lambda_returns(*trajectory, gamma=gamma, gae_lambda=0.0), one_step)


@law
@given(trajectories(), coefficients)
def test_lambda_1_is_the_monte_carlo_return_with_bootstrap(trajectory, gamma):
    rewards, _, next_values, terminated, truncated = trajectory
    monte_carlo = discounted_returns(rewards, terminated, truncated, next_values, gamma=gamma)
    close(lambda_returns(*trajectory, gamma=gamma, gae_lambda=1.0), monte_carlo)


@law
@given(trajectories(horizons=st.integers(1, 24)), coefficients, st.integers(1, 30))
def test_n_step_return_is_n_rewards_and_a_bootstrap(trajectory, gamma, n):
    rewards, _, *successors = trajectory
    expected = reference.columns(reference.n_step_returns, rewards, *successors, n=n, gamma=gamma)
    close(n_step_returns(rewards, *successors, n=n, gamma=gamma), expected)


@law
@given(trajectories(), coefficients)
def test_more_steps_than_the_data_hold_is_the_discounted_return(trajectory, gamma):
    rewards, _, next_values, terminated, truncated = trajectory
    n_step = n_step_returns(
        rewards, next_values, terminated, truncated, n=len(rewards) + 1, gamma=gamma
    )
    close(n_step, discounted_returns(rewards, terminated, truncated, next_values, gamma=gamma))


@law
@given(trajectories(), coefficients)
def test_discounted_return_is_the_discounted_sum_of_an_episode(trajectory, gamma):
    rewards, _, next_values, *flags = trajectory
    expected = reference.columns(reference.discounted_returns, rewards, *flags, gamma=gamma)
    close(discounted_returns(rewards, *flags, gamma=gamma), expected)
    zeros = np.zeros_like(next_values)
    close(discounted_returns(rewards, *flags, zeros, gamma=gamma), expected)


@law
@given(trajectories(), st.sampled_from([np.nan, np.inf]))
def test_returns_ignore_next_values_where_terminated(trajectory, rubbish):
    rewards, _, clean, terminated, truncated = trajectory
    dirty = np.where(terminated, rubbish, clean)
    for n in (1, 3, len(rewards)):
        np.testing.assert_array_equal(
            n_step_returns(rewards, dirty, terminated, truncated, n=n, gamma=0.9),
            n_step_returns(rewards, clean, terminated, truncated, n=n, gamma=0.9),
        )


@law
@given(trajectories(), st.sampled_from([np.nan, np.inf]))
def test_discounted_returns_read_next_values_only_where_an_episode_is_cut(trajectory, rubbish):
    rewards, _, next_values, terminated, truncated = trajectory
    cut = truncated & ~terminated
    cut[-1] = ~terminated[-1]
    np.testing.assert_array_equal(
        discounted_returns(
            rewards, terminated, truncated, np.where(cut, next_values, rubbish), gamma=0.9
        ),
        discounted_returns(rewards, terminated, truncated, next_values, gamma=0.9),
    )


ALL = {
    "gae without truncated": lambda r, v, nv, te, tr: gae(r, v, nv, te),
    "n_step_returns without truncated": lambda r, v, nv, te, tr: n_step_returns(
        r, nv, te, n=3, gamma=0.9
    ),
    "discounted_returns of rewards": lambda r, v, nv, te, tr: discounted_returns(r, te, gamma=0.9),
    "gae": lambda r, v, nv, te, tr: gae(r, v, nv, te, tr),
    "lambda_returns": lambda r, v, nv, te, tr: lambda_returns(r, v, nv, te, tr),
    "n_step_returns": lambda r, v, nv, te, tr: n_step_returns(r, nv, te, tr, n=3, gamma=0.9),
    "discounted_returns": lambda r, v, nv, te, tr: discounted_returns(r, te, tr, nv, gamma=0.9),
    "normalize": lambda r, v, nv, te, tr: normalize(r, ~te),
}
EACH = pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def example(horizon=20, shape=(3,)):
    rng = np.random.default_rng(1)
    size = (horizon, *shape)
    flags = rng.random((2, *size)) < 0.1
    return [*rng.normal(size=(3, *size)), *flags]


@EACH
@LIBRARIES
@pytest.mark.parametrize("horizon", [1, 20, 200])
def test_arguments_are_not_modified(function, convert, horizon):
    arguments = [convert(x) for x in example(horizon)]
    before = copy.deepcopy(arguments)
    results = outputs(function(*arguments))
    for result in results:
        result[:] = 0
    for x, y in zip(arguments, before, strict=True):
        assert (x == y).all()


@EACH
def test_read_only_strided_and_foreign_arrays_are_taken(function):
    arguments = example()
    expected = outputs(function(*arguments))
    frozen = [x.copy() for x in arguments]
    for x in frozen:
        x.flags.writeable = False
    reverse = [x[::-1].copy()[::-1] for x in arguments]
    foreign = [x.astype(x.dtype.newbyteorder()) for x in arguments]
    fortran = [np.asfortranarray(x) for x in arguments]
    for variant in (frozen, reverse, foreign, fortran):
        for actual, wanted in zip(outputs(function(*variant)), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@EACH
def test_tensors_of_any_strides_are_taken(function):
    arguments = [torch.as_tensor(x) for x in example(40)]
    expected = outputs(function(*arguments))
    transposed = [x.T.contiguous().T for x in arguments]
    for actual, wanted in zip(outputs(function(*transposed)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    expanded = [x[:1].expand_as(x) for x in arguments]
    dense = [x.clone() for x in expanded]
    for actual, wanted in zip(outputs(function(*expanded)), outputs(function(*dense)), strict=True):
        assert torch.equal(actual, wanted)


@EACH
def test_no_gradient_flows(function):
    *numbers, terminated, truncated = (torch.as_tensor(x) for x in example())
    for result in outputs(function(*(x.requires_grad_() for x in numbers), terminated, truncated)):
        assert not result.requires_grad


@EACH
def test_inference_tensors_give_tensors_to_learn_from(function):
    with torch.inference_mode():
        arguments = [torch.as_tensor(x).clone() for x in example()]
    weight = torch.ones((), dtype=F64, requires_grad=True)
    for result in outputs(function(*arguments)):
        (weight * result).sum().backward()
    assert weight.grad.isfinite()
    with torch.inference_mode():
        outputs(function(*arguments))


@EACH
def test_results_may_be_changed_in_place_by_something_to_learn(function):
    weight = torch.ones((), dtype=F64, requires_grad=True)
    arguments = [torch.as_tensor(x) for x in example()]
    for result in outputs(function(*arguments)):
        result.mul_(weight).sum().backward()
    assert weight.grad.isfinite()


@EACH
def test_no_value_is_read_on_the_host(function):
    # Tensors without data: whatever branched on a value would fail.
    arguments = [torch.as_tensor(x).to("meta") for x in example(200)]
    for result in outputs(function(*arguments)):
        assert result.shape == arguments[0].shape
        assert result.device.type == "meta"


@LIBRARIES
def test_the_widest_dtype_wins_and_is_at_least_float32(convert):
    rewards, values, next_values, *flags = example()

    def run(a, b, c):
        kinds = zip((rewards, values, next_values), (a, b, c), strict=True)
        return str(
            gae(*(convert(x.astype(kind)) for x, kind in kinds), *map(convert, flags))[0].dtype
        )

    assert run("f4", "f4", "f4").endswith("float32")
    assert run("f8", "f4", "f4").endswith("float64")
    assert run("f4", "f4", "f8").endswith("float64")
    assert run("f2", "f2", "f2").endswith("float32")


@law
@given(trajectories(trailing_shapes=st.sampled_from([(3,), (2, 2)])))
def test_columns_know_nothing_of_each_other(trajectory):
    whole = gae(*trajectory)
    for index in np.ndindex(trajectory.rewards.shape[1:]):
        alone = gae(*trajectory[(slice(None), *index)])
        close(alone.advantages, whole.advantages[(slice(None), *index)])


def call(**changes):
    arguments = dict(
        zip(
            ("rewards", "values", "next_values", "terminated", "truncated"),
            (torch.as_tensor(x) for x in example()),
            strict=True,
        )
    )
    return gae(**(arguments | changes))


@pytest.mark.parametrize("name", ["values", "next_values", "terminated", "truncated"])
def test_another_shape_is_refused(name):
    dtype = F64 if "values" in name else torch.bool
    for shape in ((20,), (20, 1), (19, 3), (20, 3, 1)):
        with pytest.raises(ValueError, match=rf"^{name} has shape .* the shape of rewards"):
            call(**{name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_no_steps_are_refused(shape):
    numbers, flags = [torch.zeros(shape)] * 3, [torch.zeros(shape, dtype=torch.bool)] * 2
    with pytest.raises(ValueError, match=r"^rewards has shape .* T >= 1"):
        gae(*numbers, *flags)


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_a_coefficient_outside_0_to_1_is_refused(name):
    for wrong in (-1e-9, 1.0001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^{name} is .* \[0, 1\]"):
            call(**{name: wrong})
    for wrong in ("0.9", None, True, torch.tensor(0.9)):
        with pytest.raises(TypeError, match=rf"^{name} is .*number"):
            call(**{name: wrong})
    for right in (0, 1, np.float32(0.5)):
        call(**{name: right})


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_flags_that_are_not_boolean_are_refused(name):
    for dtype in (F32, torch.int64, torch.uint8):
        with pytest.raises(TypeError, match=rf"^{name} has dtype .* bool"):
            call(**{name: torch.zeros(20, 3, dtype=dtype)})


@pytest.mark.parametrize("name", ["rewards", "values", "next_values"])
def test_numbers_that_are_not_floating_are_refused(name):
    for dtype in (torch.bool, torch.int64):
        with pytest.raises(TypeError, match=rf"^{name} has dtype .* floating"):
            call(**{name: torch.zeros(20, 3, dtype=dtype)})


@pytest.mark.parametrize("name", ["values", "next_values", "terminated", "truncated"])
def test_tensors_and_arrays_do_not_mix(name):
    with pytest.raises(TypeError, match=rf"^{name} is of type .*ndarray.*Tensor like rewards"):
        call(**{name: np.zeros((20, 3), bool if name.startswith("t") else float)})


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"^rewards is of type list"):
        gae([1.0], [1.0], [1.0], [False])
    with pytest.raises(TypeError, match=r"^values is of type list"):
        call(values=[1.0])


def test_n_step_returns_wants_a_positive_integer():
    rewards, _, *successors = example()
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^n is .*integer"):
            n_step_returns(rewards, *successors, n=wrong, gamma=0.9)


def test_discounted_returns_checks_like_the_others():
    rewards, _, next_values, terminated, truncated = example()
    with pytest.raises(ValueError, match=r"^next_values has shape"):
        discounted_returns(rewards, terminated, truncated, next_values[:-1], gamma=0.9)
    with pytest.raises(TypeError, match=r"^terminated has dtype"):
        discounted_returns(rewards, rewards, gamma=0.9)
    with pytest.raises(ValueError, match=r"^gamma"):
        discounted_returns(rewards, terminated, gamma=2.0)


@law
@given(seeds, st.integers(2, 200), st.floats(-100, 100), st.floats(1e-3, 1e3))
def test_normalize_gives_zero_mean_and_unit_std(seed, size, shift, scale):
    x = np.random.default_rng(seed).normal(size=size) * scale + shift
    y = normalize(x)
    assert y.mean() == pytest.approx(0, abs=1e-9)
    assert y.std() == pytest.approx(1, abs=1e-9)
    close(normalize(torch.as_tensor(x)), y)
    close(normalize(7 * x + 3), y)


@BOTH
@pytest.mark.parametrize("constant", [0.0, 0.1, -1 / 3, 1e9, 1e-9])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_normalize_makes_one_row_and_constants_0(dtype, constant, size):
    x = torch.full((size,), constant, dtype=dtype)
    assert torch.equal(normalize(x), torch.zeros(size, dtype=dtype))


@BOTH
def test_normalize_does_not_blow_up_float_noise(dtype):
    noise = torch.finfo(dtype).eps * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert (normalize(100 * (1 + noise.to(dtype))) == 0).all()


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e30, 5.0])
@law
@given(seeds, st.integers(1, 30))
def test_normalize_counts_valid_entries_only(rubbish, seed, size):
    rng = np.random.default_rng(seed)
    x, valid = rng.normal(size=(size, 2)), rng.random((size, 2)) < 0.5
    dirty = np.where(valid, x, rubbish)
    y = normalize(dirty, valid)
    assert (y[~valid] == 0).all()
    if valid.any():
        close(y[valid], normalize(x[valid]))


def test_normalize_divides_by_eps_at_least():
    x = torch.tensor([-1e-6, 1e-6], dtype=F64)
    torch.testing.assert_close(normalize(x, eps=1e-3), x / 1e-3)
    torch.testing.assert_close(normalize(x), x / 1e-6)


def test_normalize_refuses_what_it_cannot_read():
    x = torch.zeros(3)
    with pytest.raises(TypeError, match=r"^x has dtype int64"):
        normalize(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^valid has dtype float32"):
        normalize(x, x)
    with pytest.raises(ValueError, match=r"^valid has shape"):
        normalize(x, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^eps"):
        normalize(x, eps=-1.0)
