"""`on_fault="restart"`: what fails is replaced, and no row is other than it should be."""

import os
import signal
import sys

import pytest
import torch
from collecting import assert_identical, collect
from environments import CountingEnv, FaultyEnv, Recorder, crash, hang, kill, leave
from gymnasium.vector import SyncVectorEnv
from known_policies import (
    VALUE_OF_ZERO,
    CountPolicy,
    LargeCountPolicy,
    MemoryCountPolicy,
    SnapshotCountPolicy,
    SnapshotMemoryCountPolicy,
)
from processes import children, give_up, ringing

from ppo import PPOAgent, PPOConfig, RolloutCollector
from ppo.errors import ClosedError, ConfigError, EnvError, PPOError, SpaceError, WorkerError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore:restarted:RuntimeWarning"),
]

ACTING = pytest.mark.parametrize(
    "policy",
    [SnapshotCountPolicy(), CountPolicy(), SnapshotMemoryCountPolicy(), MemoryCountPolicy()],
    ids=["workers act", "parent acts", "workers remember", "parent remembers"],
)


def team(fault, **moment):
    return [CountingEnv, CountingEnv, lambda: FaultyEnv(fault, **moment), CountingEnv]


def assert_exact(rollouts, column):
    """Every valid row is a real step; around the invalid ones nothing leaks."""
    expected = None
    for rollout in rollouts:
        for t in range(len(rollout.rewards)):
            count, tag = rollout.obs[t, column].tolist()
            assert expected in (None, (count, tag)) or (expected == "begin" and count == 0)
            if not rollout.valid[t, column]:
                assert rollout.rewards[t, column] == 0
                if t > 0 and rollout.valid[t - 1, column] and count > 0:
                    assert rollout.truncated[t - 1, column]
                expected = "begin"
                continue
            assert rollout.rewards[t, column] == count + 1 + tag
            assert rollout.values[t, column] == VALUE_OF_ZERO + count
            terminated = bool(rollout.terminated[t, column])
            successor = 0.0 if terminated else VALUE_OF_ZERO + count + 1
            assert rollout.next_values[t, column] == successor
            over = terminated or bool(rollout.truncated[t, column])
            broken_next = t + 1 < len(rollout.rewards) and not rollout.valid[t + 1, column]
            expected = (count + 1, tag) if not over or broken_next else "begin"
            if over and broken_next and rollout.obs[t + 1, column, 0] == 0:
                expected = "begin"


@ACTING
@pytest.mark.parametrize("length", [1000, 4, 1])
def test_a_raising_environment_is_made_anew_whatever_the_number_of_workers(policy, length):
    horizons = (3, 11, 4)
    runs = []
    for num_workers in (0, 1, 3):
        rollouts = collect(
            team(crash, step=3, length=length),
            horizons,
            policy,
            num_workers=num_workers,
            on_fault="restart",
        )
        for column in range(4):
            assert_exact(rollouts, column)
        runs.append(rollouts)
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])
    invalid = torch.cat([~rollout.valid for rollout in runs[0]])
    assert invalid[:, 2].nonzero().flatten().tolist() == [2, 5, 8, 11, 14, 17]
    assert not invalid[:, [0, 1, 3]].any()


def test_the_row_before_the_broken_one_is_bootstrapped_with_its_successors_value():
    (rollout,) = collect(team(crash, step=3), (6,), CountPolicy(), num_envs=4, on_fault="restart")
    assert rollout.truncated[:, 2].tolist() == [False, True, False, False, True, False]
    assert not rollout.terminated[:, 2].any()
    assert rollout.obs[2, 2, 0] == 2.0
    assert rollout.next_values[1, 2] == VALUE_OF_ZERO + 2.0
    assert [episode for episode in rollout.episodes if episode.env_index == 2] == []


def test_a_broken_first_row_has_its_row_before_in_the_rollout_before():
    """Which ended with the very observation that the lost action was taken on."""
    first, second = collect(
        team(crash, step=4), (3, 3), CountPolicy(), num_envs=4, on_fault="restart"
    )
    assert not first.truncated[:, 2].any()
    assert first.next_values[2, 2] == VALUE_OF_ZERO + 3.0
    assert second.valid[:, 2].tolist() == [False, True, True]
    assert second.obs[1, 2, 0] == 0.0


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("reset", [1, 2])
def test_an_environment_that_raises_in_reset_costs_no_row(num_workers, reset, tmp_path):
    """Only the first of its kind fails; what is made in its place does not."""
    mark = tmp_path / "failed"

    def once(env):
        if not mark.exists():
            mark.touch()
            crash(env)

    factories = team(once, reset=reset, length=3)
    with RolloutCollector(
        factories, num_workers=num_workers, seed=0, on_fault="restart"
    ) as collector:
        rollout = collector.collect(CountPolicy(), 8)
        assert collector.restarts == 1
    assert rollout.valid.all()
    for column in range(4):
        assert_exact([rollout], column)


