"""Any space, any memory, any mask: random combinations, each taken through the whole library."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from environments import RandomSpacesEnv
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from space_strategies import action_spaces, observation_spaces

from ppo import PolicyConfig, PPOAgent, PPOConfig, RolloutCollector
from ppo.frames import to_tensor
from ppo.spaces import sub_spaces
from ppo.trees import leaves, map_tree

# A longer profile by hand: PPO_COMBINATIONS=5000 pytest tests/test_every_combination.py
DRAWS = int(os.environ.get("PPO_COMBINATIONS", "300"))


def families(space):
    """Distributions that are defined on every Box of an action space."""
    boxes = [leaf for leaf in leaves(sub_spaces(space)) if isinstance(leaf, spaces.Box)]
    bounded = all(np.isfinite(box.low).all() and np.isfinite(box.high).all() for box in boxes)
    return ["gaussian", "gsde", *(["squashed", "beta"] if bounded else [])]


@st.composite
def combinations(draw):
    observation_space, action_space = draw(observation_spaces), draw(action_spaces)
    policy = PolicyConfig(
        hidden_sizes=draw(st.sampled_from([(), (5,), (4, 3)])),
        activation=draw(st.sampled_from(["tanh", "relu"])),
        layer_norm=draw(st.booleans()),
        shared=draw(st.booleans()),
        cnn_features=8,
        frame_stack=draw(st.sampled_from([1, 1, 2, 3])),
        memory=draw(st.sampled_from([None, "lstm", "gru", "attention"])),
        memory_window=draw(st.sampled_from([2, 5])),
        memory_size=4,
        memory_steps=draw(st.sampled_from([1, 3, 16])),
        distribution=draw(st.sampled_from(families(action_space))),
        gsde_steps=draw(st.sampled_from([None, 2])),
        normalize_observations=draw(st.booleans()),
    )
    config = PPOConfig(
        num_envs=draw(st.integers(1, 3)),
        num_steps=draw(st.integers(1, 12)),
        num_epochs=2,
        minibatch_size=draw(st.sampled_from([4, 16])),
        # Starting processes takes its time: one draw in eight has them.
        num_workers=draw(st.sampled_from([0] * 7 + [2])),
        recompute_advantages=draw(st.booleans()),
        policy=policy,
    )
    return observation_space, action_space, config, draw(st.booleans()), draw(st.integers(0, 99))


def assert_ratio_one(policy, rollout):
    """The policy that collected gives every row the probability that is stored, in any order."""
    batch = rollout.flatten()
    with torch.no_grad():
        for mini in batch.minibatches(5, torch.Generator().manual_seed(0)):
            new = policy.evaluate(mini.obs, mini.actions, **mini.context)
            # A density of many numbers is rounded in proportion to its size.
            scale = 1e-6 * torch.clamp(mini.log_probs.abs(), min=1.0)
            assert ((new.log_probs - mini.log_probs).abs() <= 4 * scale).all()
            torch.testing.assert_close(new.values, mini.values, rtol=1e-5, atol=1e-5)


def at(tree, t):
    """Row `t` of every leaf."""
    return map_tree(lambda leaf: to_tensor(leaf[t]), tree)


def as_vectors(space, actions):
    """Actions of a leaf as its distribution takes them."""
    rows = len(actions)
    return actions if isinstance(space, spaces.Discrete) else actions.reshape(rows, -1)


@torch.no_grad()
def assert_evaluated_as_acted(policy, rollout):
    """Step by step, as it acted from the beginning of episodes, it gives the same probabilities."""
    num_envs = rollout.rewards.shape[1]
    state = torch.zeros(num_envs, policy.state_size)
    ended = rollout.terminated | rollout.truncated
    for t in range(len(rollout.rewards)):
        obs, actions = at(rollout.obs, t), at(rollout.actions, t)
        mask = None if rollout.action_masks is None else rollout.action_masks[t]
        distribution = policy.distribution(obs, action_mask=mask, state=state)
        flat = map_tree(as_vectors, sub_spaces(policy.action_space), actions)
        log_probs = distribution.log_prob(flat)
        torch.testing.assert_close(log_probs, rollout.log_probs[t], rtol=2e-5, atol=2e-5)
        if policy.state_size:
            state = policy.act(obs, action_mask=mask, state=state, deterministic=True)[1]
            state[ended[t]] = 0.0


def finite(module):
    return all(torch.isfinite(parameter).all() for parameter in module.parameters())


@settings(
    max_examples=DRAWS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    phases=[Phase.generate],  # to find a smaller one takes longer than a test may
)
@given(combinations())
def test_every_combination_collects_learns_saves_and_acts(drawn):
    observation_space, action_space, config, masks, seed = drawn
    note(f"{observation_space} -> {action_space}, masks {masks}")

    def make():
        return RandomSpacesEnv(observation_space, action_space, masks, length=4)

    agent = PPOAgent(config=config, seed=seed)
    agent.learn(make, 1)  # actions that are not legal, or of another type, are an error
    assert finite(agent.policy)
    with RolloutCollector(make, num_envs=config.num_envs, seed=seed) as collector:
        for index in range(2):
            rollout = collector.collect(agent.policy, config.num_steps)
            assert (rollout.action_masks is not None) == (
                masks and agent.policy.action_head.mask_size > 0
            )
            assert_ratio_one(agent.policy, rollout)
            if index == 0:
                assert_evaluated_as_acted(agent.policy, rollout)
    agent.update(rollout)
    assert finite(agent.policy)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.safetensors"
        agent.save(path)
        twin = PPOAgent.load(path)
    env = make()
    obs, info = env.reset(seed=seed)
    state = other_state = None
    for _ in range(5):
        mask = info.get("action_mask")
        ours = agent.act(obs, action_mask=mask, state=state, deterministic=False)
        theirs = twin.act(obs, action_mask=mask, state=other_state, deterministic=False)
        if agent.policy.state_size or agent.policy.frame_stack > 1:
            (ours, state), (theirs, other_state) = ours, theirs
        map_tree(np.testing.assert_array_equal, ours, theirs)
        obs, _, terminated, truncated, info = env.step(ours)
        if terminated or truncated:
            (obs, info), state, other_state = env.reset(), None, None
