import random
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from environments import (
    SYMMETRIC,
    TWO,
    VECTOR,
    AliasingEnv,
    CountingEnv,
    CountPolicy,
    EndlessProbe,
    FaultyEnv,
    ImageEnv,
    NoisyCountPolicy,
    Recorder,
    SnapshotCountPolicy,
    WalkEnv,
    WithSpaces,
    crash,
    infinite_reward,
    nan_final_obs,
    nan_obs,
    nan_reset_obs,
    nan_terminal_obs,
    narrow_obs,
)
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ppo.advantages import gae
from ppo.collector import RolloutCollector
from ppo.errors import ClosedError, EnvCreationError, EnvError, NonFiniteError, SpaceError
from ppo.policies import PolicyConfig, make_policy
from ppo.rollout import Episode

MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
POLICIES = pytest.mark.parametrize("policy", [CountPolicy(), SnapshotCountPolicy()], ids=type)


def collect(env, num_steps, policy=None, *, num_envs=3, seed=0, calls=1, **options):
    """Collect several times; returns the rollouts."""
    with RolloutCollector(env, num_envs=num_envs, seed=seed, **options) as collector:
        if policy is None:
            policy = make_policy(collector.observation_space, collector.action_space)
        return [collector.collect(policy, num_steps) for _ in range(calls)]


def ended(rollout):
    return rollout.terminated | rollout.truncated


def replay(rollouts, column):
    """The transitions of one column by hand: follow the counts of a counting environment.

    Yields per valid row: (count before, tag, reward, terminated, truncated, next value).
    """
    for rollout in rollouts:
        for t in range(len(rollout.rewards)):
            if rollout.valid[t, column]:
                count, tag = rollout.obs[t, column].tolist()
                yield (
                    count,
                    tag,
                    rollout.rewards[t, column].item(),
                    rollout.terminated[t, column].item(),
                    rollout.truncated[t, column].item(),
                    rollout.next_values[t, column].item(),
                )


def assert_counts(rollouts, column):
    """Every valid row is a real transition: starts at 0, counts up, ends, starts anew."""
    expected, tag = 0, None
    for count, row_tag, reward, terminated, truncated, next_value in replay(rollouts, column):
        assert count == expected
        assert tag in (None, row_tag)
        assert reward == count + 1 + row_tag
        assert next_value == (0.0 if terminated else count + 1)
        over = terminated or truncated
        expected, tag = (0, None) if over else (count + 1, row_tag)


# --- every row is a real transition


@settings(max_examples=40)
@given(
    st.sampled_from([CountingEnv, AliasingEnv]),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from([None, "terminated", "truncated", "both"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([CountPolicy(), NoisyCountPolicy(), SnapshotCountPolicy()]),
)
def test_every_row_is_a_transition_with_the_value_of_its_true_successor(
    env, length, ending, horizons, num_envs, policy
):
    with RolloutCollector(lambda: env(length, ending), num_envs=num_envs, seed=1) as collector:
        rollouts = [collector.collect(policy, num_steps) for num_steps in horizons]
    for rollout, num_steps in zip(rollouts, horizons, strict=True):
        assert rollout.rewards.shape == (num_steps, num_envs)
        assert rollout.valid.all()
        assert torch.equal(rollout.values, rollout.obs[..., 0])
    for column in range(num_envs):
        assert_counts(rollouts, column)


def test_a_truncated_step_bootstraps_from_its_final_observation():
    (rollout,) = collect(lambda: CountingEnv(4, "truncated"), 10, CountPolicy())
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0])
    assert torch.equal(rollout.next_values, expected[:, None].expand(10, 3))
    assert rollout.truncated[:, 0].nonzero().flatten().tolist() == [3, 7]
    assert not rollout.terminated.any()


@pytest.mark.parametrize("ending", ["terminated", "both"])
def test_a_terminated_step_has_no_future_even_if_it_is_truncated_too(ending):
    (rollout,) = collect(lambda: CountingEnv(4, ending), 10, CountPolicy())
    expected = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0])
    assert torch.equal(rollout.next_values, expected[:, None].expand(10, 3))
    assert rollout.terminated[:, 0].nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(rollout.truncated, rollout.terminated & (ending == "both"))


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_an_end_in_the_last_row_is_like_any_other(ending):
    first, second = collect(lambda: CountingEnv(4, ending), 4, CountPolicy(), calls=2)
    for rollout in (first, second):
        assert ended(rollout)[-1].all()
        final = 0.0 if ending == "terminated" else 4.0
        assert rollout.next_values[-1].tolist() == [final] * 3
        assert rollout.obs[0, :, 0].tolist() == [0.0] * 3