def test_what_failed_is_closed_and_what_replaced_it_too():
    made = []

    def make():
        made.append(Recorder(FaultyEnv(crash, step=3)))
        return made[-1]

    collect(make, (7,), CountPolicy(), num_envs=1, on_fault="restart")
    assert [env.closed for env in made] == [1, 1, 1]


# --- workers


@ACTING
@pytest.mark.parametrize("fault", [kill, leave, hang])
@pytest.mark.parametrize("moment", [{"step": 5}, {"reset": 3, "length": 4}], ids=str)
def test_a_lost_worker_is_replaced_and_its_columns_stay_exact(policy, fault, moment, nothing_left):
    timeout = 0.7 if fault is hang else None
    with RolloutCollector(
        team(fault, **moment), num_workers=2, seed=0, on_fault="restart", step_timeout=timeout
    ) as collector:
        rollouts = [collector.collect(policy, num_steps) for num_steps in (4, 9, 2)]
        assert collector.restarts >= 1
    for column in range(4):
        assert_exact(rollouts, column)
    valid = torch.cat([rollout.valid for rollout in rollouts])
    assert valid[:, :2].all()
    assert not valid[:, 2:].all()


def test_an_environment_that_raises_and_then_hangs_in_close_is_replaced_with_its_worker(
    nothing_left,
):
    class Stuck(FaultyEnv):
        def close(self):
            hang(self)

    options = {"num_envs": 1, "num_workers": 1, "on_fault": "restart", "step_timeout": 0.7}
    with RolloutCollector(lambda: Stuck(crash, step=3), seed=0, **options) as collector:
        with pytest.warns(RuntimeWarning, match=r"(?s)restarted: worker 0 .* in hang\n"):
            rollout = collector.collect(SnapshotCountPolicy(), 5)
        assert collector.restarts == 1
    assert rollout.valid[:, 0].tolist() == [True, True, False, True, True]
    assert_exact([rollout], 0)


@ACTING
def test_rows_whose_successor_only_the_lost_worker_knew_are_given_up(policy):
    """Truncated steps of the sibling in the lost worker: their last observation is gone."""
    factories = [
        CountingEnv,
        CountingEnv,
        lambda: FaultyEnv(kill, step=6),
        lambda: CountingEnv(2, "truncated"),
    ]
    with RolloutCollector(factories, num_workers=2, seed=0, on_fault="restart") as collector:
        rollout = collector.collect(policy, 8)
    for column in range(4):
        assert_exact([rollout], column)
    assert rollout.valid[:, 3].tolist() == [True, False, True, False, True, False, True, True]
    assert not rollout.valid[5, 2]
    assert rollout.valid[:, 2].sum() == 7


@ACTING
def test_a_worker_killed_between_two_rollouts_is_replaced(policy, nothing_left):
    before = children()
    with RolloutCollector(
        CountingEnv, num_envs=4, num_workers=2, seed=0, on_fault="restart"
    ) as collector:
        rollouts = [collector.collect(policy, 5)]
        for num_steps in (5, 9):  # the second time the arrays grow
            os.kill(max(children() - before), signal.SIGKILL)
            with pytest.warns(RuntimeWarning, match=r"restarted: worker \d .*SIGKILL"):
                rollouts.append(collector.collect(policy, num_steps))
        assert collector.restarts == 2
    for column in range(4):
        assert_exact(rollouts, column)


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize(
    "policy", [LargeCountPolicy(), CountPolicy()], ids=["workers act", "parent acts"]
)
def test_a_worker_stopped_between_two_rollouts_is_replaced(policy, stopped, nothing_left):
    before = children()
    with RolloutCollector(
        CountingEnv, num_envs=4, num_workers=2, seed=0, on_fault="restart", step_timeout=0.7
    ) as collector:
        rollouts = [collector.collect(policy, 5)]
        os.kill(sorted(children() - before)[stopped], signal.SIGSTOP)
        warning = rf"restarted: worker {stopped} .*no progress"
        with ringing(give_up, 30.0), pytest.warns(RuntimeWarning, match=warning):
            rollouts.append(collector.collect(policy, 5))
        rollouts.append(collector.collect(policy, 5))
        assert collector.restarts == 1
    for column in range(4):
        assert_exact(rollouts, column)
    valid = torch.cat([rollout.valid for rollout in rollouts])
    assert valid[:, 2 - 2 * stopped : 4 - 2 * stopped].all()
    assert not valid[5, 2 * stopped : 2 * stopped + 2].any()


