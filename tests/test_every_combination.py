"""Any space, any memory, any mask: random combinations, each taken through the whole library."""

import copy
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


@torch.no_grad()
def rounding(policy, rollout):
    """By how much log-probabilities and values change with the weights' last bit, `[T, N]` each.

    Where features of some hundreds cancel and the rest is normalised, that is a thousand times the
    last bit of the result, and so is what another order of the same sums changes.
    """
    (batch,) = rollout.flatten().parts(10**6)
    exact = policy.evaluate(batch.obs, batch.actions, **batch.context)
    most = torch.zeros_like(exact.values), torch.zeros_like(exact.values)
    for seed in range(8):
        generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(policy)
        for parameter in other.parameters():
            parameter *= 1.0 + 2.0**-24 * (
                2.0 * torch.rand(parameter.shape, generator=generator) - 1.0
            )
        new = other.evaluate(batch.obs, batch.actions, **batch.context)
        for largest, one, two in zip(most, new[::2], exact[::2], strict=True):
            torch.maximum(largest, (one - two).abs(), out=largest)
    return [rollout.unflatten(10.0 * largest) for largest in most]


@torch.no_grad()
def ratio_is_one(policy, rollout, of_log_probs, of_values):
    """The policy that collected gives every row the probability that is stored, in any order."""
    batch = rollout.flatten(of_log_probs=of_log_probs, of_values=of_values)
    for mini in batch.minibatches(5, torch.Generator().manual_seed(0)):
        new = policy.evaluate(mini.obs, mini.actions, **mini.context)
        if not near(new.log_probs, mini.log_probs, 4e-6, mini.of_log_probs):
            return False
        if not near(new.values, mini.values, 1e-5, mini.of_values):
            return False
    return True


def near(ours, theirs, share, more):
    """A density of many numbers is rounded in proportion to its size."""
    return ((ours - theirs).abs() <= share * theirs.abs().clamp(min=1.0) + more).all()


def at(tree, t):
    """Row `t` of every leaf."""
    return map_tree(lambda leaf: to_tensor(leaf[t]), tree)


def as_vectors(space, actions):
    """Actions of a leaf as its distribution takes them."""
    rows = len(actions)
    return actions if isinstance(space, spaces.Discrete) else actions.reshape(rows, -1)


@torch.no_grad()
def evaluated_as_acted(policy, rollout, of_log_probs, _):
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
        if not near(log_probs, rollout.log_probs[t], 2e-5, of_log_probs[t]):
            return False
        if policy.state_size:
            state = policy.act(obs, action_mask=mask, state=state, deterministic=True)[1]
            state[ended[t]] = 0.0
    return True


def holds(law, policy, rollout):
    """Whether a law is true but for rounding: by a bound for all, or what it is for this policy."""
    nothing = torch.zeros_like(rollout.values)
    return law(policy, rollout, nothing, nothing) or law(
        policy, rollout, *rounding(policy, rollout)
    )


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
            assert holds(ratio_is_one, agent.policy, rollout)
            if index == 0:
                assert holds(evaluated_as_acted, agent.policy, rollout)
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
