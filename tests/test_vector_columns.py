import gymnasium
import numpy as np
import pytest
import torch
from collecting import assert_counts, collect, ended
from environments import SYMMETRIC, TWO, CountingEnv, FaultyEnv, WalkEnv, crash
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from known_policies import VALUE_OF_ZERO, CountPolicy, SnapshotCountPolicy

from ppo.advantages import gae
from ppo.collector import RolloutCollector
from ppo.errors import EnvCreationError, EnvError
from ppo.policies import make_policy

MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
POLICIES = pytest.mark.parametrize("policy", [CountPolicy(), SnapshotCountPolicy()], ids=type)


def by_hand(make, actions, seed):
    """Step one environment alone: resets itself, records (obs, action, reward, flags, final)."""
    env = make()
    obs, _ = env.reset(seed=seed)
    rows = []
    for action in actions:
        new, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs.tolist(), float(reward), terminated, truncated, new.tolist()))
        if terminated or truncated:
            new, _ = env.reset()
        obs = new
    env.close()
    return rows


def rows_of(rollouts, column):
    """Valid rows of one column in order, with the value of the successor."""
    rows = []
    for rollout in rollouts:
        for t in range(len(rollout.rewards)):
            if rollout.valid[t, column]:
                rows.append(
                    (
                        rollout.obs[t, column].tolist(),
                        rollout.rewards[t, column].item(),
                        rollout.terminated[t, column].item(),
                        rollout.truncated[t, column].item(),
                        rollout.actions[t, column].numpy(),
                        rollout.next_values[t, column].item(),
                    )
                )
    return rows


class SeedRecorder:
    """Remembers the seed that a vector environment was reset with."""

    def __init__(self, env):
        self.env, self.seed, reset = env, None, env.reset

        def recorded(*, seed=None, options=None):
            self.seed = seed if seed is not None else self.seed
            return reset(seed=seed, options=options)

        env.reset = recorded


@pytest.mark.parametrize(
    ("vector", "mode"),
    [
        *((SyncVectorEnv, mode) for mode in AutoresetMode),
        (AsyncVectorEnv, AutoresetMode.NEXT_STEP),
        (AsyncVectorEnv, AutoresetMode.SAME_STEP),
    ],
    ids=lambda value: getattr(value, "name", value.__class__.__name__),
)
def test_a_vector_environment_gives_the_transitions_of_its_environments(vector, mode):
    make = lambda: gymnasium.wrappers.TimeLimit(WalkEnv(9, "terminated"), 5)  # noqa: E731
    lengths = (None, "terminated"), (3, "truncated"), (4, "both")
    factories = [make, *(lambda args=args: WalkEnv(*args) for args in lengths)]
    env = vector(factories, autoreset_mode=mode)
    recorder = SeedRecorder(env)
    policy = make_policy(env.single_observation_space, env.single_action_space)
    with RolloutCollector(env, seed=0) as collector:
        assert collector.num_envs == 4
        rollouts = [collector.collect(policy, num_steps) for num_steps in (11, 1, 7, 4)]
    for column, factory in enumerate(factories):
        rows = rows_of(rollouts, column)
        actions = [np.clip(row[4], -1.0, 1.0) for row in rows]
        expected = by_hand(factory, actions, recorder.seed + column)
        for row, (obs, reward, terminated, truncated, new) in zip(rows, expected, strict=True):
            assert row[:4] == (obs, pytest.approx(reward), terminated, truncated)
            value = 0.0 if terminated else policy.value(torch.tensor([new])).item()
            assert row[5] == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert sum(rollout.num_transitions for rollout in rollouts) == sum(
        int(rollout.valid.sum()) for rollout in rollouts
    )
    env.reset(seed=0)  # still alive
    env.close()


def test_only_next_step_has_rows_that_are_no_transition():
    counts = {}
    for mode in AutoresetMode:
        env = SyncVectorEnv([lambda: CountingEnv(3, "truncated")] * 2, autoreset_mode=mode)
        (rollout,) = collect(env, (12,), CountPolicy())
        counts[mode] = rollout.num_transitions
        assert len(rollout.flatten()) == rollout.num_transitions
        env.close()
    assert counts == {
        AutoresetMode.NEXT_STEP: 18,
        AutoresetMode.SAME_STEP: 24,
        AutoresetMode.DISABLED: 24,
    }


def test_reset_rows_count_nowhere():
    env = SyncVectorEnv([lambda: CountingEnv(3, "truncated")] * 2)
    (rollout,) = collect(env, (12,), CountPolicy())
    expected = torch.tensor([True, True, True, False] * 3)
    assert torch.equal(rollout.valid, expected[:, None].expand(12, 2))
    reset_rows = ~rollout.valid
    for name in ("rewards", "terminated", "truncated"):
        assert not getattr(rollout, name)[reset_rows].any()
    assert all(episode.episode_length == 3 for episode in rollout.episodes)
    assert len(rollout.episodes) == 6
    assert rollout.flatten().obs[:, 0].max() == 2.0
    # The true successor of a truncated step is the observation of the reset row.
    assert rollout.next_values[2].tolist() == [VALUE_OF_ZERO + 3.0] * 2
    env.close()