def test_the_last_row_bootstraps_from_where_the_next_rollout_begins():
    first, second = collect(lambda: CountingEnv(100, "terminated"), 7, CountPolicy(), calls=2)
    assert first.next_values[-1].tolist() == [7.0] * 3
    assert torch.equal(first.next_values[-1], second.values[0])


def test_final_values_come_from_the_learned_value_function_too():
    env = lambda: CountingEnv(4, "truncated")  # noqa: E731
    (rollout,) = collect(env, 12)
    policy = make_policy(VECTOR, TWO)
    successor = rollout.obs.clone()
    successor[..., 0] += 1
    torch.testing.assert_close(
        rollout.next_values, policy.value(successor.flatten(0, 1)).detach().reshape(12, 3)
    )


def test_a_constant_reward_that_is_only_truncated_is_worth_one_over_one_minus_gamma():
    """With V = 1 / (1 - gamma) every TD error is zero, at truncations and at the end too."""

    class Exact(CountPolicy):
        def value(self, obs):
            return torch.full((len(obs),), 10.0)

    (rollout,) = collect(lambda: EndlessProbe(7), 30, Exact())
    result = gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=0.9,
        gae_lambda=0.95,
    )
    assert result.advantages.abs().max() < 1e-5


def test_episodes_report_what_was_paid_over_the_borders_of_rollouts():
    with RolloutCollector(CountingEnv, num_envs=3, seed=3) as collector:
        rollouts = [collector.collect(CountPolicy(), n) for n in (1, 4, 2, 9, 3)]
    expected = []
    sums, lengths = [0.0] * 3, [0] * 3
    for rollout in rollouts:
        episodes = []
        for t in range(len(rollout.rewards)):
            for column in range(3):
                sums[column] += rollout.rewards[t, column].item()
                lengths[column] += 1
                if ended(rollout)[t, column]:
                    episodes.append(Episode(sums[column], lengths[column], column))
                    sums[column], lengths[column] = 0.0, 0
        expected.append(tuple(episodes))
    assert [rollout.episodes for rollout in rollouts] == expected
    assert sum(map(len, expected)) > 5


@pytest.mark.parametrize("kind", ["columns", "vector"])
def test_an_episode_is_summed_in_float64(kind):
    class Penny(EndlessProbe):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, 0.01, *rest

    make = lambda: Penny(1000)  # noqa: E731
    env = make if kind == "columns" else SyncVectorEnv([make])
    (rollout,) = collect(env, 1000, CountPolicy(), num_envs=1)
    assert rollout.episodes[0].episode_length == 1000
    assert rollout.episodes[0].episode_return == pytest.approx(10.0, abs=1e-9)
    assert isinstance(rollout.episodes[0].episode_return, float)


def test_rewards_are_what_was_paid():
    """Nothing is patched into the reward of a truncated step."""
    (rollout,) = collect(lambda: CountingEnv(3, "truncated"), 12, CountPolicy())
    assert torch.equal(rollout.rewards, rollout.obs[..., 0] + 1 + rollout.obs[..., 1])


# --- what the environment gets


def test_actions_are_stored_raw_and_clipped_for_the_environment():
    env = Recorder(WalkEnv(5))
    with pytest.warns(UserWarning, match="alone"):
        collector = RolloutCollector(env, num_envs=2, seed=0)
    policy = make_policy(VECTOR, SYMMETRIC, PolicyConfig(log_std_init=1.0))
    rollout = collector.collect(policy, 40)
    raw, sent = rollout.actions[:, 0].numpy(), np.stack(env.actions)
    assert (np.abs(raw) > 1.0).any()
    np.testing.assert_array_equal(sent, np.clip(raw, -1.0, 1.0))
    assert sent.dtype == np.float32
    expected = policy.evaluate(*(x.flatten(0, 1) for x in (rollout.obs, rollout.actions)))
    torch.testing.assert_close(rollout.log_probs.flatten(), expected.log_probs.detach())


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.Discrete(2, dtype=np.int32),
        spaces.Box(-1, 1, (2, 2), np.float64),
        spaces.Box(np.array([0.0, -5.0]), np.array([0.1, np.inf]), dtype=np.float64),
        spaces.Box(-1, 1, (1,), np.float16),
    ],
    ids=str,
)
def test_an_environment_gets_legal_actions_of_the_type_it_declares(space):
    env = Recorder(WithSpaces(action_space=space))
    collect(env, 30, num_envs=1)
    assert len(env.actions) == 30
    for action in env.actions:
        assert space.contains(action)
        assert np.asarray(action).dtype == space.dtype
    assert len({np.asarray(action).tobytes() for action in env.actions}) > 1


