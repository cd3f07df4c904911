import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from ppo.learner.adaptive_rate import MAX_SCALE, MIN_SCALE, adapted_scale

scales = st.floats(MIN_SCALE, MAX_SCALE)
kls = st.floats(0.0, 1e3)


@law
@given(scales, kls, st.floats(1e-4, 1.0))
def test_the_scale_falls_above_twice_the_kl_and_rises_below_half_of_it(scale, kl, desired):
    new = adapted_scale(scale, kl, desired)
    if kl > 2 * desired:
        assert new == max(scale / 1.5, MIN_SCALE)
    elif kl < desired / 2:
        assert new == min(scale * 1.5, MAX_SCALE)
    else:
        assert new == scale
    assert MIN_SCALE <= new <= MAX_SCALE


def test_an_update_that_had_no_kl_changes_nothing():
    assert adapted_scale(0.3, math.nan, 0.01) == 0.3


def test_a_kl_that_is_as_the_square_of_the_rate_comes_to_the_desired_one():
    for start in (1e-6, 1.0, 1e6):
        scale, sensitivity = 1.0, 0.01 * start / 0.5
        for _ in range(50):
            scale = adapted_scale(scale, sensitivity * scale**2, 0.01)
        kl = sensitivity * scale**2
        assert 0.005 <= kl <= 0.02 or scale in (MIN_SCALE, MAX_SCALE)
    assert adapted_scale(1.0, 0.005, 0.01) == adapted_scale(1.0, 0.02, 0.01) == pytest.approx(1.0)
