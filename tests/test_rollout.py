import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo.errors import NonFiniteError
from ppo.frames import FrameStack
from ppo.rollout import Batch, Episode, Rollout
from ppo.trees import leaves


def make_rollout(T=4, N=3, valid=None):
    grid = torch.arange(T * N, dtype=torch.float32).reshape(T, N)
    flags = torch.zeros(T, N, dtype=torch.bool)
    return Rollout(
        obs=torch.stack([grid, -grid], -1),
        actions=grid.long(),
        log_probs=grid + 0.1,
        values=grid + 0.2,
        rewards=grid + 0.3,
        next_values=grid + 0.4,
        terminated=flags,
        truncated=flags.clone(),
        valid=~flags if valid is None else valid,
        episodes=(Episode(1.5, 3, 0),),
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Batch


@given(st.integers(1, 70), st.integers(1, 80), st.integers(0, 3))
def test_minibatches_hold_each_row_exactly_once_in_balanced_sizes(rows, size, seed):
    index = torch.arange(rows)
    batch = Batch(index=index, twice=2 * index)
    minis = list(batch.minibatches(size, generator(seed)))
    assert torch.equal(torch.cat([mini.index for mini in minis]).sort().values, index)
    assert all(torch.equal(mini.twice, 2 * mini.index) for mini in minis)
    sizes = [len(mini) for mini in minis]
    assert len(sizes) == -(-rows // size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= size


@given(st.integers(1, 70), st.integers(1, 80))
def test_minibatches_of_arrays_hold_what_those_of_tensors_do(rows, size):
    index = torch.arange(rows)
    flat, nested = index.float(), {"a": index, "b": (index[:, None] * torch.ones(2), index > 3)}
    stack = FrameStack(flat, torch.stack([index, index.flip(0)], -1))
    batch = Batch(flat=flat, nested=nested, stack=stack)
    ours, theirs = (
        list(batch.minibatches(size, generator(), arrays=arrays)) for arrays in (True, False)
    )
    assert len(ours) == len(theirs)
    for mini, wanted in zip(ours, theirs, strict=True):
        assert len(mini) == len(wanted)
        assert mini.fields.keys() == wanted.fields.keys()
        pairs = zip(
            leaves(tuple(mini.fields.values())), leaves(tuple(wanted.fields.values())), strict=True
        )
        for array, tensor in pairs:
            assert type(array) is np.ndarray
            assert array.dtype == tensor.numpy().dtype
            np.testing.assert_array_equal(array, tensor)


def test_minibatches_are_a_function_of_the_generator():
    batch = Batch(index=torch.arange(50))
    draws = [
        torch.cat([mini.index for mini in batch.minibatches(8, generator(seed))])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_every_epoch_has_an_order_of_its_own():
    batch, shuffle = Batch(index=torch.arange(50)), generator()
    first, second = (
        torch.cat([mini.index for mini in batch.minibatches(8, shuffle)]) for _ in range(2)
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))


def test_every_row_is_as_likely_in_every_minibatch():
    batch, shuffle = Batch(index=torch.arange(10)), generator()
    counts = torch.zeros(10)
    for _ in range(2000):
        first = next(iter(batch.minibatches(3, shuffle)))
        counts[first.index] += 1
    # 2000 draws of 3 of 10 rows: 600 each, with a standard deviation of 20.
    assert (counts - 600).abs().max() < 100


def test_minibatches_take_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    list(Batch(index=torch.arange(10)).minibatches(3, generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [0, -1])
def test_a_minibatch_has_at_least_one_row(size):
    with pytest.raises(ValueError, match=f"minibatch_size must be at least 1, got {size}"):
        list(Batch(index=torch.arange(3)).minibatches(size, generator()))


def test_a_batch_without_rows_has_no_minibatches():
    assert list(Batch(index=torch.zeros(0)).minibatches(4, generator())) == []


def test_fields_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"common first axis.*'a': 3, 'b': 2"):
        Batch(a=torch.zeros(3), b=torch.zeros(2))
    with pytest.raises(ValueError, match="common first axis"):
        Batch()


def test_an_unknown_field_is_named_together_with_the_known_ones():
    batch = Batch(obs=torch.zeros(3), actions=torch.zeros(3))
    with pytest.raises(AttributeError, match=r"no field 'rewards'.*\['actions', 'obs'\]"):
        _ = batch.rewards
    assert not hasattr(batch, "rewards")


def test_a_batch_can_be_indexed_replaced_and_moved():
    batch = Batch(a=torch.arange(4), b=torch.arange(4.0))
    assert batch[torch.tensor([2, 0])].a.tolist() == [2, 0]
    assert batch[1:3].b.tolist() == [1.0, 2.0]
    more = batch.replace(b=torch.ones(4), c=torch.zeros(4))
    assert sorted(more.fields) == ["a", "b", "c"]
    assert more.b.tolist() == [1.0] * 4
    assert batch.b.tolist() == [0.0, 1.0, 2.0, 3.0]
    moved = batch.to("meta")
    assert {x.device.type for x in moved.fields.values()} == {"meta"}


@pytest.mark.parametrize(
    "clone",
    [copy.copy, copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_batch_can_be_copied_and_pickled(clone):
    twin = clone(Batch(obs=torch.arange(3)))
    assert twin.obs.tolist() == [0, 1, 2]


# --- Rollout


def test_a_rollout_is_frozen():
    rollout = make_rollout()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout.rewards = torch.zeros(4, 3)


def test_flatten_merges_time_and_environments_in_step():
    rollout = make_rollout()
    batch = rollout.flatten(returns=rollout.rewards)
    assert len(batch) == rollout.num_transitions == 12
    assert sorted(batch.fields) == ["actions", "log_probs", "obs", "returns", "values"]
    assert batch.obs.shape == (12, 2)
    assert torch.equal(batch.obs[:, 0].long(), batch.actions)
    assert torch.equal(batch.returns, rollout.rewards.reshape(-1))
    assert torch.equal(batch.log_probs, rollout.log_probs.reshape(-1))
    assert torch.equal(batch.values, rollout.values.reshape(-1))


def test_flatten_drops_the_rows_that_are_no_transition():
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[1, 0] = valid[3, 2] = False
    rollout = make_rollout(valid=valid)
    batch = rollout.flatten(extra=torch.stack([rollout.rewards] * 2, -1))
    assert len(batch) == rollout.num_transitions == 10
    assert batch.actions.tolist() == [n for n in range(12) if n not in (3, 11)]
    assert torch.equal(batch.extra[:, 1], rollout.rewards[valid])


def test_a_rollout_without_any_transition_flattens_to_nothing():
    rollout = make_rollout(valid=torch.zeros(4, 3, dtype=torch.bool))
    assert rollout.num_transitions == len(rollout.flatten()) == 0


@pytest.mark.parametrize("shape", [(12,), (3, 4), (4,), (4, 1)])
def test_extras_must_start_with_time_and_environments(shape):
    with pytest.raises(ValueError, match=r"advantages must start with \[T, N\] = \[4, 3\]"):
        make_rollout().flatten(advantages=torch.zeros(shape))


def test_only_numbers_that_matter_must_be_finite():
    flags = torch.zeros(4, 3, dtype=torch.bool)
    terminated, reset = flags.clone(), flags.clone()
    terminated[2, 1] = reset[1, 0] = True
    rollout = dataclasses.replace(make_rollout(valid=~reset), terminated=terminated)
    nan = torch.tensor(torch.nan)
    next_values = torch.where(terminated | reset, nan, rollout.next_values)
    rewards = torch.where(reset, nan, rollout.rewards)
    dataclasses.replace(rollout, next_values=next_values, rewards=rewards).check_finite()
    for name in ("rewards", "values", "next_values", "log_probs"):
        broken = dataclasses.replace(rollout, **{name: torch.where(~reset & ~terminated, nan, 0.0)})
        with pytest.raises(NonFiniteError, match=rf"^{name} .*step 0 of environment 0"):
            broken.check_finite()


def test_a_rollout_moves_as_a_whole_and_keeps_its_episodes():
    rollout = make_rollout()
    moved = rollout.to("meta")
    fields = {f.name: getattr(moved, f.name) for f in dataclasses.fields(Rollout)}
    assert fields.pop("episodes") == rollout.episodes
    assert {x.device.type for x in fields.values() if x is not None} == {"meta"}
    assert rollout.obs.device.type == "cpu"