@pytest.mark.parametrize(
    ("space", "stored"),
    [
        (spaces.Box(-1, 1, (), np.float32), torch.float32),
        (spaces.Box(-1, 1, (2, 3), np.float64), torch.float32),
        (spaces.Box(-9, 9, (2,), np.int64), torch.float32),
        (spaces.Box(0, 255, (4,), np.uint8), torch.uint8),
        (spaces.Box(0, 255, (36, 36, 1), np.uint8), torch.uint8),
    ],
    ids=str,
)
@pytest.mark.parametrize("action_space", [TWO, SYMMETRIC], ids=["discrete", "box"])
def test_observations_of_every_box_are_collected(space, stored, action_space):
    (rollout,) = collect(lambda: WithSpaces(space, action_space), 8, num_envs=2)
    assert rollout.obs.dtype == stored
    assert rollout.obs.shape == (8, 2, *space.shape)
    assert rollout.actions.shape == (8, 2, *(action_space.shape or ()))
    for row in rollout.obs.flatten(0, 1):
        assert space.contains(row.numpy().astype(space.dtype))


def test_every_episode_is_reset_with_a_seed_of_its_own():
    env = Recorder(CountingEnv(2, "terminated"))
    collect(env, 40, CountPolicy(), num_envs=1)
    assert len(env.seeds) == len(set(env.seeds)) == 21
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in env.seeds)


# --- ratio = 1


CONFIGS = [
    PolicyConfig(),
    PolicyConfig(shared=True),
    PolicyConfig(hidden_sizes=(), activation="relu"),
    PolicyConfig(hidden_sizes=(32, 16, 8), activation="relu"),
    PolicyConfig(activation="silu"),
    PolicyConfig(hidden_sizes=(256, 256)),
    PolicyConfig(normalize_observations=False),
    PolicyConfig(log_std_init=2.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_first_evaluation_of_a_rollout_gives_ratio_one(env_id, config):
    with RolloutCollector(env_id, num_envs=3, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space, config)
        for _ in range(2):
            rollout = collector.collect(policy, 25)
            batch = rollout.flatten()
            new = policy.evaluate(batch.obs, batch.actions)
            assert ((new.log_probs - batch.log_probs).exp() - 1.0).abs().max() <= 1e-6
            torch.testing.assert_close(new.values.detach(), batch.values, rtol=1e-6, atol=1e-6)
            for mini in batch.minibatches(7, torch.Generator().manual_seed(0)):
                new = policy.evaluate(mini.obs, mini.actions)
                assert ((new.log_probs - mini.log_probs).exp() - 1.0).abs().max() <= 1e-5
            policy.update_normalizer(batch.obs)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter += 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_the_ratio_of_an_image_policy_is_one(shared):
    with RolloutCollector(ImageEnv, num_envs=2, seed=0) as collector:
        config = PolicyConfig(hidden_sizes=(8,), cnn_features=16, shared=shared)
        policy = make_policy(collector.observation_space, collector.action_space, config)
        batch = collector.collect(policy, 12).flatten()
    assert batch.obs.dtype == torch.uint8
    ratio = (policy.evaluate(batch.obs, batch.actions).log_probs - batch.log_probs).exp()
    assert (ratio - 1.0).abs().max() <= 1e-6


@MODES
def test_the_ratio_is_one_for_every_autoreset_mode(mode):
    env = SyncVectorEnv([lambda: WalkEnv(3, "truncated")] * 2, autoreset_mode=mode)
    with RolloutCollector(env, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        batch = collector.collect(policy, 20).flatten()
    ratio = (policy.evaluate(batch.obs, batch.actions).log_probs - batch.log_probs).exp()
    assert (ratio - 1.0).abs().max() <= 1e-6


def test_the_distribution_that_acts_is_the_one_that_is_evaluated():
    """Actions picked by the NumPy actor have the frequencies that the log-probabilities say."""
    policy = make_policy(VECTOR, TWO, PolicyConfig(output_gain=1.0))
    (rollout,) = collect(lambda: CountingEnv(5), 3000, policy, num_envs=4)
    probability = torch.where(rollout.actions == 1, rollout.log_probs, 0.0).exp()
    expected = torch.where(
        rollout.actions == 1, probability, 1.0 - rollout.log_probs.exp()
    ).double()
    surplus = (rollout.actions == 1).double() - expected
    # Independent draws: a sum with this variance.
    spread = (expected * (1.0 - expected)).sum().sqrt()
    assert surplus.sum().abs() < 4.0 * spread


# --- seeds and generators


def test_equal_seeds_give_equal_rollouts():
    first, second = (collect("CartPole-v1", 30, seed=7)[0] for _ in range(2))
    assert torch.equal(first.obs, second.obs)
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.log_probs, second.log_probs)


def test_a_seed_sequence_is_as_good_as_a_number_and_is_left_alone():
    sequence = np.random.SeedSequence(7)
    first, second = (
        collect("CartPole-v1", 5, seed=7)[0],
        collect("CartPole-v1", 5, seed=sequence)[0],
    )
    assert torch.equal(first.obs, second.obs)
    assert torch.equal(first.actions, second.actions)
    assert sequence.n_children_spawned == 0
    child = collect("CartPole-v1", 5, seed=sequence.spawn(1)[0])[0]
    assert not torch.equal(child.obs, first.obs)


def test_no_seed_means_a_new_one_each_time():
    first, second = (collect("CartPole-v1", 3, seed=None)[0] for _ in range(2))
    assert not torch.equal(first.obs, second.obs)


def test_neighbouring_seeds_and_environments_share_no_stream():
    rows, actions = [], []
    for seed in range(4):
        (rollout,) = collect("Pendulum-v1", 3, seed=seed, num_envs=5)
        rows += [tuple(row) for row in rollout.obs[0].tolist()]
        actions += rollout.actions[0].flatten().tolist()
    assert len(set(rows)) == len(set(actions)) == 20


def test_noise_of_neighbouring_steps_and_environments_is_uncorrelated():
    policy = NoisyCountPolicy()
    (rollout,) = collect(CountingEnv, 2000, policy, num_envs=3)
    x = rollout.actions.double() - 0.5
    for other in (x.roll(1, 0), x.roll(1, 1)):
        assert (x * other).mean().abs() < 0.25 * 4 / np.sqrt(x.numel())


def global_randomness():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
    )


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig(activation="elu")], ids=str)
def test_collecting_neither_reads_nor_moves_a_global_generator(config):
    rollouts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = global_randomness()
        with RolloutCollector("Pendulum-v1", num_envs=2, seed=0) as collector:
            policy = make_policy(collector.observation_space, collector.action_space, config)
            rollouts.append(collector.collect(policy, 10))
        assert global_randomness() == before
    assert torch.equal(rollouts[0].obs, rollouts[1].obs)
    assert torch.equal(rollouts[0].actions, rollouts[1].actions)


