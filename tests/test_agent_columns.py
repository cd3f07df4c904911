"""Agents that share a policy are columns of a rollout; who is not there makes no transitions."""

import functools
import re
import sys
import time

import numpy as np
import pytest
import torch
from collecting import assert_counts, assert_identical, collect
from environments import CountingEnv, crash, kill
from gymnasium import spaces
from known_policies import VALUE_OF_ZERO, CountPolicy, SnapshotCountPolicy
from parallel_environments import CountingAgents, FaultyAgents

from ppo import PolicyConfig, PPOAgent, PPOConfig, RolloutCollector, evaluate, gae, make_policy
from ppo.errors import EnvError, SpaceError, WorkerError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
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
        with pytest.raises(EnvError, match=r"environment 0 .* agent 'agent_1': KeyError"):
            collector.collect(policy, 4)


# --- environments that break


def team(fault, **moment):
    """Two agents each; the second of three environments is the one that breaks."""
    return [CountingAgents, lambda: FaultyAgents(fault, **moment), CountingAgents]


@pytest.mark.parametrize(
    ("moment", "where"),
    [
        (
            {"step": 5},
            r"in step: the .* \(episode seed \d+, episode step 4, rollout step 4, "
            r"action {'agent_1': (np.int64\()?[01]\)?}\)",
        ),
        ({"reset": 1}, r"in reset: the .* \(episode seed \d+, episode step 0\)"),
        ({"reset": 2}, r"in reset: the .* \(episode seed \d+, episode step 0, rollout step 4\)"),
    ],
    ids=str,
)
def test_an_error_names_seed_step_and_what_was_done_wherever_it_happens(moment, where):
    messages = []
    for num_workers in (0, 2):
        with (
            RolloutCollector(team(crash, **moment), num_workers=num_workers, seed=0) as collector,
            pytest.raises(EnvError, match=f"environment 1 raised RuntimeError {where}") as caught,
        ):
            collector.collect(SnapshotCountPolicy(), 9)
        message, _, traceback = str(caught.value).partition("\n")
        assert "in crash" in traceback
        messages.append(message)
    assert messages[0] == messages[1]


@LINUX
@pytest.mark.parametrize(
    ("moment", "where"),
    [
        (
            {"step": 5},
            r"in step \(episode seed (\d+), episode step 4, rollout step 4, "
            r"action array\(\[[01], [01]\]\)\)",
        ),
        ({"reset": 1}, r"in reset \(episode seed (\d+)\)"),
    ],
    ids=str,
)
def test_a_worker_that_dies_is_named_with_its_environment_and_not_its_column(
    moment, where, nothing_left
):
    seeds = []
    for fault, error in ((kill, WorkerError), (crash, EnvError)):
        with (
            RolloutCollector(team(fault, **moment), num_workers=2, seed=0) as collector,
            pytest.raises(error) as caught,
        ):
            collector.collect(SnapshotCountPolicy(), 9)
        text = str(caught.value)
        if fault is kill:
            assert re.search(rf"worker 0 \(environments 0 to 1\) .* environment 1 {where}", text)
        seeds.append(re.search(r"episode seed (\d+)", text)[1])
    assert seeds[0] == seeds[1]


@LINUX
def test_many_slow_environments_in_one_worker_are_no_hang(nothing_left):
    def make():
        return FaultyAgents(lambda env: time.sleep(0.3), step=1)

    (rollout,) = collect(make, (1,), CountPolicy(), num_envs=6, num_workers=1, step_timeout=1.0)
    assert rollout.num_transitions == 12


