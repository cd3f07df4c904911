"""Action masks: no illegal action is drawn, wherever the mask comes from and whoever acts."""

import functools

import gymnasium
import numpy as np
import pytest
import torch
from collecting import assert_identical, collect
from environments import VECTOR
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from known_policies import CountPolicy
from torch import nn

from ppo import (
    Categorical,
    Evaluation,
    PolicyConfig,
    PPOAgent,
    PPOConfig,
    RolloutCollector,
    evaluate,
    make_policy,
)
from ppo.acting import act
from ppo.errors import EnvError, SpaceError
from ppo.trees import leaves

FIVE = spaces.Discrete(5, start=3)
WITH_MASK = spaces.Dict({"action_mask": spaces.MultiBinary(5), "x": VECTOR})


class MaskedEnv(gymnasium.Env):
    """Draws two legal actions in every step, and takes no other.

    Args:
        source: Where it says so: "info", "method" or "obs".
        length: Steps of an episode, of which every other one is truncated.
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    action_space = FIVE

    def __init__(self, source="info", length=4):
        self.source, self.length, self.episodes = source, length, 0
        self.observation_space = WITH_MASK if source == "obs" else VECTOR
        if source == "method":
            self.action_masks = lambda: self.mask

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.episodes = 0, self.episodes + 1
        return self.look()

    def look(self, over=False):
        self.mask = np.zeros(5, np.int8)
        if not over:  # nothing is legal at an end
            self.mask[self.np_random.choice(5, 2, replace=False)] = 1
        x = np.array([self.count, 0.0], np.float32)
        obs = {"action_mask": self.mask, "x": x} if self.source == "obs" else x
        return obs, {"action_mask": self.mask} if self.source == "info" else {}

    def step(self, action):
        assert self.mask[action - 3], f"{action} is illegal under {self.mask}"
        self.count += 1
        over = self.count == self.length
        obs, info = self.look(over)
        return obs, 1.0, over and self.episodes % 2 == 0, over and self.episodes % 2 == 1, info


SOURCES = pytest.mark.parametrize("source", ["info", "method", "obs"])


def masked_rows(rollout):
    """Masks of the rows that are transitions, from wherever they are stored."""
    return rollout.action_masks[rollout.valid]


@SOURCES
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("memory", [None, "gru"])
def test_no_illegal_action_is_drawn(source, num_workers, memory):
    config = PolicyConfig(hidden_sizes=(4,), memory=memory, memory_size=4)
    make = functools.partial(MaskedEnv, source)  # an illegal action is an error
    (rollout,) = collect(make, [40], config, num_workers=num_workers)
    masks = masked_rows(rollout)
    assert (masks.sum(-1) == 2).all()
    assert masks.gather(-1, rollout.actions[rollout.valid].unsqueeze(-1)).all()
    used = set(rollout.actions.flatten().tolist())
    assert used == {0, 1, 2, 3, 4}
    # Of two legal actions an untrained policy takes either.
    assert torch.isfinite(rollout.log_probs).all()
    torch.testing.assert_close(
        rollout.log_probs.exp(), torch.full_like(rollout.log_probs, 0.5), rtol=0.2, atol=0.0
    )


@SOURCES
@pytest.mark.parametrize(
    ("vector", "mode"),
    [
        *((SyncVectorEnv, mode) for mode in AutoresetMode),
        (AsyncVectorEnv, AutoresetMode.NEXT_STEP),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_vector_environments_are_masked_in_every_autoreset_mode(source, vector, mode):
    makers = [functools.partial(MaskedEnv, source, length) for length in (3, 4)]
    env = vector(makers, autoreset_mode=mode)
    try:
        (rollout,) = collect(env, [30], PolicyConfig(hidden_sizes=(4,)))
    finally:
        env.close()
    masks = masked_rows(rollout)
    assert (masks.sum(-1) == 2).all()
    assert masks.gather(-1, rollout.actions[rollout.valid].unsqueeze(-1)).all()


@SOURCES
def test_masks_do_not_depend_on_the_number_of_workers(source):
    make, config = functools.partial(MaskedEnv, source), PolicyConfig(hidden_sizes=(4,))
    alone = collect(make, [7, 9], config)
    for num_workers in (1, 3):
        assert_identical(collect(make, [7, 9], config, num_workers=num_workers), alone)


@SOURCES
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_and_single_actions_are_masked_too(source, deterministic):
    make = functools.partial(MaskedEnv, source)
    config = PPOConfig(num_envs=2, num_steps=16, policy=PolicyConfig(hidden_sizes=(8,)))
    agent = PPOAgent(config=config).learn(make, 64)
    assert len(agent.evaluate(make, 6, deterministic=deterministic).episode_returns) == 6
    env = make()
    obs, info = env.reset(seed=0)
    for _ in range(20):
        told = env.mask if source == "method" else info.get("action_mask")
        action = agent.act(obs, deterministic=deterministic, action_mask=told)
        obs, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            obs, info = env.reset()
    rows = {key: np.stack([leaf] * 2) for key, leaf in obs.items()} if source == "obs" else obs
    if source != "obs":
        rows, masks = np.stack([obs, obs]), np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
        assert agent.act(rows, action_mask=masks).tolist() == [3, 7]
    else:
        rows["action_mask"] = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], np.int8)
        assert agent.act(rows).tolist() == [3, 7]


class NothingLegal(MaskedEnv):
    def look(self, over=False):
        obs, info = super().look(over)
        if self.count == 2:
            self.mask[:] = 0
        return obs, info


@SOURCES
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_legal_action_is_an_error_that_names_the_environment(source, num_workers):
    def make(index):
        return (NothingLegal if index == 1 else MaskedEnv)(source)

    factories = [functools.partial(make, index) for index in range(3)]
    with RolloutCollector(factories, num_workers=num_workers, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        with pytest.raises(EnvError, match=r"environment 1 .*no legal action"):
            collector.collect(policy, 4)


def test_a_mask_that_stops_coming_is_an_error():
    class Forgetful(MaskedEnv):
        def look(self, over=False):
            obs, info = super().look(over)
            return obs, info if self.count < 2 else {}

    with RolloutCollector(Forgetful, num_envs=1, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        with pytest.raises(EnvError, match="info has no 'action_mask', but it had one before"):
            collector.collect(policy, 4)


def test_environments_without_masks_are_legal_beside_those_with():
    class Plain(MaskedEnv):
        def look(self, over=False):
            obs, _ = super().look(over)
            self.mask[:] = 1
            return obs, {}

    (rollout,) = collect([MaskedEnv, Plain], [20], PolicyConfig(hidden_sizes=(4,)))
    assert (rollout.action_masks[:, 0].sum(-1) == 2).all()
    assert rollout.action_masks[:, 1].all()


def test_a_policy_that_takes_no_masks_is_refused_where_they_would_be_lost():
    class Unaware(CountPolicy):
        def value(self, obs):
            return leaves(obs)[0].flatten(1)[:, 0].float()

        def act(self, obs, *, noise=None, generator=None, deterministic=False):
            rows = obs["action_mask"].float() if isinstance(obs, dict) else torch.ones(len(obs), 5)
            return rows.argmax(-1)

    with (
        RolloutCollector(MaskedEnv, num_envs=1) as collector,
        pytest.raises(SpaceError, match="act of Unaware takes no action_mask"),
    ):
        collector.collect(Unaware(), 2)
    with pytest.raises(SpaceError, match="act of Unaware takes no action_mask"):
        evaluate(Unaware(), MaskedEnv, 1)
    # In the observation it can look for itself.
    make = functools.partial(MaskedEnv, "obs")
    (rollout,) = collect(make, [9], Unaware(), num_envs=2)  # evaluate is given none either
    assert torch.equal(rollout.actions, rollout.obs["action_mask"].long().argmax(-1))


def test_actions_that_cannot_be_masked_ask_for_no_mask():
    class Torque(MaskedEnv):
        action_space = spaces.Box(-1.0, 1.0, (2,))

        def step(self, action):
            obs, info = self.look()
            return obs, 0.0, False, False, info

    (rollout,) = collect(Torque, [4], PolicyConfig(hidden_sizes=(4,)))
    assert rollout.action_masks is None


class Looking(nn.Module):
    """A policy of one's own that takes no masks, and finds them in the observation."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(2, 5), nn.Linear(2, 1)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return self.distribution(obs).mode()

    def distribution(self, obs):
        return Categorical(self.actor(obs["x"]), obs["action_mask"] != 0)

    def evaluate(self, obs, actions):
        distribution = self.distribution(obs)
        return Evaluation(distribution.log_prob(actions), distribution.entropy(), self.value(obs))

    def value(self, obs):
        return self.critic(obs["x"]).squeeze(-1)