def test_a_policy_without_noise_draws_from_the_collectors_generator():
    rollouts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        rollouts.append(collect(CountingEnv, 30, CountPolicy())[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rollouts[0].actions, rollouts[1].actions)
    assert len(rollouts[0].actions.unique()) == 2


# --- rollouts in pieces


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", CountingEnv], ids=str)
@pytest.mark.parametrize(
    "config", [PolicyConfig(), PolicyConfig(hidden_sizes=(160, 8))], ids=["numpy", "torch"]
)
def test_a_long_rollout_is_its_pieces_joined(env, config):
    def run(horizons):
        with RolloutCollector(env, num_envs=3, seed=2) as collector:
            policy = make_policy(collector.observation_space, collector.action_space, config)
            return [collector.collect(policy, num_steps) for num_steps in horizons]

    (whole,) = run([36])
    for horizons in ([18, 18], [5, 20, 1, 10], [1, 34, 1]):
        pieces = run(horizons)
        for name in ("obs", "actions", "rewards", "terminated", "truncated", "valid"):
            joined = torch.cat([getattr(piece, name) for piece in pieces])
            assert torch.equal(joined, getattr(whole, name)), name
        for name in ("log_probs", "values", "next_values"):
            joined = torch.cat([getattr(piece, name) for piece in pieces])
            torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-5, atol=1e-5)
        assert sum((piece.episodes for piece in pieces), ()) == whole.episodes


def test_a_rollout_keeps_its_numbers_when_the_next_is_collected():
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        first = collector.collect(SnapshotCountPolicy(), 6)
        kept = {name: x.clone() for name, x in vars(first).items() if name != "episodes"}
        collector.collect(SnapshotCountPolicy(), 6)
    for name, x in kept.items():
        assert torch.equal(getattr(first, name), x), name
        assert not getattr(first, name).requires_grad


def test_policies_of_every_kind_may_take_turns():
    with RolloutCollector(lambda: CountingEnv(100), num_envs=2, seed=0) as collector:
        rollouts = [
            collector.collect(policy, 5)
            for policy in (CountPolicy(), SnapshotCountPolicy(), NoisyCountPolicy(), CountPolicy())
        ]
    counts = torch.cat([rollout.obs[:, 0, 0] for rollout in rollouts])
    assert torch.equal(counts, torch.arange(20.0))


