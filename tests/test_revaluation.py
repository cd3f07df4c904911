"""What a policy thinks of a rollout, and how many threads torch takes for it."""

import pytest
import torch
from torch import nn

from ppo import RolloutCollector, make_policy, revaluation
from ppo._threads import threads


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


def test_revaluing_by_the_same_policy_changes_nothing():
    with RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        rollout = collector.collect(policy, 64)
    again = revaluation.revalue(policy, rollout)
    assert torch.equal(again.values, rollout.values)
    assert torch.equal(again.next_values, rollout.next_values)