def test_a_policy_that_finds_its_masks_by_itself_learns():
    policy = Looking()
    before = policy.actor.weight.detach().clone()
    config = PPOConfig(num_envs=2, num_steps=16)
    PPOAgent(policy, config=config).learn(functools.partial(MaskedEnv, "obs"), 64)
    assert not torch.equal(policy.actor.weight, before)


def test_a_mask_that_would_be_ignored_is_refused():
    policy = CountPolicy()
    policy.observation_space, policy.action_space = VECTOR, FIVE
    with pytest.raises(SpaceError, match="takes no action_mask, and would ignore"):
        act(
            policy,
            np.zeros(2, np.float32),
            VECTOR,
            FIVE,
            generator=torch.Generator(),
            deterministic=True,
            action_mask=np.ones(5),
        )


def test_masks_of_a_batch_come_one_by_one_or_as_arrays():
    space = spaces.Dict({"a": FIVE, "b": spaces.Discrete(2)})
    agent = PPOAgent(make_policy(VECTOR, space))
    masks = {"a": np.eye(5)[[4, 0]], "b": np.array([[0, 1], [1, 0]])}
    rows = np.zeros((2, 2), np.float32)
    arrays = agent.act(rows, action_mask=masks)
    one_by_one = [{name: mask[index] for name, mask in masks.items()} for index in range(2)]
    listed = agent.act(rows, action_mask=one_by_one)
    for actions in (arrays, listed):
        assert actions["a"].tolist() == [7, 3]
        assert actions["b"].tolist() == [1, 0]


def test_a_mask_in_the_observation_is_neither_normalised_nor_a_feature():
    space = spaces.Dict({"action_mask": spaces.Box(0, 1, (5,), np.int8), "x": VECTOR})
    policy = make_policy(space, FIVE)
    assert policy.normalizer.paths == ("x",)
    assert policy.actor_body.num_features == 64
    obs = {"action_mask": torch.eye(5), "x": torch.zeros(5, 2)}
    assert len(policy.value(obs).unique()) == 1


def test_of_stacked_observations_the_newest_one_says_what_is_legal():
    policy = make_policy(WITH_MASK, FIVE, PolicyConfig(hidden_sizes=(4,), frame_stack=2))
    legal = torch.eye(5, dtype=torch.int8)
    obs = {"action_mask": torch.stack([legal.flip(0), legal], 1), "x": torch.zeros(5, 2, 2)}
    assert policy.act(obs, deterministic=True).tolist() == [0, 1, 2, 3, 4]
