"""Sequences: every transition once, in order, never across the end of an episode."""

import numpy as np
import pytest
import torch
from collecting import collect
from environments import TWO, VECTOR, CountingEnv
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, seeds

from ppo import Batch, PolicyConfig, make_policy
from ppo.sequences import Sequences, cut_sequences


@st.composite
def flags(draw):
    rng = np.random.default_rng(draw(seeds))
    shape = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    ended = rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    valid = rng.random(shape) < draw(st.sampled_from([1.0, 0.8, 0.3]))
    return ended, valid, draw(st.sampled_from([None, 1, 2, 3, 7]))


def by_definition(ended, valid, longest):
    """One step after the other: which sequence each row belongs to."""
    sequences = []
    for n in range(ended.shape[1]):
        current = None
        for t in range(ended.shape[0]):
            if not valid[t, n]:
                current = None
                continue
            if current is None or len(current) == longest:
                current = []
                sequences.append(current)
            current.append(t * ended.shape[1] + n)
            if ended[t, n]:
                current = None
    return sequences


@law
@given(flags())
def test_a_rollout_is_cut_at_ends_at_gaps_and_where_sequences_grow_too_long(drawn):
    ended, valid, longest = drawn
    rows, lengths = cut_sequences(ended, valid, longest)
    expected = by_definition(ended, valid, longest)
    assert lengths == tuple(map(len, expected))
    assert rows.tolist() == [row for sequence in expected for row in sequence]


@law
@given(flags(), seeds)
def test_chosen_sequences_bring_their_rows_and_their_states(drawn, seed):
    rows, lengths = cut_sequences(*drawn)
    states = torch.arange(len(lengths), dtype=torch.float32).unsqueeze(-1)
    sequences = Sequences(lengths, states)
    chosen = np.random.default_rng(seed).permutation(len(lengths))[: len(lengths) // 2]
    positions, part = sequences.rows(chosen)
    assert part.lengths == tuple(lengths[index] for index in chosen)
    assert part.states.flatten().tolist() == chosen.tolist()
    parts = np.split(np.arange(len(rows)), np.cumsum(lengths)[:-1]) if lengths else []
    assert positions.tolist() == [row for index in chosen for row in parts[index]]


def batch_of(lengths):
    rows = sum(lengths)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    states = torch.arange(len(lengths)).float().unsqueeze(-1)
    return Batch(sequences=Sequences(tuple(lengths), states), number=number, row=torch.arange(rows))


@law
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 40), seeds)
def test_minibatches_deal_whole_sequences_each_of_them_once(lengths, size, seed):
    batch = batch_of(lengths)
    minis = list(batch.minibatches(size, torch.Generator().manual_seed(seed)))
    assert len(minis) <= -(-len(batch) // size)
    assert all(len(mini) for mini in minis)
    # No minibatch is off the even share by more than a sequence on either side.
    share = len(batch) / -(-len(batch) // size)
    assert all(len(mini) <= share + max(lengths) for mini in minis)
    seen = []
    for mini in minis:
        assert sum(mini.sequences.lengths) == len(mini)
        start = 0
        for length, state in zip(mini.sequences.lengths, mini.sequences.states, strict=True):
            numbers = mini.number[start : start + length]
            assert (numbers == state).all(), "rows of one sequence, with its state"
            assert length == lengths[int(state)]
            assert (mini.row[start : start + length].diff() == 1).all()
            start += length
            seen.append(int(state))
    assert sorted(seen) == list(range(len(lengths)))


def test_minibatches_of_sequences_are_shuffled():
    batch = batch_of([3] * 30)
    generator = torch.Generator().manual_seed(0)
    orders = [
        torch.cat([mini.number for mini in batch.minibatches(9, generator)]).tolist()
        for _ in range(2)
    ]
    assert orders[0] != orders[1] != batch.number.tolist()


@law
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 40))
def test_parts_keep_the_order(lengths, size):
    batch = batch_of(lengths)
    parts = list(batch.parts(size))
    assert torch.cat([part.row for part in parts]).tolist() == list(range(len(batch)))
    assert sum((part.sequences.lengths for part in parts), ()) == tuple(lengths)


def test_rows_of_sequences_cannot_be_chosen_one_by_one():
    with pytest.raises(TypeError, match="belong together; use minibatches"):
        batch_of([2, 3])[:2]


@pytest.mark.parametrize("memory", ["lstm", "gru", "attention"])
def test_memory_goes_on_over_rollouts_and_ends_with_episodes(memory):
    config = PolicyConfig(hidden_sizes=(4,), memory=memory, memory_size=4, memory_steps=3)
    rollouts = collect(lambda: CountingEnv(5, "truncated"), [4, 7], config, num_envs=2)
    for rollout in rollouts:
        count = rollout.flatten().obs[:, 0]
        first = np.cumsum(rollout.sequences.lengths) - rollout.sequences.lengths
        for row, state in zip(first, rollout.sequences.states, strict=True):
            assert bool((state == 0).all()) == bool(count[row] == 0), "empty where it begins"
    assert rollouts[1].flatten().obs[0, 0] == 4, "the second rollout began within an episode"


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ending", ["truncated", "terminated"])
def test_values_are_those_of_stepping_through_the_episodes_also_of_true_successors(ending, shared):
    config = PolicyConfig(
        hidden_sizes=(4,), memory="lstm", memory_size=4, memory_steps=3, shared=shared
    )
    policy = make_policy(VECTOR, TWO, config)
    state = torch.zeros(2, policy.state_size)
    for rollout in collect(lambda: CountingEnv(5, ending), [4, 7], policy, num_envs=2):
        for t, obs in enumerate(rollout.obs):
            torch.testing.assert_close(rollout.values[t], policy.value(obs, state=state))
            state = policy.act(obs, state=state, deterministic=True)[1]
            successors = policy.value(obs + torch.tensor([1.0, 0.0]), state=state)
            wanted = torch.where(rollout.terminated[t], 0.0, successors)
            torch.testing.assert_close(rollout.next_values[t], wanted)
            state[(rollout.terminated | rollout.truncated)[t]] = 0.0
