"""Values of a rollout again, of the policy as it is now."""

import dataclasses

import pytest
import torch
from collecting import collect
from environments import TWO, VECTOR, CountingEnv

from ppo import PolicyConfig, make_policy, revalue


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
