import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from ppo.schedules import Constant, Linear, Schedule, as_schedule

numbers = st.floats(-1e6, 1e6)
shares = st.floats(0.0, 1.0)


@law
@given(numbers, st.floats(-10, 10))
def test_a_constant_stays(value, progress):
    assert Constant(value)(progress) == value


@law
@given(numbers, numbers)
def test_a_line_begins_and_ends_exactly_where_it_says(start, end):
    line = Linear(start, end)
    assert line(0.0) == start
    assert line(1.0) == end


@law
@given(numbers, numbers, shares)
def test_a_line_is_a_line(start, end, progress):
    value = Linear(start, end)(progress)
    assert value == pytest.approx(start + progress * (end - start), rel=1e-9, abs=1e-6)


@law
@given(numbers, numbers, st.floats(1.0, 1e9))
def test_nothing_overshoots_beyond_the_ends(start, end, beyond):
    line = Linear(start, end)
    assert line(beyond) == line(math.inf) == end
    assert line(-beyond) == line(-math.inf) == start


@law
@given(st.floats(0, 1e6), shares)
def test_a_line_to_0_is_never_negative(start, progress):
    assert 0 <= Linear(start, 0.0)(progress) <= start


@law
@given(st.builds(Constant, numbers) | st.builds(Linear, numbers, numbers))
def test_the_plain_form_gives_the_schedule_back(schedule):
    assert as_schedule(schedule.to_plain()) == schedule


def test_the_plain_form_is_what_a_person_writes():
    assert Constant(3e-4).to_plain() == 3e-4
    assert Linear(3e-4, 0).to_plain() == {"linear": [3e-4, 0.0]}


@pytest.mark.parametrize(
    ("written", "schedule"),
    [
        (3e-4, Constant(3e-4)),
        (0, Constant(0.0)),
        ({"linear": [3e-4, 0]}, Linear(3e-4, 0.0)),
        ({"linear": (1, 0.5)}, Linear(1.0, 0.5)),
        ({"constant": 0.2}, Constant(0.2)),
        ({"constant": [0.2]}, Constant(0.2)),
    ],
)
def test_numbers_and_mappings_are_schedules(written, schedule):
    assert as_schedule(written) == schedule
    assert isinstance(as_schedule(written), Schedule)


def test_a_schedule_is_kept_as_it_is():
    class Cosine:
        def __call__(self, progress):
            return 0.5 + 0.5 * math.cos(math.pi * progress)

        def to_plain(self):
            return {"cosine": []}

    for schedule in (Linear(1.0, 0.0), Constant(1.0), Cosine()):
        assert as_schedule(schedule) is schedule


def test_schedules_are_frozen_and_hold_floats():
    line = Linear(1, 0)
    assert isinstance(line.start, float)
    assert isinstance(Constant(1).value, float)
    assert hash(line) == hash(Linear(1.0, 0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        line.start = 2.0


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        ({"liner": [1, 0]}, ValueError, r"kind 'liner'.*did you mean 'linear'\?"),
        ({"const": 1}, ValueError, r"did you mean 'constant'\?"),
        ({3: 1}, ValueError, r"kind 3, wanted one of \['constant', 'linear'\]"),
        ({"linear": [1]}, ValueError, r"'linear' has 1 values, wanted 2; write \{linear: \[start"),
        ({"linear": 1}, ValueError, r"has 1 values, wanted 2"),
        ({"linear": "10"}, ValueError, r"has 1 values, wanted 2"),
        ({"linear": [1, 0, 0]}, ValueError, r"has 3 values, wanted 2"),
        ({"linear": [1, 0], "constant": 1}, ValueError, r"wanted one entry"),
        ({}, ValueError, r"wanted one entry"),
        ({"linear": ["a", 0]}, TypeError, r"^start is 'a' \(str\), wanted a number"),
        ({"linear": [1, math.nan]}, ValueError, r"^end is nan, wanted a finite number"),
        (math.inf, ValueError, r"^value is inf"),
        (True, TypeError, r"^value is True"),
        ("3e-4", TypeError, r"^schedule is '3e-4' \(str\), wanted a number"),
        (None, TypeError, r"^schedule is None"),
        (math.sqrt, TypeError, r"wanted a number, a schedule or a mapping"),
        (Linear, TypeError, r"wanted a number, a schedule or a mapping"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_remedy(written, error, message):
    with pytest.raises(error, match=message):
        as_schedule(written)
