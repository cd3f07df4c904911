"""Any space, any memory, any mask: random combinations, each taken through the whole library."""

import copy
import dataclasses
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
from ppo.policies.bodies import ACTIVATIONS
from ppo.spaces import is_image, sub_spaces
from ppo.trees import leaves, leaves_with_paths, map_tree

# A longer profile by hand: PPO_COMBINATIONS=5000 pytest tests/test_every_combination.py
DRAWS = int(os.environ.get("PPO_COMBINATIONS", "300"))


def families(space):
    """Distributions that are defined on every Box of an action space."""
    boxes = [leaf for leaf in leaves(sub_spaces(space)) if isinstance(leaf, spaces.Box)]
    bounded = all(np.isfinite(box.low).all() and np.isfinite(box.high).all() for box in boxes)
    return ["gaussian", "gsde", *(["squashed", "beta"] if bounded else [])]


def kinds(space):
    """Encoders that fit a leaf; those that have a width come last."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return ["one_hot", "embedding", "mlp"]
    return ["flat", "mlp", "cnn"] if is_image(space) else ["flat", "mlp"]


@st.composite
def encoders(draw, space):
    """The usual encoder or any other that fits, of any width, for each leaf."""
    chosen = {}
    for path, leaf in leaves_with_paths(sub_spaces(space)):
        kind = draw(st.sampled_from([None, *kinds(leaf)]))
        has_width = kind in ("embedding", "mlp", "cnn")
        width = draw(st.sampled_from([None, 1, 3])) if has_width else None
        if kind is not None or draw(st.booleans()):
            chosen[path] = {"kind": kind, "features": width}
    return chosen


@st.composite
def hidden_from_actors(draw, space):
    """Leaves and groups of leaves, so that the actor still sees something."""
    paths = [path for path, _ in leaves_with_paths(sub_spaces(space))]
    first = draw(st.sampled_from(paths))  # is seen
    parts = {
        "/".join(path.split("/")[: n + 1]) for path in paths for n in range(path.count("/") + 1)
    }
    may_be = [part for part in sorted(parts) if part != first and not first.startswith(f"{part}/")]
    return tuple(draw(st.lists(st.sampled_from(may_be), unique=True)) if may_be else ())


@st.composite
def policy_options(draw, observation_space, action_space):
    """Every option of a policy."""
    distribution, shared = draw(st.sampled_from(families(action_space))), draw(st.booleans())
    sizes = st.sampled_from([(), (5,), (4, 3)])
    low, first, high = draw(st.sampled_from([(-5.0, -0.5, 2.0), (-1.0, 0.5, 0.5), (0.0, 0.0, 0.0)]))
    return {
        "hidden_sizes": draw(sizes),
        "critic_hidden_sizes": None if shared else draw(st.none() | sizes),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "layer_norm": draw(st.booleans()),
        "shared": shared,
        "encoders": draw(encoders(observation_space)),
        "critic_only": () if shared else draw(hidden_from_actors(observation_space)),
        "cnn_features": 8,
        "precision": draw(st.sampled_from(["float32", "bfloat16"])),
        "frame_stack": draw(st.sampled_from([1, 1, 2, 3])),
        "memory": draw(st.sampled_from([None, "lstm", "gru", "attention"])),
        "memory_window": draw(st.sampled_from([2, 5])),
        "memory_size": 4,
        "memory_steps": draw(st.sampled_from([1, 3, 16])),
        "distribution": distribution,
        "state_dependent_std": distribution in ("gaussian", "squashed") and draw(st.booleans()),
        "gsde_steps": draw(st.sampled_from([None, 2])),
        "log_std_init": first,
        "log_std_min": low,
        "log_std_max": high,
        "output_gain": draw(st.sampled_from([0.01, 1.0])),
        "normalize_observations": draw(st.booleans()),
        "observation_clip": draw(st.sampled_from([1.0, 10.0])),
    }


@st.composite
def combinations(draw):
    observation_space, action_space = draw(observation_spaces), draw(action_spaces)
    policy = PolicyConfig(**draw(policy_options(observation_space, action_space)))
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
    last bit of the result, and so is what another order of the same sums changes. Weights change
    one by one, which finds what cancels, and row by row, which finds how much depends on the last
    bit of a whole sum; by more than a bit each, as half a bit may be rounded away again.
    """
    (batch,) = rollout.flatten().parts(10**6)
    exact = policy.evaluate(batch.obs, batch.actions, **batch.context)
    most = torch.zeros_like(exact.values), torch.zeros_like(exact.values)
    bits = 8.0
    for seed in range(8):
        generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(policy)
        for parameter in other.parameters():
            row = (len(parameter), *[1] * (parameter.ndim - 1))
            for shape in (parameter.shape, row):
                some = 2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0
                parameter.copy_(parameter * (1.0 + bits * 2.0**-24 * some))
        new = other.evaluate(batch.obs, batch.actions, **batch.context)
        for largest, one, two in zip(most, new[::2], exact[::2], strict=True):
            torch.maximum(largest, (one - two).abs(), out=largest)
    return [rollout.unflatten(10.0 / bits * largest) for largest in most]


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


@settings(max_examples=1, database=None)
@given(policy_options(spaces.Discrete(2), spaces.Discrete(2)))
def test_no_option_of_a_policy_is_left_out(options):
    assert options.keys() == {field.name for field in dataclasses.fields(PolicyConfig)}


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
