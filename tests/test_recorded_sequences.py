"""Recordings of policies that remember: minibatches of sequences of all lengths."""

import numpy as np
import pytest
import torch
from gradient_study import GradientStudy, arrays_of
from hypothesis import given
from hypothesis import strategies as st
from small_policies import (
    BOX,
    DISCRETE,
    OwnPolicy,
    assert_bitwise_equal,
    build,
    improve,
    make_learner,
    parts,
)
from strategies import seeds

from ppo import Batch, PolicyConfig
from ppo.learner import critic_process, learner
from ppo.learner.eager import LossSettings
from ppo.learner.fixed_rows import FixedRows
from ppo.learner.recorded import _MOST_PADDING
from ppo.sequences import Sequences

LOSS = LossSettings(0.2, 0.01, 0.5, 0.3, True)
MEMORIES = pytest.mark.parametrize("memory", ["lstm", "gru", "attention"])


def remembering(memory="lstm", action_space=DISCRETE, shared=False, seed=0):
    config = PolicyConfig(
        hidden_sizes=(8,), output_gain=1.0, memory=memory, memory_size=8, shared=shared
    )
    return build(action_space, config, seed)


def make_batch(policy, lengths, seed=0):
    """Sequences from the middle of episodes, with ratios near 1."""
    generator, rows = torch.Generator().manual_seed(seed), sum(lengths)
    obs = 2.0 * torch.randn(rows, 4, generator=generator)
    states = torch.zeros(len(lengths), policy.state_size)
    for _ in range(2):
        seen = torch.randn(len(lengths), 4, generator=generator)
        _, states = policy.act(seen, generator=generator, state=states)
    sequences = Sequences(tuple(lengths), states)
    actions, _ = policy.act(obs, generator=generator, state=states[:1].expand(rows, -1))
    with torch.no_grad():
        new = policy.evaluate(obs, actions, sequences=sequences)
    return Batch(
        sequences=sequences,
        obs=obs,
        actions=actions,
        log_probs=new.log_probs + 0.1 * torch.randn(rows, generator=generator),
        values=new.values + torch.randn(rows, generator=generator),
        advantages=torch.randn(rows, generator=generator),
        returns=new.values + torch.randn(rows, generator=generator),
    )