def test_a_replacement_plays_episodes_that_were_not_played_yet():
    (rollout,) = collect(
        lambda: FaultyEnv(kill, step=4),
        (12,),
        SnapshotCountPolicy(),
        num_envs=1,
        num_workers=1,
        on_fault="restart",
    )
    assert len(set(rollout.obs[:, 0, 1].tolist())) == 3


# --- the budget


@pytest.mark.parametrize(
    ("fault", "num_workers"), [(crash, 0), (crash, 1), (crash, 2), (kill, 1), (kill, 2)]
)
def test_a_spent_budget_is_an_error_that_names_the_last_fault(fault, num_workers, nothing_left):
    last = "the physics exploded" if fault is crash else "SIGKILL"
    with RolloutCollector(
        team(fault, step=2),
        num_workers=num_workers,
        seed=0,
        on_fault="restart",
        max_restarts=3,
    ) as collector:
        with pytest.raises(PPOError, match=rf"max_restarts = 3 .* the last fault: .*{last}"):
            collector.collect(CountPolicy(), 20)
        with pytest.raises(ClosedError, match="max_restarts"):
            collector.collect(CountPolicy(), 1)


def test_the_budget_is_one_for_all_workers():
    with RolloutCollector(
        lambda: FaultyEnv(crash, step=4),
        num_envs=2,
        num_workers=2,
        seed=0,
        on_fault="restart",
        max_restarts=3,
    ) as collector:
        collector.collect(CountPolicy(), 5)
        assert collector.restarts == 2
        with pytest.raises(WorkerError, match="max_restarts = 3"):
            collector.collect(CountPolicy(), 5)


def test_a_factory_that_fails_ever_after_spends_the_budget():
    calls = []

    def make():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no more licences")
        return FaultyEnv(crash, step=2)

    with pytest.raises(EnvError, match=r"max_restarts = 10 .*no more licences"):
        collect(make, (5,), CountPolicy(), num_envs=1, on_fault="restart")
    assert len(calls) == 1 + 10


def test_an_environment_made_anew_with_other_spaces_is_refused():
    made = []

    def make():
        made.append(FaultyEnv(crash, step=2))
        if len(made) == 2:
            made[-1].action_space = CountingEnv.observation_space
        return made[-1]

    with pytest.raises(SpaceError, match="environment 0 was made anew with other spaces"):
        collect(make, (5,), CountPolicy(), num_envs=1, on_fault="restart")


def test_each_restart_is_warned_of():
    with pytest.warns(RuntimeWarning, match="restarted: environment 2 raised RuntimeError") as seen:
        collect(team(crash, step=3), (4,), CountPolicy(), num_envs=4, on_fault="restart")
    assert len(seen) == 1


def test_a_vector_environment_cannot_be_restarted():
    env = SyncVectorEnv([CountingEnv])
    with pytest.raises(ValueError, match="vector environment"):
        RolloutCollector(env, on_fault="restart")
    env.close()


@pytest.mark.parametrize(
    ("setting", "value"), [("on_fault", "ignore"), ("max_restarts", -1), ("step_timeout", 0.0)]
)
def test_a_wrong_setting_is_named(setting, value):
    with pytest.raises(ValueError, match=setting):
        RolloutCollector(CountingEnv, **{setting: value})
    with pytest.raises(ConfigError, match=setting):
        PPOConfig(**{setting: value})


# --- the agent


def test_an_agent_trains_through_faults_and_counts_them():
    reports = []
    agent = PPOAgent(
        config=PPOConfig(num_envs=4, num_steps=16, on_fault="restart", max_restarts=30),
        logger=reports.append,
    )
    agent.learn(team(crash, step=10), steps=200)
    restarts = [report.metrics["restarts"] for report in reports]
    assert restarts == sorted(restarts)
    assert restarts[-1] == 16 * len(reports) // 10
    assert agent.steps == 64 * len(reports) - restarts[-1]


class Paying(FaultyEnv):
    """Pays 1 for each step."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0, *rest


@pytest.mark.parametrize("num_steps", [3, 4, 6])
def test_what_a_lost_episode_was_paid_is_no_part_of_the_next_ones_return(num_steps):
    made = []

    def make():
        made.append(Paying(crash, step=0 if made else 4))
        return made[-1]

    config = PPOConfig(num_envs=1, num_steps=num_steps, on_fault="restart", gamma=1.0)
    agent = PPOAgent(config=config).learn(make, steps=11)
    assert agent._reward_scaler.state_dict()["returns"].item() == agent.steps - 3


def test_an_agents_step_timeout_reaches_the_workers():
    agent = PPOAgent(config=PPOConfig(num_envs=2, num_workers=1, step_timeout=0.5))
    with pytest.raises(WorkerError, match=r"step_timeout = 0\.5"):
        agent.learn(lambda: FaultyEnv(hang, step=3), steps=10)