def test_more_environments_than_a_group_are_all_stepped():
    (rollout,) = collect("CartPole-v1", 4, num_envs=70)
    assert rollout.rewards.shape == (4, 70)
    assert len({tuple(row) for row in rollout.obs[0].tolist()}) == 70
    assert not torch.equal(rollout.obs[0], rollout.obs[1])


def test_any_module_with_the_three_methods_collects():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def act(self, obs, *, noise=None, generator=None, deterministic=False):
            p = torch.softmax(self.linear(obs), -1)
            return torch.multinomial(p, 1, generator=generator).squeeze(-1)

        def evaluate(self, obs, actions):
            log_p = torch.log_softmax(self.linear(obs), -1)
            chosen = log_p.gather(1, actions[:, None]).squeeze(1)
            return chosen, -(log_p.exp() * log_p).sum(-1), obs[:, 0]

        def value(self, obs):
            return obs[:, 0]

    policy = Tiny()
    (rollout,) = collect(lambda: CountingEnv(4, "truncated"), 9, policy)
    assert_counts([rollout], 0)
    expected = policy.evaluate(rollout.obs.flatten(0, 1), rollout.actions.flatten())[0]
    torch.testing.assert_close(rollout.log_probs.flatten(), expected.detach())


# --- vector environments


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
        (rollout,) = collect(env, 12, CountPolicy())
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
    (rollout,) = collect(env, 12, CountPolicy())
    expected = torch.tensor([True, True, True, False] * 3)
    assert torch.equal(rollout.valid, expected[:, None].expand(12, 2))
    reset_rows = ~rollout.valid
    for name in ("rewards", "terminated", "truncated"):
        assert not getattr(rollout, name)[reset_rows].any()
    assert all(episode.episode_length == 3 for episode in rollout.episodes)
    assert len(rollout.episodes) == 6
    assert rollout.flatten().obs[:, 0].max() == 2.0
    # The true successor of a truncated step is the observation of the reset row.
    assert rollout.next_values[2].tolist() == [3.0, 3.0]
    env.close()


def test_a_pending_reset_is_remembered_by_the_next_rollout():
    env = SyncVectorEnv([lambda: CountingEnv(3, "terminated"), lambda: CountingEnv(4, "truncated")])
    first, second = collect(env, 3, CountPolicy(), calls=2)
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
    rollouts = collect(env, 1, num_envs=1, calls=6)
    assert [rollout.num_transitions for rollout in rollouts] == [1, 1, 0, 1, 1, 0]
    assert len(rollouts[2].flatten()) == 0
    env.close()


def test_gae_ignores_reset_rows():
    """Advantages of the valid rows are those of the same episodes without reset rows."""
    make = lambda: CountingEnv(3, "truncated")  # noqa: E731
    env = SyncVectorEnv([make])
    (with_resets,) = collect(env, 12, CountPolicy(), num_envs=1)
    (without,) = collect(make, 9, CountPolicy(), num_envs=1)
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
    rollouts = collect(env, 7, CountPolicy(), calls=3)
    for column in range(2):
        assert_counts(rollouts, column)
    env.close()


def test_a_silent_vector_environment_is_asked_for_its_mode():
    env = SyncVectorEnv([lambda: CountingEnv(3, "truncated")], autoreset_mode="SameStep")
    env.metadata = {}
    with pytest.raises(EnvCreationError, match="autoreset_mode"):
        RolloutCollector(env)
    rollouts = collect(env, 8, CountPolicy(), autoreset_mode="same_step")
    assert_counts(rollouts, 0)
    env.close()


def test_same_step_without_final_observations_is_an_error():
    env = SyncVectorEnv([lambda: CountingEnv(3, "truncated")], autoreset_mode="SameStep")
    step = env.step
    env.step = lambda actions: (*step(actions)[:-1], {})
    with pytest.raises(EnvError, match="final_obs"):
        collect(env, 8, CountPolicy())
    env.close()


def test_an_error_of_a_vector_environment_carries_its_traceback():
    env = SyncVectorEnv([lambda: FaultyEnv(crash, step=3)] * 2)
    with pytest.raises(EnvError, match="RuntimeError in step: the physics exploded") as caught:
        collect(env, 8, CountPolicy())
    assert "in crash" in str(caught.value)
    env.close()


# --- the caller's own environments


