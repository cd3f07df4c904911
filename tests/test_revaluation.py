"""What a policy thinks of a rollout, and how many threads torch takes for it."""

import dataclasses

import pytest
import torch
from collecting import collect
from environments import TWO, VECTOR, CountingEnv
from torch import nn

from ppo import PolicyConfig, RolloutCollector, make_policy, revaluation, revalue
from ppo._threads import threads
from ppo.distributions import Categorical


class Watching(nn.Module):
    """Notes how many threads torch uses while it is asked."""

    def __init__(self, width=4):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(width))
        self.seen = set()

    def act(self, obs, *, generator=None, deterministic=False):
        return torch.zeros(len(obs), dtype=torch.int64)

    def evaluate(self, obs, actions):
        self.seen.add(torch.get_num_threads())
        return obs[:, 0], obs[:, 0], obs[:, 0]

    def value(self, obs):
        self.seen.add(torch.get_num_threads())
        return obs[:, 0]


@pytest.mark.parametrize(("width", "wanted"), [(2**16, 1), (2**16 + 1, 3)])
def test_only_a_large_policy_is_evaluated_by_several_threads(width, wanted):
    policy = Watching(width)
    with threads(3), RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
        collector.collect(policy, 4)
        assert torch.get_num_threads() == 3
    assert policy.seen == {wanted}


def test_many_rows_are_evaluated_by_several_threads(monkeypatch):
    monkeypatch.setattr(revaluation, "_FEW", 2 * 4 * 4 - 1)
    policy = Watching()
    with threads(3), RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
        collector.collect(policy, 4)
    assert policy.seen == {3}


def test_entropies_of_a_rollout_are_not_computed(monkeypatch):
    monkeypatch.setattr(Categorical, "entropy", None)
    with RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        rollout = collector.collect(policy, 4)
        revalue(policy, rollout)


class Counting(Watching):
    """Notes how many rows it is asked about at once."""

    def evaluate(self, obs, actions):
        self.seen.add(len(obs))
        return obs[:, 0], obs[:, 1], obs[:, 2]

    def value(self, obs):
        self.seen.add(len(obs))
        return obs[:, 2]


def test_many_rows_are_evaluated_in_parts_that_stay_in_the_cache(monkeypatch):
    policy = Counting()
    with RolloutCollector("CartPole-v1", num_envs=3, seed=0) as collector:
        whole = collector.collect(policy, 20)
        assert max(policy.seen) == 60
        policy.seen.clear()
        monkeypatch.setattr(revaluation, "_ROWS_AT_ONCE", 7)
        parts = revaluation.evaluate_rollout(policy, whole)
        assert max(policy.seen) == 7
        policy.seen.clear()
        monkeypatch.setattr(revaluation, "_ROWS_AT_ONCE", 25)
        revaluation.evaluate_rollout(policy, whole)
        assert policy.seen == {20, len(whole.finals.steps)}  # of one size
    for name in ("log_probs", "values", "next_values"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_sequences_are_evaluated_together(monkeypatch):
    policy = make_policy(VECTOR, TWO, PolicyConfig(hidden_sizes=(4,), memory="lstm"))
    (rollout,) = collect(CountingEnv, [12], policy)
    monkeypatch.setattr(revaluation, "_ROWS_AT_ONCE", 7)
    evaluate, seen = policy.evaluate, []

    def counting(obs, actions, **context):
        seen.append(len(obs))
        return evaluate(obs, actions, **context)

    monkeypatch.setattr(policy, "evaluate", counting)
    revalue(policy, rollout)
    assert seen == [36]


def test_revaluing_by_the_same_policy_changes_nothing():
    with RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        rollout = collector.collect(policy, 64)
    again = revaluation.revalue(policy, rollout)
    assert torch.equal(again.values, rollout.values)
    assert torch.equal(again.next_values, rollout.next_values)


@torch.no_grad()
def test_values_are_of_the_policy_as_it_is_and_log_probabilities_of_the_one_that_collected():
    policy = make_policy(VECTOR, TWO, PolicyConfig(hidden_sizes=(4,)))
    (rollout,) = collect(CountingEnv, [12], policy)
    for parameter in policy.parameters():
        parameter.mul_(3.0)
    again = revalue(policy, rollout)
    assert torch.equal(again.log_probs, rollout.log_probs)
    assert not torch.allclose(again.values, rollout.values)
    values, successors = (
        policy.value(obs.flatten(0, 1)).view(12, 3)
        for obs in (rollout.obs, rollout.obs + torch.tensor([1.0, 0.0]))  # the count goes up by one
    )
    torch.testing.assert_close(again.values, values)
    wanted = torch.where(rollout.terminated, 0.0, successors)
    torch.testing.assert_close(again.next_values, wanted)
    assert rollout.truncated.any()
    assert rollout.terminated.any()


def test_a_rollout_that_does_not_hold_its_successors_is_refused():
    policy = make_policy(VECTOR, TWO, PolicyConfig(hidden_sizes=(4,)))
    (rollout,) = collect(CountingEnv, [3], policy)
    with pytest.raises(ValueError, match="no finals; take it from a RolloutCollector"):
        revalue(policy, dataclasses.replace(rollout, finals=None))


@pytest.mark.parametrize(
    ("name", "answer", "got"),
    [
        ("value", lambda obs: obs[:, :1], r"what value returned is \[\d+, 1\]"),
        (
            "evaluate",
            lambda obs, _: (obs[:, 0], 0, obs[:, :1]),
            r"values of evaluate is \[\d+, 1\]",
        ),
        ("evaluate", lambda obs, _: (obs, 0, obs[:, 0]), r"log_probs of evaluate is \[\d+, \d\]"),
    ],
)
def test_an_answer_of_a_wrong_shape_is_named_with_what_was_wanted(name, answer, got):
    policy = Watching()
    setattr(policy, name, answer)
    with pytest.raises(ValueError, match=rf"{got}, wanted \[B\]"):
        collect(CountingEnv, [3], policy)
