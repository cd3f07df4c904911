import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, seeds

from ppo._masks import all_of, zero_where_


@law
@given(seeds, st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_entries_become_0_where_flagged_and_stay_elsewhere(seed, dtype, transposed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(0, 5, size=2)
    before = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    flags = torch.from_numpy(rng.random(shape) < 0.5)
    if transposed:
        before, flags = before.T, flags.T
    after = before.clone()
    assert zero_where_(after, flags) is after
    assert torch.equal(after, before.masked_fill(flags, 0.0))


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf])
def test_what_was_flagged_leaves_no_trace(rubbish):
    x = torch.full((2, 3), rubbish)
    assert torch.equal(zero_where_(x, torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_flags_are_all_set_unless_one_is_not(shape):
    flags = torch.ones(shape, dtype=torch.bool)
    assert all_of(flags) is True
    for flag in flags.view(-1):
        flag.logical_not_()
        assert all_of(flags.T) is False
        flag.logical_not_()


def test_a_tensor_off_the_host_is_never_read():
    x = torch.empty(2, device="meta")
    assert zero_where_(x, torch.empty(2, dtype=torch.bool, device="meta")) is x