@pytest.mark.filterwarnings("ignore:restarted:RuntimeWarning")
@pytest.mark.parametrize(
    ("fault", "num_workers"), [(crash, 0), (crash, 3), pytest.param(kill, 3, marks=LINUX)]
)
def test_an_environment_that_breaks_is_replaced_and_no_row_is_other_than_it_should_be(
    fault, num_workers
):
    """It breaks in the fourth step, when only the second agent is there."""
    with RolloutCollector(
        team(fault, step=4), num_workers=num_workers, seed=0, on_fault="restart"
    ) as collector:
        rollout = collector.collect(SnapshotCountPolicy(), 9)
        assert collector.restarts == 2
    first, second = 2, 3
    whole = [True, True, True, False, True, True, True, False, True]
    for column in (first, second):
        assert rollout.valid[:, column].tolist() == whole
        assert rollout.obs[whole, column, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert not rollout.rewards[~rollout.valid[:, column], column].any()
    at = [t in (2, 6) for t in range(9)]
    assert rollout.terminated[:, first].tolist() == rollout.truncated[:, second].tolist() == at
    assert not (rollout.truncated[:, first] | rollout.terminated[:, second]).any()
    assert rollout.next_values[at, second].tolist() == [VALUE_OF_ZERO + 3.0] * 2
    lives = [(e.env_index, e.episode_length) for e in rollout.episodes]
    known = [] if fault is kill else [(first, 3)] * 2  # a lost worker takes its reports with it
    assert [life for life in lives if life[0] in (first, second)] == known
    for column in (0, 1, 4, 5):
        assert_counts([rollout], column)


@pytest.mark.filterwarnings("ignore:restarted:RuntimeWarning")
def test_replaced_environments_are_the_same_whatever_the_number_of_workers():
    runs = [
        collect(
            team(crash, step=4), (3, 9, 2), CountPolicy(), num_workers=number, on_fault="restart"
        )
        for number in (0, 1, 3)
    ]
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])


class Forgetful(CountingAgents):
    """In its third step the first agent ends, and the second gets no reward."""

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        if self.counts["agent_0"] == 3:
            del rewards["agent_1"]
        return obs, rewards, *rest


@pytest.mark.filterwarnings("ignore:restarted:RuntimeWarning")
def test_an_answer_that_lacks_an_agent_is_an_error_and_leaves_nothing_of_its_step():
    make = functools.partial(Forgetful, endings=("truncated", "truncated"))
    with pytest.raises(EnvError, match=r"environment 0 raised KeyError in step: 'agent_1'"):
        collect(make, (4,), CountPolicy(), num_envs=1)
    (rollout,) = collect(make, (4,), CountPolicy(), num_envs=1, on_fault="restart")
    assert rollout.valid.tolist() == [[True] * 2] * 2 + [[False] * 2] + [[True] * 2]
    assert rollout.episodes == ()
    assert rollout.finals.steps.tolist() == [1, 1, 3, 3]


def test_a_spent_budget_is_an_error_that_names_the_last_fault():
    with RolloutCollector(
        team(crash, step=2), seed=0, on_fault="restart", max_restarts=3
    ) as collector:
        with pytest.warns(RuntimeWarning, match="restarted: environment 1 raised RuntimeError"):
            collector.collect(CountPolicy(), 6)
        with pytest.raises(EnvError, match=r"max_restarts = 3 .* the last fault: .* exploded"):
            collector.collect(CountPolicy(), 2)


def test_an_environment_made_anew_with_other_agents_is_refused():
    made = []

    def make():
        count = 2 + len(made)
        made.append(FaultyAgents(crash, (3,) * count, ("terminated",) * count, step=2))
        return made[-1]

    with pytest.raises(SpaceError, match="differ in their agents"):
        collect(make, (5,), CountPolicy(), num_envs=1, on_fault="restart")
    assert [env.closed for env in made] == [1, 1]


def test_nobody_to_act_is_an_error_that_says_so():
    class Empty(CountingAgents):
        def reset(self, seed=None, options=None):
            super().reset(seed)
            self.agents = []
            return {}, {}

    with pytest.raises(EnvError, match=r"environment 0 .* no agents after reset"):
        collect(Empty, (1,), CountPolicy(), num_envs=1)
    with pytest.raises(SpaceError, match="possible_agents is empty"):
        RolloutCollector(functools.partial(CountingAgents, (), ()), num_envs=1)