def test_the_callers_environments_are_never_closed():
    single = Recorder(CountingEnv())
    vector = SyncVectorEnv([CountingEnv])
    spec = gymnasium.make("CartPole-v1")
    wrapped = Recorder(spec.unwrapped)
    for env in (single, vector, spec, wrapped):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect(env, 3, num_envs=2)
    assert single.closed == wrapped.closed == 0
    assert not vector.closed
    spec.reset(seed=0)
    spec.step(0)
    for env in (vector, spec):
        env.close()


def test_the_callers_environments_are_not_closed_by_a_failure_either():
    env = Recorder(FaultyEnv(crash, step=2))
    with pytest.raises(EnvError):
        collect(env, 5, CountPolicy(), num_envs=1)
    assert env.closed == 0


def test_an_instance_with_a_spec_is_one_of_the_environments():
    env = gymnasium.make("CartPole-v1")
    recorder = env.unwrapped
    with RolloutCollector(env, num_envs=3, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        rollout = collector.collect(policy, 4)
    assert rollout.rewards.shape == (4, 3)
    assert recorder.state is not None
    (reference,) = collect("CartPole-v1", 4, policy)
    assert torch.equal(rollout.obs, reference.obs)
    env.close()


def test_an_instance_without_a_spec_is_collected_alone_and_the_caller_is_pointed_at():
    with pytest.warns(UserWarning, match="num_envs is 1, not 8") as caught:
        collector = RolloutCollector(CountingEnv(), num_envs=8, num_workers=2, seed=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert collector.num_envs == 1
    collector.close()


def test_environments_made_here_are_closed_once():
    made = []

    def make():
        made.append(Recorder(CountingEnv()))
        return made[-1]

    with RolloutCollector(make, num_envs=3, seed=0) as collector:
        collector.collect(CountPolicy(), 2)
        collector.close()
    assert [env.closed for env in made] == [1, 1, 1]


def test_one_environment_that_fails_to_close_does_not_keep_the_others():
    made = []

    class Stuck(Recorder):
        def close(self):
            super().close()
            raise RuntimeError("cannot close")

    def make():
        made.append(Stuck(CountingEnv()))
        return made[-1]

    collect(make, 2, CountPolicy())
    assert [env.closed for env in made] == [1, 1, 1]


def failing_factories():
    def third(made):
        if len(made) == 2:
            raise RuntimeError("no more licences")
        return CountingEnv()

    def third_differs(made):
        return CountingEnv() if len(made) < 2 else WalkEnv()

    def unsupported_action(made):
        return WithSpaces(action_space=spaces.MultiBinary(2))

    def unsupported_obs(made):
        return WithSpaces(observation_space=spaces.Discrete(2))

    def no_env(made):
        return CountingEnv() if len(made) < 2 else "an environment"

    return [
        (third, EnvError, r"factory of environment 2 raised RuntimeError: no more licences"),
        (third_differs, SpaceError, "environment 2 has other spaces than environment 0"),
        (unsupported_action, SpaceError, "MultiBinary"),
        (unsupported_obs, SpaceError, "Discrete"),
        (no_env, TypeError, "factory of environment 2 must return a gymnasium.Env, got str"),
    ]


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [pytest.param(*c, id=c[0].__name__) for c in failing_factories()],
)
def test_a_failed_start_closes_what_was_made(factory, error, message):
    made = []

    def make():
        env = factory(made)
        if isinstance(env, gymnasium.Env):
            env = Recorder(env)
            made.append(env)
        return env

    with pytest.raises(error, match=message):
        RolloutCollector(make, num_envs=3, seed=0)
    assert len(made) >= 2
    assert [env.closed for env in made] == [1] * len(made)


# --- wrong arguments and wrong order


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": 2.5}, "num_envs"),
        ({"num_workers": -1}, "num_workers"),
        ({"num_workers": 1.5}, "num_workers"),
        ({"step_timeout": 0.0}, "step_timeout"),
        ({"step_timeout": -1.0}, "step_timeout"),
        ({"step_timeout": float("nan")}, "step_timeout"),
        ({"start_method": "teleport"}, "start_method"),
        ({"start_method": "teleport", "num_workers": 1}, "start_method"),
        ({"device": "quantum"}, "device"),
        ({"seed": -1}, "seed"),
        ({"seed": "zero"}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        RolloutCollector("CartPole-v1", **{"num_envs": 2, **options})


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, "3", None], ids=str)
def test_a_wrong_number_of_steps_is_named_and_costs_nothing(num_steps):
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        collector.collect(CountPolicy(), 1)
        with pytest.raises((ValueError, TypeError), match="num_steps"):
            collector.collect(CountPolicy(), num_steps)
        assert collector.collect(CountPolicy(), 2).rewards.shape == (2, 2)


