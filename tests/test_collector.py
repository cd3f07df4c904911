import random

import numpy as np
import pytest
import torch
from collecting import assert_counts, collect, ended, tensors_of
from environments import (
    SYMMETRIC,
    TWO,
    VECTOR,
    AliasingEnv,
    CountingEnv,
    ImageEnv,
    Recorder,
    WalkEnv,
    WithSpaces,
)
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from known_policies import (
    VALUE_OF_ZERO,
    CountPolicy,
    NoisyCountPolicy,
    SnapshotCountPolicy,
)
from torch import nn

from ppo.advantages import gae
from ppo.collector import RolloutCollector
from ppo.collector.streams import EPISODES, NOISE, POLICY, stream
from ppo.policies import PolicyConfig, make_policy
from ppo.probes.environments import Endless
from ppo.rollout import Episode

MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
POLICIES = pytest.mark.parametrize("policy", [CountPolicy(), SnapshotCountPolicy()], ids=type)


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
    for column in range(num_envs):
        assert_counts(rollouts, column)


def test_a_truncated_step_bootstraps_from_its_final_observation():
    (rollout,) = collect(lambda: CountingEnv(4, "truncated"), (10,), CountPolicy())
    expected = VALUE_OF_ZERO + torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0])
    assert torch.equal(rollout.next_values, expected[:, None].expand(10, 3))
    assert rollout.truncated[:, 0].nonzero().flatten().tolist() == [3, 7]
    assert not rollout.terminated.any()


@pytest.mark.parametrize("ending", ["terminated", "both"])
def test_a_terminated_step_has_no_future_even_if_it_is_truncated_too(ending):
    (rollout,) = collect(lambda: CountingEnv(4, ending), (10,), CountPolicy())
    expected = VALUE_OF_ZERO + torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0])
    expected[[3, 7]] = 0.0
    assert torch.equal(rollout.next_values, expected[:, None].expand(10, 3))
    assert rollout.terminated[:, 0].nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(rollout.truncated, rollout.terminated & (ending == "both"))


@pytest.mark.parametrize("ending", ["terminated", "truncated"])
def test_an_end_in_the_last_row_is_like_any_other(ending):
    first, second = collect(lambda: CountingEnv(4, ending), (4, 4), CountPolicy())
    for rollout in (first, second):
        assert ended(rollout)[-1].all()
        final = 0.0 if ending == "terminated" else VALUE_OF_ZERO + 4.0
        assert rollout.next_values[-1].tolist() == [final] * 3
        assert rollout.obs[0, :, 0].tolist() == [0.0] * 3


def test_the_last_row_bootstraps_from_where_the_next_rollout_begins():
    first, second = collect(lambda: CountingEnv(100, "terminated"), (7, 7), CountPolicy())
    assert first.next_values[-1].tolist() == [VALUE_OF_ZERO + 7.0] * 3
    assert torch.equal(first.next_values[-1], second.values[0])


def test_final_values_come_from_the_learned_value_function_too():
    env = lambda: CountingEnv(4, "truncated")  # noqa: E731
    (rollout,) = collect(env, (12,))
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

    (rollout,) = collect(lambda: Endless(7), (30,), Exact())
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
    class Penny(Endless):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, 0.01, *rest

    make = lambda: Penny(1000)  # noqa: E731
    env = make if kind == "columns" else SyncVectorEnv([make])
    (rollout,) = collect(env, (1000,), CountPolicy(), num_envs=1)
    assert rollout.episodes[0].episode_length == 1000
    assert rollout.episodes[0].episode_return == pytest.approx(10.0, abs=1e-9)
    assert isinstance(rollout.episodes[0].episode_return, float)


def test_rewards_are_what_was_paid():
    """Nothing is patched into the reward of a truncated step."""
    (rollout,) = collect(lambda: CountingEnv(3, "truncated"), (12,), CountPolicy())
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
    collect(env, (30,), num_envs=1)
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
    (rollout,) = collect(lambda: WithSpaces(space, action_space), (8,), num_envs=2)
    assert rollout.obs.dtype == stored
    assert rollout.obs.shape == (8, 2, *space.shape)
    assert rollout.actions.shape == (8, 2, *(action_space.shape or ()))
    for row in rollout.obs.flatten(0, 1):
        assert space.contains(row.numpy().astype(space.dtype))


