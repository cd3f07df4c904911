"""Agents that share a policy are columns of a rollout; who is not there makes no transitions."""

import functools

import numpy as np
import pytest
import torch
from collecting import assert_counts, assert_identical, collect
from environments import CountingEnv
from gymnasium import spaces
from known_policies import CountPolicy
from parallel_environments import CountingAgents

from ppo import PolicyConfig, PPOAgent, PPOConfig, RolloutCollector, evaluate, gae, make_policy
from ppo.errors import EnvError, SpaceError

CountingThree = functools.partial(
    CountingAgents, (2, 3, 7), ("terminated", "truncated", "terminated")
)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_valid_row_is_a_step_of_an_agent_with_the_value_of_its_true_successor(num_workers):
    rollouts = collect(CountingThree, [5, 9, 4], CountPolicy(), num_envs=2, num_workers=num_workers)
    assert rollouts[0].rewards.shape == (5, 6)
    for column in range(6):
        assert_counts(rollouts, column)
    # Agents of one environment end after 2, 3 and 7 steps, and all begin anew together.
    valid = torch.cat([rollout.valid for rollout in rollouts])
    expected = np.arange(18)[:, None] % 7 < np.array([2, 3, 7, 2, 3, 7])
    np.testing.assert_array_equal(valid, expected)


def test_rows_of_whoever_is_gone_count_nowhere():
    (rollout,) = collect(CountingThree, [14], CountPolicy(), num_envs=1)
    assert rollout.num_transitions == 2 * (2 + 3 + 7)
    assert (rollout.rewards[~rollout.valid] == 0).all()
    assert len(rollout.flatten()) == rollout.num_transitions
    lengths = [(e.env_index, e.episode_length) for e in rollout.episodes]
    assert lengths == [(0, 2), (1, 3), (2, 7)] * 2
    arguments = rollout.rewards, rollout.values, rollout.next_values
    advantages, _ = gae(*arguments, rollout.terminated, rollout.truncated)
    # The last step of a life has no successor: its advantage is its own surprise.
    last = rollout.terminated
    surprise = (rollout.rewards - rollout.values)[last]
    torch.testing.assert_close(advantages[last], surprise)


def test_an_agent_may_return_within_an_episode():
    make = functools.partial(CountingAgents, (2, 12), ("terminated",) * 2, returning=3)
    rollouts = collect(make, [6, 18], CountPolicy(), num_envs=1)
    for column in range(2):
        assert_counts(rollouts, column)
    valid = torch.cat([rollout.valid for rollout in rollouts])[:, 0].tolist()
    # There for two steps, away for three while the other goes on; anew with it at step 12.
    assert valid[:12] == [True, True, *[False] * 3, True, True, *[False] * 3, True, True]
    assert valid[12:24] == valid[:12]
    # Each life is an episode with a length and a return of its own.
    lives = [e for rollout in rollouts for e in rollout.episodes if e.env_index == 0]
    assert [life.episode_length for life in lives] == [2] * 6
    rewards = torch.cat([rollout.rewards for rollout in rollouts])[:, 0][valid]
    assert [life.episode_return for life in lives] == rewards.view(6, 2).sum(1).tolist()


def test_agents_are_masked_one_by_one():
    make = functools.partial(CountingAgents, masks=True)  # an illegal action is an error
    (rollout,) = collect(make, [30], PolicyConfig(hidden_sizes=(4,)), num_envs=2)
    counts = rollout.obs[..., 0]
    legal = rollout.action_masks[..., 0]
    assert torch.equal(legal[rollout.valid], counts[rollout.valid] % 2 == 0)
    assert (rollout.actions == 0).any()


@pytest.mark.parametrize("memory", [None, "lstm"])
def test_results_do_not_depend_on_the_number_of_workers(memory):
    config = PolicyConfig(hidden_sizes=(4,), memory=memory, memory_size=4)
    alone = collect(CountingThree, [5, 9], config, num_envs=3)
    for num_workers in (1, 2, 3):
        shared = collect(CountingThree, [5, 9], config, num_envs=3, num_workers=num_workers)
        assert_identical(shared, alone)


def test_agents_learn_and_are_evaluated_life_by_life():
    config = PPOConfig(num_envs=2, num_steps=16, policy=PolicyConfig(hidden_sizes=(8,)))
    agent = PPOAgent(config=config).learn(CountingThree, 200)
    assert agent.steps >= 200
    result = agent.evaluate(CountingThree, episodes=9)
    assert len(result.episode_lengths) == 9
    assert set(result.episode_lengths) <= {2, 3, 7}


def test_an_environment_of_the_callers_is_collected_alone_and_not_closed():
    env = CountingThree()
    with pytest.warns(UserWarning, match="collected alone"):
        collector = RolloutCollector(env, num_envs=4, seed=0)
    with collector:
        assert collector.num_envs == 3
        collector.collect(CountPolicy(), 4)
    assert env.closed == 0
    assert len(evaluate(CountPolicy(), env, episodes=3, num_envs=1).episode_returns) == 3


def test_a_class_is_a_factory_also_if_it_names_its_agents():
    class Pair(CountingAgents):
        possible_agents = ("agent_0", "agent_1")

    (rollout,) = collect(Pair, [3], CountPolicy(), num_envs=2)
    assert rollout.rewards.shape == (3, 4)


@pytest.mark.parametrize("kinds", [(CountingThree, CountingEnv), (CountingEnv, CountingThree)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_environments_of_one_agent_and_of_several_are_not_mixed(kinds, num_workers):
    with pytest.raises((TypeError, SpaceError), match=r"one kind at a time|has other spaces"):
        RolloutCollector(list(kinds), num_workers=num_workers)


def test_agents_with_other_spaces_are_refused_by_name():
    class Uneven(CountingAgents):
        def action_space(self, agent):
            return spaces.Discrete(2 + (agent == "agent_1"))

    with pytest.raises(SpaceError, match="agent 'agent_1' has other spaces"):
        RolloutCollector(Uneven, num_envs=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_names_environment_and_method(num_workers):
    class Broken(CountingAgents):
        def step(self, actions):
            raise RuntimeError("the physics exploded")

    with (
        RolloutCollector(Broken, num_envs=2, num_workers=num_workers) as collector,
        pytest.raises(EnvError, match=r"environment \d raised RuntimeError in step: the physics"),
    ):
        collector.collect(CountPolicy(), 2)


def test_an_agent_without_its_mask_is_an_error_that_names_it():
    class Silent(CountingAgents):
        def told(self, agents):
            obs, infos = super().told(agents)
            if max(self.counts.values()) > 1:
                infos["agent_1"] = {}
            return obs, infos

    make = functools.partial(Silent, masks=True)
    with RolloutCollector(make, num_envs=1) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        with pytest.raises(EnvError, match="agent 'agent_1' of environment 0"):
            collector.collect(policy, 4)