def test_a_policy_for_other_spaces_is_refused_and_costs_nothing():
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        for policy in (make_policy(VECTOR, SYMMETRIC), make_policy(SYMMETRIC, TWO)):
            with pytest.raises(SpaceError, match=r"policy was built for .*make_policy"):
                collector.collect(policy, 3)
        assert collector.collect(make_policy(VECTOR, TWO), 3).num_transitions == 6


def test_a_closed_collector_says_so():
    collector = RolloutCollector(CountingEnv, num_envs=2, seed=0)
    rollout = collector.collect(CountPolicy(), 3)
    collector.close()
    collector.close()
    with pytest.raises(ClosedError, match=r"closed: close\(\) was called; make a new one"):
        collector.collect(CountPolicy(), 3)
    assert rollout.rewards.isfinite().all()


def test_leaving_the_with_block_closes():
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        pass
    with pytest.raises(ClosedError):
        collector.collect(CountPolicy(), 1)


class Interrupting(CountPolicy):
    """Raises in the n-th call of one of its methods."""

    def __init__(self, method, error, call=3):
        self.method, self.error, self.calls_left = method, error, call

    def tick(self, method):
        if method == self.method:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise self.error

    def act(self, obs, **arguments):
        self.tick("act")
        return super().act(obs, **arguments)

    def evaluate(self, obs, actions):
        self.tick("evaluate")
        return super().evaluate(obs, actions)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), SystemExit(3)])
@pytest.mark.parametrize(("method", "call"), [("act", 1), ("act", 3), ("evaluate", 1)])
def test_after_an_exception_in_collect_the_collector_refuses(method, call, error):
    """What the environments were doing is unknown then; no stale row may come out."""
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        with pytest.raises(type(error)):
            collector.collect(Interrupting(method, error, call), 5)
        with pytest.raises(ClosedError, match=f"{type(error).__name__} in collect"):
            collector.collect(CountPolicy(), 5)


# --- environments that break


def test_an_error_in_step_names_environment_seed_step_and_action():
    seen = {}

    def fault(env):
        seen["count"] = env.count
        crash(env)

    recorders = []

    def make():
        fault_at = 5 if len(recorders) == 1 else 0
        recorders.append(Recorder(FaultyEnv(fault, step=fault_at, length=3)))
        return recorders[-1]

    with RolloutCollector(make, num_envs=3, seed=0) as collector:
        with pytest.raises(EnvError) as caught:
            collector.collect(CountPolicy(), 9)
        text = str(caught.value)
        culprit = recorders[1]
        assert "environment 1 raised RuntimeError in step: the physics exploded" in text
        assert f"episode seed {culprit.seeds[-1]}" in text
        assert f"episode step {seen['count'] - 1}" in text
        assert "rollout step 4" in text
        assert f"action {culprit.actions[-1]!r}" in text
        assert "Traceback" in text
        assert "in crash" in text
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(ClosedError, match="the physics exploded"):
            collector.collect(CountPolicy(), 1)
    assert [env.closed for env in recorders] == [1, 1, 1]


@pytest.mark.parametrize("reset", [1, 2])
def test_an_error_in_reset_names_environment_and_seed(reset):
    recorders = []

    def make():
        recorders.append(Recorder(FaultyEnv(crash, reset=reset * (len(recorders) == 1), length=3)))
        return recorders[-1]

    with pytest.raises(EnvError) as caught:
        collect(make, 9, CountPolicy())
    text = str(caught.value)
    assert "environment 1 raised RuntimeError in reset: the physics exploded" in text
    assert f"episode seed {recorders[1].seeds[-1]}" in text
    assert "None" not in text


def test_an_error_can_be_replayed_from_its_seed():
    """The episode seed in the message leads to the same episode."""
    made = []

    def make():
        made.append(Recorder(CountingEnv()))
        return made[-1]

    (rollout,) = collect(make, 1, CountPolicy(), num_envs=2)
    for column, env in enumerate(made):
        obs, _ = CountingEnv().reset(seed=env.seeds[0])
        assert obs.tolist() == rollout.obs[0, column].tolist()


@pytest.mark.parametrize(
    ("fault", "field"), [(nan_obs, "observation"), (infinite_reward, "reward")]
)
@POLICIES
def test_a_non_finite_number_is_stopped_with_its_environment_step_and_field(fault, field, policy):
    made = []

    def make():
        made.append(FaultyEnv(fault, step=8 * (len(made) == 2)))
        return made[-1]

    with RolloutCollector(make, num_envs=4, seed=0) as collector:
        collector.collect(policy, 5)
        with pytest.raises(
            NonFiniteError, match=f"environment 2 .*non-finite {field} at rollout step 2"
        ):
            collector.collect(policy, 5)
        with pytest.raises(ClosedError):
            collector.collect(policy, 5)


