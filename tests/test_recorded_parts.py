"""Recordings of minibatches of many rows, which are replayed part after part."""

import numpy as np
import pytest
import torch
from gradient_study import GradientStudy, arrays_of
from hypothesis import given
from hypothesis import strategies as st
from small_policies import (
    OwnPolicy,
    assert_bitwise_equal,
    build,
    improve,
    make_batch,
    make_learner,
    parts,
)
from strategies import law, seeds
from torch import nn

from ppo import Batch
from ppo.learner import fixed_rows, learner, recorded
from ppo.learner.eager import LossSettings
from ppo.learner.fixed_rows import FixedRows
from ppo.trees import leaves

LOSS = LossSettings(0.2, 0.01, 0.5, 0.3, True)


@pytest.fixture
def of_few_rows(monkeypatch):
    """Parts have up to 8 rows."""
    monkeypatch.setattr(fixed_rows, "_ROWS_AT_ONCE", 8)


class Study(GradientStudy):
    def check(self, batch, loss, rtol):
        metrics, ours = self.gradient(self.recorded, batch, loss)
        wanted, theirs = self.gradient(self.eager, batch, loss)
        np.testing.assert_allclose(metrics, wanted, rtol, atol=rtol)
        np.testing.assert_allclose(torch.cat(ours), torch.cat(theirs), rtol, atol=rtol)


def in_double_precision(policy, rows, seed):
    """A batch for a policy that was made double, on which ratios are near 1."""
    fields = make_batch(OwnPolicy(), rows, seed).fields
    batch = Batch(**{n: t.double() if t.is_floating_point() else t for n, t in fields.items()})
    with torch.no_grad():
        new = policy.evaluate(batch.obs, batch.actions)
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    return batch.replace(log_probs=new.log_probs + 0.3 * noise, values=new.values + noise)


