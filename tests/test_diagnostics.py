import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, masked_rows

from ppo import diagnostics
from ppo.diagnostics import explained_variance

F32, F64 = torch.float32, torch.float64


@law
@given(masked_rows(count=2), st.floats(-10, 10), st.sampled_from([np.float32, np.float64]))
def test_explained_variance_is_1_minus_the_share_of_the_residual(drawn, shift, dtype):
    (values, returns), valid = drawn
    values, returns = values.astype(dtype), (returns + shift).astype(dtype)
    share = explained_variance(values, returns, valid)
    assert isinstance(share, np.ndarray)
    assert share.dtype == dtype
    tensors = (torch.as_tensor(x) for x in (values, returns, valid))
    np.testing.assert_array_equal(explained_variance(*tensors).numpy(), share)
    v, r = values[valid], returns[valid]
    if len(r) == 1:
        assert math.isnan(share)
    elif dtype == np.float64:
        assert 1 - share == pytest.approx(np.var(r - v) / np.var(r), rel=1e-6)


def test_explained_variance_of_a_perfect_and_of_a_constant_critic():
    returns = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 1e5, returns) == 1  # what is left is rounding
    assert explained_variance(torch.full((100,), 3.0), returns).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9, 1e-30])
@pytest.mark.parametrize("count", [7, 1000, 100_003])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_explained_variance_of_equal_returns_is_nan(constant, count, dtype):
    assert explained_variance(
        torch.randn(count, dtype=dtype), torch.full((count,), constant).to(dtype)
    ).isnan()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_explained_variance_reads_valid_rows_only(rubbish):
    values, returns = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(30) % 3 > 0
    expected = explained_variance(values[valid], returns[valid])
    values[~valid], returns[~valid] = rubbish, rubbish
    torch.testing.assert_close(explained_variance(values, returns, valid), expected)


@law
@given(masked_rows(count=2), st.sampled_from([F32, F64]))
def test_explained_variance_is_the_same_on_the_host_as_elsewhere(drawn, dtype):
    (values, returns), valid = drawn
    v, r = (torch.from_numpy(x).to(dtype) for x in (values, returns))
    valid = torch.from_numpy(valid)
    found = diagnostics._share_on_cpu(v, r, valid)
    wanted = diagnostics._share(v, r, valid)
    assert found.dtype == wanted.dtype == dtype
    torch.testing.assert_close(1 - found, 1 - wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_explained_variance_of_nothing_is_nan():
    nothing = torch.zeros(0)
    assert explained_variance(nothing, nothing).isnan()
    assert explained_variance(torch.ones(3), torch.ones(3), torch.zeros(3) > 0).isnan()


def test_explained_variance_reads_no_value_on_the_host():
    # A tensor without data: whatever branched on a value would fail.
    x = torch.empty(8, device="meta")
    assert explained_variance(x, x, x > 0).device.type == "meta"