def test_the_first_of_several_non_finite_numbers_is_named():
    made = []

    def make():
        steps = {0: 4, 1: 3, 2: 3}
        made.append(FaultyEnv(nan_obs, step=steps[len(made)]))
        return made[-1]

    with pytest.raises(NonFiniteError, match="environment 1 .* at rollout step 2"):
        collect(make, 9, CountPolicy())


def test_a_non_finite_first_observation_is_stopped():
    with pytest.raises(NonFiniteError, match="environment 0 .*observation"):
        collect(lambda: FaultyEnv(nan_reset_obs, reset=1), 3, CountPolicy())


def test_a_non_finite_observation_after_a_reset_is_stopped():
    with pytest.raises(NonFiniteError, match="environment 0 .*observation at rollout step 2"):
        collect(lambda: FaultyEnv(nan_reset_obs, reset=2, length=3), 6, CountPolicy())


@pytest.mark.parametrize("kind", ["columns", *AutoresetMode], ids=str)
def test_a_non_finite_final_observation_of_a_truncated_step_is_stopped(kind):
    """No row holds it, but its value would be the target of the whole episode."""
    make = lambda: FaultyEnv(nan_final_obs, step=3)  # noqa: E731
    env = make if kind == "columns" else SyncVectorEnv([make], autoreset_mode=kind)
    with pytest.raises(NonFiniteError, match="environment 0 .*observation at rollout step 2"):
        collect(env, 6, make_policy(VECTOR, TWO), num_envs=1)


def test_the_last_observation_of_a_terminated_step_is_used_by_nobody():
    (rollout,) = collect(
        lambda: FaultyEnv(nan_terminal_obs, step=3), 6, make_policy(VECTOR, TWO), num_envs=1
    )
    assert rollout.terminated[2, 0]
    for tensor in (rollout.obs, rollout.values, rollout.next_values, rollout.log_probs):
        assert tensor.isfinite().all()


def test_an_environment_that_raises_because_of_its_own_nan_is_named_by_the_nan():
    class Picky(FaultyEnv):
        def step(self, action):
            if self.steps == 3:
                raise ValueError("state is NaN")
            return super().step(action)

    with pytest.raises(NonFiniteError, match="non-finite observation at rollout step 2"):
        collect(lambda: Picky(nan_obs, step=3), 6, CountPolicy(), num_envs=1)


class Saying(CountingEnv):
    """Answers with one thing exchanged."""

    def __init__(self, **changes):
        super().__init__(4, "truncated")
        self.changes = changes

    def step(self, action):
        names = ("obs", "reward", "terminated", "truncated", "info")
        answer = dict(zip(names, super().step(action), strict=True))
        return tuple({**answer, **self.changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"obs": np.zeros(1, np.float32)},
        {"obs": np.zeros((1, 2), np.float32)},
        {"obs": 0.5},
        {"obs": np.zeros(3, np.float32)},
        {"obs": "up"},
        {"reward": "much"},
        {"reward": None},
        {"reward": np.zeros(2)},
        {"extra": 1},
    ],
    ids=str,
)
@POLICIES
def test_an_ill_shaped_answer_is_an_error_that_names_the_environment(changes, policy):
    """Nothing is broadcast into the rollout."""
    with pytest.raises(EnvError, match="environment 0 raised .* in step"):
        collect(lambda: Saying(**changes), 6, policy)


@pytest.mark.parametrize(
    "reward", [np.float64(2.0), np.array(2.0), 2, True, torch.tensor(2.0)], ids=repr
)
def test_a_reward_may_be_any_scalar(reward):
    (rollout,) = collect(lambda: Saying(reward=reward), 6, CountPolicy())
    assert torch.equal(rollout.rewards, torch.full((6, 3), float(reward)))


def test_a_narrow_observation_of_one_environment_is_not_spread():
    with pytest.raises(EnvError, match="environment 0"):
        collect(lambda: FaultyEnv(narrow_obs, step=2), 6, CountPolicy())


def test_an_action_that_is_not_finite_is_not_blamed_on_the_environment():
    """A policy that has diverged sends the user to the policy, not to the environment."""
    with RolloutCollector("Pendulum-v1", num_envs=2, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        with torch.no_grad():
            next(iter(policy.parameters())).fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="policy"):
            collector.collect(policy, 3)