losses = st.builds(
    LossSettings,
    clip_range=st.sampled_from([0.1, 0.9]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    value_coef=st.sampled_from([0.0, 0.5, 2.0]),
    value_clip_range=st.sampled_from([None, 0.1, 1.0]),
    normalize_advantages=st.booleans(),
    clip_range_high=st.sampled_from([None, 0.28]),
    dual_clip=st.sampled_from([None, 1.5]),
)


@law
@given(losses, st.integers(1, 60), st.integers(1, 20), seeds)
def test_the_parts_of_a_minibatch_sum_up_to_its_gradient_and_its_metrics(loss, rows, at_once, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_rows, "_ROWS_AT_ONCE", at_once)
        torch.manual_seed(seed)
        study = Study(OwnPolicy().double())
        for number in range(1, 5):
            batch = in_double_precision(study.policy, rows, seed % 2**31 + number)
            if number <= 2:
                study.recorded(batch, loss)
            else:
                study.check(batch, loss, 1e-9)
            assert study.replays() == [number]


@pytest.mark.parametrize("rows", [1024, 1025, 5000, 2**15 + 1])
def test_minibatches_of_any_size_are_replayed_in_parts_that_fit_the_cache(rows):
    study = Study(build())
    for number in range(1, 4):
        batch = make_batch(study.policy, rows, number)
        if number <= 2:
            study.recorded(batch, LOSS)
        else:
            study.check(batch, LOSS, 1e-4)
        assert study.replays() == [number]
    (recording,) = study.recorded._recordings.values()
    assert len(recording._rows) <= 1024


@given(st.integers(1, 100), st.integers(1, 20))
def test_every_row_counts_once_in_parts_of_one_shape(rows, at_once):
    numbers = torch.arange(rows)
    batch = Batch(
        obs={"a": numbers.float(), "b": (numbers[:, None].repeat(1, 2),)},
        actions=numbers,
        action_masks=numbers[:, None] > torch.arange(3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_rows, "_ROWS_AT_ONCE", at_once)
        found = FixedRows.of(arrays_of(batch))
    assert len({part.shape for part in found}) == 1
    assert len(found[0]) <= at_once
    assert len(found) == -(-rows // len(found[0]))
    for kind, wanted in enumerate(leaves((batch.obs, batch.actions, (batch.action_masks,)))):
        counting = np.concatenate([part.arrays[kind][part.places] for part in found])
        np.testing.assert_array_equal(counting, wanted)
    assert torch.equal(torch.cat([numbers[part.counted] for part in found]), numbers)


def test_masks_of_legal_actions_are_parted_too(of_few_rows):
    study = Study(build())
    for number in range(1, 5):
        plain = make_batch(study.policy, 21, number)
        masks = torch.rand(21, 3, generator=torch.Generator().manual_seed(number)) < 0.5
        masks[torch.arange(21), plain.actions] = True
        batch = plain.replace(action_masks=masks)
        if number <= 2:
            study.recorded(batch, LOSS)
        else:
            study.check(batch, LOSS, 1e-4)
        assert study.replays() == [number]


class AcrossRows(OwnPolicy):
    """Looks at all rows for the sake of one."""

    def evaluate(self, obs, actions):
        return super().evaluate(obs - obs.mean(0), actions)


def test_a_policy_to_which_the_other_rows_matter_is_left_to_autograd(of_few_rows):
    torch.manual_seed(0)
    study = Study(AcrossRows())
    for number in range(1, 4):
        study.check(make_batch(study.policy, 30, number), LOSS, 1e-6)
        assert study.replays() == []
    study = Study(study.policy)
    study.recorded(make_batch(study.policy, 8), LOSS)
    assert study.replays() == [1]  # alone they are all there are


class ShiftsSome(OwnPolicy):
    """Has something in a place that no fingerprint sees, and it matters to a few rows."""

    def __init__(self):
        super().__init__()
        self.shift = [0.0]

    def evaluate(self, obs, actions):
        shifted = super().evaluate(obs + self.shift[0], actions)
        plain = super().evaluate(obs, actions)
        return type(plain)(
            *(torch.where(obs[:, 0] > 9.0, s, p) for s, p in zip(shifted, plain, strict=True))
        )


@pytest.mark.parametrize("row", [0, 12, 29])
def test_all_parts_are_compared_with_autograd(row, of_few_rows, monkeypatch):
    monkeypatch.setattr(recorded, "_REPLAYS_PER_COMPARISON", 5)
    study = Study(ShiftsSome())
    batch = make_batch(study.policy, 30)
    batch.obs.clamp_(max=8.0)
    batch.obs[row, 0] = 10.0
    for number in range(1, 6):
        study.recorded(batch, LOSS)
        assert study.replays() == [number]
    study.policy.shift[0] = 1.0
    for _ in range(4):
        study.recorded(batch, LOSS)
    assert study.replays() == [9]
    study.check(batch, LOSS, 1e-6)
    assert study.replays() == []


def trained(wanted, make=build, rows=70, **options):
    """State and metrics of some updates, and the number of those that two processes took."""
    policy, taken, metrics = make(), 0, []
    trainer = make_learner(policy, **options)
    with trainer.helped(wanted):
        for number in range(5):
            batch = make_batch(policy, rows, seed=number)
            metrics.append(improve(trainer, batch, seed=number))
            taken += trainer._helper is not None
    return parts(policy, trainer), metrics, taken


@pytest.mark.parametrize("normalized", ["none", "minibatch"])
def test_two_processes_train_in_parts_bit_for_bit_as_one(normalized, of_few_rows, monkeypatch):
    monkeypatch.setattr(learner, "_MOST_SLOWER", 10**9)
    options = {"minibatch_size": 25, "value_clip_range": 0.1, "normalize_advantages": normalized}
    alone, metrics, none = trained(False, **options)
    together, others, taken = trained(True, **options)
    assert (none, taken) == (0, 3)
    assert_bitwise_equal(alone, together)
    assert metrics == others


@pytest.mark.parametrize(("rows", "taken"), [(16, 0), (24, 3)])
def test_a_few_steps_of_many_parts_are_worth_a_process(rows, taken, of_few_rows, monkeypatch):
    """Three steps, of two parts and of three."""
    monkeypatch.setattr(learner, "_MOST_SLOWER", 10**9)
    assert trained(True, rows=rows, minibatch_size=100)[2] == taken


class Frozen(OwnPolicy):
    """Parameters that get no gradient, and some that no output depends on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.actor.bias.requires_grad_(False)


def test_what_has_no_gradient_has_none_in_parts(of_few_rows):
    study = Study(Frozen())
    for number in range(1, 5):
        batch = make_batch(study.policy, 30, number)
        study.recorded(batch, LOSS)
    study.check(batch, LOSS, 1e-4)
    assert study.replays() == [5]
    assert not study.policy.unused.grad.any()