def random_lengths(seed, count=9, longest=16):
    """Most sequences are as long as they may be."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < 0.6, longest, rng.integers(1, longest + 1, count))
    return [*lengths.tolist(), longest]


class Study(GradientStudy):
    def check(self, batch):
        metrics, ours = self.gradient(self.recorded, batch, LOSS)
        wanted, theirs = self.gradient(self.eager, batch, LOSS)
        np.testing.assert_allclose(metrics, wanted, rtol=1e-4, atol=1e-5)
        ours, theirs = torch.cat(ours), torch.cat(theirs)
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), seeds)
def test_extended_sequences_begin_with_the_rows_they_extend(lengths, seed):
    states = torch.randn(len(lengths), 3, generator=torch.Generator().manual_seed(seed))
    positions, longer, places = Sequences(tuple(lengths), states).extended()
    count, longest = longer.shape
    assert len(set(longer.lengths)) == 1
    assert max(lengths) <= longest <= 9 * max(lengths) / 8
    assert len(lengths) <= count <= 9 * len(lengths) / 8
    assert positions[places].tolist() == list(range(sum(lengths)))  # all rows, in their order
    owner = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    assert np.array_equal(places, owner * longest + step)
    assert torch.equal(longer.states[: len(lengths)], states)
    assert positions.min() >= 0
    assert positions.max() < sum(lengths)


@MEMORIES
@pytest.mark.parametrize("shared", [False, True], ids=["two bodies", "one body"])
@pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["classes", "numbers"])
def test_a_recording_is_the_gradient_of_minibatches_of_any_lengths(memory, shared, action_space):
    policy = remembering(memory, action_space, shared)
    study = Study(policy)
    for seed in range(20):
        batch = make_batch(policy, random_lengths(seed), seed)
        if seed < 2:
            study.recorded(batch, LOSS)
        else:
            study.check(batch)
        for vector in study.optimizer.parameters:
            vector.add_(0.02 * torch.randn(vector.shape, generator=generator_of(seed)))
    assert study.replays() == [20]


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def test_rows_that_mean_nothing_are_like_others_so_that_nothing_infinite_comes_of_them():
    policy = remembering()
    batch = make_batch(policy, [3, 1, 4])
    (rows,) = FixedRows.of(arrays_of(batch))
    real = {tuple(row) for row in batch.obs.tolist()}
    assert {tuple(row) for row in rows.obs.tolist()} == real
    np.testing.assert_array_equal(rows.obs[rows.places], batch.obs)
    np.testing.assert_array_equal(rows.actions[rows.places], batch.actions)


def test_masks_of_legal_actions_are_extended_too():
    policy = remembering()
    plain = make_batch(policy, [3, 4])
    masks = torch.rand(7, 3, generator=generator_of(0)) < 0.5
    masks[torch.arange(7), plain.actions] = True
    batch = plain.replace(action_masks=masks)
    study = Study(policy)
    for _ in range(2):
        study.recorded(batch, LOSS)
    study.check(batch)
    assert study.replays() == [3]
    (rows,) = FixedRows.of(arrays_of(batch))
    np.testing.assert_array_equal(rows.masks[rows.places], masks)


def test_a_few_shapes_serve_all_minibatches():
    policy = remembering()
    study = Study(policy)
    for seed in range(60):
        study.recorded(make_batch(policy, random_lengths(seed, 14 + seed % 5), seed), LOSS)
    assert len(study.replays()) == 4  # 15, 16, 18 and 20 sequences


def test_what_would_be_mostly_padding_is_left_to_autograd():
    policy = remembering()
    study = Study(policy)
    lengths = [16] + [1] * 10
    (rows,) = FixedRows.of(arrays_of(make_batch(policy, lengths)))
    assert rows.sequences.shape[0] * 16 > _MOST_PADDING * sum(lengths)
    for seed in range(3):
        study.check(make_batch(policy, lengths, seed))
    assert study.replays() == []
    study.recorded(make_batch(policy, [16] * 4), LOSS)
    assert study.replays() == [1]


class Running(OwnPolicy):
    """Remembers the sum of what it saw; the hook sees what a method makes of the sums."""

    state_size = 4

    def act(self, obs, *, noise=None, generator=None, deterministic=False, state=None):
        return super().act(obs + state, generator=generator), obs + state

    def evaluate(self, obs, actions, *, sequences=None):
        sums = [
            state + part.cumsum(0)
            for part, state in zip(obs.split(sequences.lengths), sequences.states, strict=True)
        ]
        return super().evaluate(self.seen(torch.cat(sums)), actions)

    def seen(self, sums):
        return sums.tanh()


class Mixing(Running):
    """What it says of a row depends on all rows of the minibatch."""

    def seen(self, sums):
        return sums - sums.mean(0)


class Peeping(Running):
    """What it says of a row depends on those to come."""

    def evaluate(self, obs, actions, *, sequences=None):
        means = [part.mean(0).expand(part.shape) for part in obs.split(sequences.lengths)]
        return OwnPolicy.evaluate(self, torch.cat(means), actions)


def test_an_own_policy_that_goes_by_the_lengths_is_recorded():
    policy = Running()
    study = Study(policy)
    for seed in range(6):
        lengths = random_lengths(seed)
        batch = make_batch(policy, lengths, seed)
        if seed < 2:
            study.recorded(batch, LOSS)
        else:
            study.check(batch)
    assert study.replays() == [6]


@pytest.mark.parametrize("kind", [Mixing, Peeping])
def test_a_policy_to_which_padding_matters_is_left_to_autograd(kind):
    policy = kind()
    study = Study(policy)
    for seed in range(3):
        study.check(make_batch(policy, [16, 5, 9, 16], seed))
    assert study.replays() == []


# In two processes


@pytest.fixture
def never_given_up(monkeypatch):
    monkeypatch.setattr(learner, "_MOST_SLOWER", 10**9)


def trained(wanted, memory="lstm", lengths=random_lengths):
    """State and metrics of twelve updates."""
    policy, metrics = remembering(memory), []
    trainer = make_learner(policy, minibatch_size=64)
    with trainer.helped(wanted):
        for number in range(12):
            batch = make_batch(policy, lengths(number), number)
            metrics.append(improve(trainer, batch, seed=number))
    return parts(policy, trainer), metrics


@MEMORIES
def test_two_processes_train_a_memory_bit_for_bit_as_one(memory, never_given_up, monkeypatch):
    used = count_updates(monkeypatch)
    alone, metrics = trained(False, memory)
    assert used == []
    together, others = trained(True, memory)
    assert len(used) >= 3
    assert_bitwise_equal(alone, together)
    assert metrics == others


def count_updates(monkeypatch):
    """Whether each update of two processes succeeded."""
    used, taken = [], critic_process.CriticProcess.improve

    def improve(self, *args):
        records = taken(self, *args)
        used.append(records is not None)
        return records

    monkeypatch.setattr(critic_process.CriticProcess, "improve", improve)
    return used


def test_a_shape_that_was_never_seen_is_recorded_in_one_process(never_given_up, monkeypatch):
    used = count_updates(monkeypatch)

    def lengths(number):
        return [16] * 12 if number != 6 else [8] * 24

    runs = [trained(wanted, lengths=lengths) for wanted in (False, True)]
    assert all(used)
    assert len(used) == 9  # of the third to the last, but not the seventh
    assert_bitwise_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_there_may_be_more_and_fewer_sequences_from_update_to_update(never_given_up, monkeypatch):
    used = count_updates(monkeypatch)

    def lengths(number):
        return [16] * 12 if number % 2 else [8] * 24

    runs = [trained(wanted, lengths=lengths) for wanted in (False, True)]
    assert all(used)
    assert len(used) == 10  # all but the first two
    assert_bitwise_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