def test_what_is_paid_or_said_on_a_reset_row_is_counted_nowhere():
    env = SyncVectorEnv([lambda: CountingEnv(3, "terminated")])
    step = env.step

    def paying(actions):
        resetting = env._autoreset_envs.copy()
        obs, rewards, terminated, *rest = step(actions)
        return obs, rewards + 50.0 * resetting, terminated | resetting, *rest

    env.step = paying
    (rollout,) = collect(env, (12,), CountPolicy())
    assert rollout.rewards[~rollout.valid].tolist() == [0.0] * 3
    assert not rollout.terminated[~rollout.valid].any()
    paid = rollout.rewards[:, 0].reshape(3, 4).sum(1).tolist()
    assert [episode.episode_return for episode in rollout.episodes] == paid
    assert [episode.episode_length for episode in rollout.episodes] == [3, 3, 3]
    env.close()


def test_a_pending_reset_is_remembered_by_the_next_rollout():
    env = SyncVectorEnv([lambda: CountingEnv(3, "terminated"), lambda: CountingEnv(4, "truncated")])
    first, second = collect(env, (3, 3), CountPolicy())
    assert first.valid.all()
    assert first.terminated[2].tolist() == [True, False]
    assert second.valid[:, 0].tolist() == [False, True, True]
    assert second.valid[:, 1].tolist() == [True, False, True]
    assert [episode.env_index for episode in (*first.episodes, *second.episodes)] == [0, 1]
    for column in range(2):
        assert_counts([first, second], column)
    env.close()


@pytest.mark.parametrize("action_space", [TWO, SYMMETRIC], ids=["discrete", "box"])
def test_a_rollout_of_reset_rows_alone_is_empty(action_space):
    make = CountingEnv if action_space == TWO else WalkEnv
    env = SyncVectorEnv([lambda: make(2, "truncated")])
    rollouts = collect(env, (1, 1, 1, 1, 1, 1), num_envs=1)
    assert [rollout.num_transitions for rollout in rollouts] == [1, 1, 0, 1, 1, 0]
    assert len(rollouts[2].flatten()) == 0
    env.close()


def test_gae_ignores_reset_rows():
    """Advantages of the valid rows are those of the same episodes without reset rows."""
    make = lambda: CountingEnv(3, "truncated")  # noqa: E731
    env = SyncVectorEnv([make])
    (with_resets,) = collect(env, (12,), CountPolicy(), num_envs=1)
    (without,) = collect(make, (9,), CountPolicy(), num_envs=1)
    advantages = []
    for rollout in (with_resets, without):
        result = gae(
            rollout.rewards - rollout.obs[..., 1],
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.truncated,
        )
        advantages.append(result.advantages[rollout.valid])
    valid_rewards = (with_resets.rewards - with_resets.obs[..., 1])[with_resets.valid]
    assert torch.equal(valid_rewards, (without.rewards - without.obs[..., 1]).flatten())
    torch.testing.assert_close(*advantages)
    env.close()


def test_a_native_vector_environment_is_collected():
    env = gymnasium.make_vec("CartPole-v1", num_envs=3)
    recorder = SeedRecorder(env)
    with RolloutCollector(env, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        rollouts = [collector.collect(policy, num_steps) for num_steps in (60, 40)]
    assert recorder.seed is not None
    assert all(len(rollout.episodes) > 0 for rollout in rollouts)
    for column in range(3):
        length = 0
        lengths = []
        for rollout in rollouts:
            for t in range(len(rollout.rewards)):
                if not rollout.valid[t, column]:
                    assert length == 0
                    continue
                length += 1
                assert rollout.rewards[t, column] == 1.0
                if ended(rollout)[t, column]:
                    lengths.append(length)
                    length = 0
        reported = [
            episode
            for rollout in rollouts
            for episode in rollout.episodes
            if episode.env_index == column
        ]
        assert [episode.episode_length for episode in reported] == lengths
        assert [episode.episode_return for episode in reported] == lengths
    obs = rollouts[0].obs
    reset_rows = ~rollouts[0].valid
    # A reset row shows the last observation of the fallen pole, beyond the limits.
    assert (obs[reset_rows][:, [0, 2]].abs() > torch.tensor([2.4, 0.2094])).any(-1).all()
    assert (obs[rollouts[0].valid][:, 2].abs() <= 0.2095).all()
    env.close()


@MODES
@pytest.mark.parametrize("copy", [False, True])
def test_a_vector_environment_that_reuses_its_arrays_is_read_in_time(mode, copy):
    env = SyncVectorEnv(
        [lambda: CountingEnv(3, "truncated"), lambda: CountingEnv(4, "truncated")],
        copy=copy,
        autoreset_mode=mode,
    )
    rollouts = collect(env, (7, 7, 7), CountPolicy())
    for column in range(2):
        assert_counts(rollouts, column)
    env.close()


def test_a_silent_vector_environment_is_asked_for_its_mode():
    env = SyncVectorEnv([lambda: CountingEnv(3, "truncated")], autoreset_mode="SameStep")
    env.metadata = {}
    with pytest.raises(EnvCreationError, match="autoreset_mode"):
        RolloutCollector(env)
    rollouts = collect(env, (8,), CountPolicy(), autoreset_mode="same_step")
    assert_counts(rollouts, 0)
    env.close()


def test_same_step_without_final_observations_is_an_error():
    env = SyncVectorEnv([lambda: CountingEnv(3, "truncated")], autoreset_mode="SameStep")
    step = env.step
    env.step = lambda actions: (*step(actions)[:-1], {})
    with pytest.raises(EnvError, match="final_obs"):
        collect(env, (8,), CountPolicy())
    env.close()


def test_an_error_of_a_vector_environment_carries_its_traceback():
    env = SyncVectorEnv([lambda: FaultyEnv(crash, step=3)] * 2)
    with pytest.raises(EnvError, match="RuntimeError in step: the physics exploded") as caught:
        collect(env, (8,), CountPolicy())
    assert "in crash" in str(caught.value)
    env.close()