def test_every_episode_is_reset_with_a_seed_of_its_own():
    env = Recorder(CountingEnv(2, "terminated"))
    collect(env, (40,), CountPolicy(), num_envs=1)
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
    (rollout,) = collect(lambda: CountingEnv(5), (3000,), policy, num_envs=4)
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
    first, second = (collect("CartPole-v1", (30,), seed=7)[0] for _ in range(2))
    assert torch.equal(first.obs, second.obs)
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.log_probs, second.log_probs)


def test_a_seed_sequence_is_as_good_as_a_number_and_is_left_alone():
    sequence = np.random.SeedSequence(7)
    first, second = (
        collect("CartPole-v1", (5,), seed=7)[0],
        collect("CartPole-v1", (5,), seed=sequence)[0],
    )
    assert torch.equal(first.obs, second.obs)
    assert torch.equal(first.actions, second.actions)
    assert sequence.n_children_spawned == 0
    child = collect("CartPole-v1", (5,), seed=sequence.spawn(1)[0])[0]
    assert not torch.equal(child.obs, first.obs)


def test_no_seed_means_a_new_one_each_time():
    first, second = (collect("CartPole-v1", (3,), seed=None)[0] for _ in range(2))
    assert not torch.equal(first.obs, second.obs)


def test_neighbouring_seeds_and_environments_share_no_stream():
    rows, actions = [], []
    for seed in range(4):
        (rollout,) = collect("Pendulum-v1", (3,), seed=seed, num_envs=5)
        rows += [tuple(row) for row in rollout.obs[0].tolist()]
        actions += rollout.actions[0].flatten().tolist()
    assert len(set(rows)) == len(set(actions)) == 20


def test_no_two_streams_share_their_numbers():
    roots = [np.random.SeedSequence(seed) for seed in range(4)]
    roots += roots[0].spawn(3)
    draws = {
        int(stream(root, purpose, index).integers(2**63))
        for root in roots
        for purpose in (EPISODES, NOISE, POLICY)
        for index in range(50)
    }
    assert len(draws) == 7 * 3 * 50


def test_noise_of_neighbouring_steps_and_environments_is_uncorrelated():
    policy = NoisyCountPolicy()
    (rollout,) = collect(CountingEnv, (2000,), policy, num_envs=3)
    x = rollout.actions.double() - 0.5
    for other in (x.roll(1, 0), x.roll(1, 1)):
        assert (x * other).mean().abs() < 0.25 * 4 / np.sqrt(x.numel())


def global_randomness():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
    )


@pytest.mark.parametrize(
    "config", [PolicyConfig(), PolicyConfig(activation="elu")], ids=["numpy", "torch"]
)
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
        rollouts.append(collect(CountingEnv, (30,), CountPolicy())[0])
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
        kept = {name: x.clone() for name, x in tensors_of(first).items()}
        collector.collect(SnapshotCountPolicy(), 6)
    for name, x in tensors_of(first).items():
        assert torch.equal(kept[name], x), name
        assert not x.requires_grad


def test_policies_of_every_kind_may_take_turns():
    with RolloutCollector(lambda: CountingEnv(100), num_envs=2, seed=0) as collector:
        rollouts = [
            collector.collect(policy, 5)
            for policy in (CountPolicy(), SnapshotCountPolicy(), NoisyCountPolicy(), CountPolicy())
        ]
    counts = torch.cat([rollout.obs[:, 0, 0] for rollout in rollouts])
    assert torch.equal(counts, torch.arange(20.0))


def test_more_environments_than_a_group_are_all_stepped():
    (rollout,) = collect("CartPole-v1", (4,), num_envs=70)
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
            return chosen, -(log_p.exp() * log_p).sum(-1), self.value(obs)

        def value(self, obs):
            return VALUE_OF_ZERO + obs[:, 0]

    policy = Tiny()
    (rollout,) = collect(lambda: CountingEnv(4, "truncated"), (9,), policy)
    assert_counts([rollout], 0)
    expected = policy.evaluate(rollout.obs.flatten(0, 1), rollout.actions.flatten())[0]
    torch.testing.assert_close(rollout.log_probs.flatten(), expected.detach())
