"""Actors in NumPy: they choose and remember as the policy they are a copy of."""

import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from known_policies import observations, trained_like
from policy_setup import PAIR, PLANE, THREE
from torch import nn

from ppo.policies import LSTMMemory, PolicyConfig, make_policy
from ppo.policies.numpy_actor import MemoryActor

remembering_policies = st.builds(
    lambda memory, size, sizes, activation, normalize, shared, shape, actions: make_policy(
        spaces.Box(-1.0, 1.0, shape, np.float32),
        actions,
        PolicyConfig(
            memory=memory,
            memory_size=size,
            hidden_sizes=sizes,
            activation=activation,
            normalize_observations=normalize,
            shared=shared,
        ),
    ),
    st.sampled_from(["lstm", "gru"]),
    st.sampled_from([1, 8, 64]),
    st.lists(st.sampled_from([1, 8, 32]), max_size=2).map(tuple),
    st.sampled_from(["tanh", "relu"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1,), (2, 3)]),
    st.sampled_from([THREE, PAIR, spaces.Box(-1, 1, (2, 2), np.float32)]),
)


def drawn(policy, rows, seed):
    """Observations, noise and states of that many rows."""
    rng = np.random.default_rng(seed)
    obs = 3.0 * observations(policy.observation_space, rows, seed).numpy()
    states = rng.normal(0.0, 0.5, (rows, policy.state_size)).astype(np.float32)
    return obs, policy.draw_noise(rng, rows), states


@settings(max_examples=60)
@given(remembering_policies, st.integers(0, 1000), st.integers(1, 40))
def test_it_chooses_and_remembers_as_its_policy_step_after_step(policy, seed, rows):
    trained_like(policy, seed)
    actor = policy.snapshot()
    assert isinstance(actor, MemoryActor)
    states = np.zeros((rows, policy.state_size), np.float32)
    for step in range(4):
        obs, noise, _ = drawn(policy, rows, seed + step)
        given = torch.from_numpy(obs), torch.from_numpy(states)
        wanted, after = policy.act(given[0], noise=torch.from_numpy(noise), state=given[1])
        actions, ours = actor(obs, noise, states)
        np.testing.assert_allclose(ours, after.numpy(), rtol=1e-5, atol=1e-5)
        if isinstance(policy.action_space, spaces.Box):
            assert actions.shape == wanted.shape
            np.testing.assert_allclose(actions, wanted.numpy(), rtol=1e-5, atol=1e-5)
        else:
            scores = policy.distribution(given[0], state=given[1]).log_p.detach().numpy() + noise
            chosen, best = (scores[np.arange(rows), a] for a in (actions, wanted.numpy()))
            np.testing.assert_allclose(chosen, best, atol=1e-4, err_msg="no near tie")
        states = ours


@settings(max_examples=40)
@given(remembering_policies, st.integers(0, 1000), st.integers(2, 32), st.data())
def test_a_row_does_not_depend_on_the_other_rows(policy, seed, rows, data):
    """What makes results independent of who acts for which part of a group, bit for bit."""
    trained_like(policy, seed)
    arrays = drawn(policy, rows, seed)
    whole = [array.copy() for array in policy.snapshot()(*arrays)]
    first = data.draw(st.integers(0, rows - 1))
    own = slice(first, data.draw(st.integers(first + 1, rows)))
    part = [np.zeros_like(array) for array in arrays]
    for alone, array in zip(part, arrays, strict=True):
        alone[own] = array[own]
    actor = pickle.loads(pickle.dumps(policy.snapshot()))
    for ours, theirs in zip(actor(*part), whole, strict=True):
        np.testing.assert_array_equal(ours[own], theirs[own])


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_it_is_a_copy_and_leaves_what_it_is_given_and_what_it_gave(memory):
    policy = trained_like(make_policy(PLANE, PAIR, PolicyConfig(memory=memory)))
    arrays = drawn(policy, 7, 0)
    kept = [array.copy() for array in arrays]
    actor = policy.snapshot()
    results = actor(*arrays)
    before = [array.copy() for array in results]
    trained_like(policy, seed=5)
    actor(*drawn(policy, 7, 1))
    for arrays_now, arrays_then in ((arrays, kept), (results, before), (actor(*arrays), before)):
        for now, then in zip(arrays_now, arrays_then, strict=True):
            np.testing.assert_array_equal(now, then)


class DoublingMemory(LSTMMemory):
    def step(self, features, state):
        return super().step(2.0 * features, state)


def unusual_policies():
    def policy(**options):
        return make_policy(PLANE, THREE, PolicyConfig(**{"memory": "lstm"} | options))

    yield "attention", policy(memory="attention")
    yield "large memory", policy(memory_size=80)
    yield "critic of other widths", policy(critic_hidden_sizes=(64, 32))
    yield "critic of more layers", policy(critic_hidden_sizes=(64, 64, 64))
    yield "foreign activation of the critic", policy(activation="elu")
    yield "frames", policy(frame_stack=2)
    one = policy()
    one.critic_body.append(nn.Dropout(0.5))
    yield "appended layer of the critic", one
    one = policy()
    one.critic_body[2] = nn.ReLU()
    yield "other activation in the critic", one
    one = policy()
    one.critic_memory = policy(memory="gru").critic_memory
    yield "two kinds of memory", one
    for name in ("actor_memory", "critic_memory"):
        one = policy()
        setattr(one, name, DoublingMemory(64, 64, torch.Generator()))
        yield f"foreign {name}", one


@pytest.mark.parametrize(
    "policy", [pytest.param(policy, id=name) for name, policy in unusual_policies()]
)
def test_what_is_not_small_and_plain_acts_in_torch(policy):
    assert policy.snapshot() is None
