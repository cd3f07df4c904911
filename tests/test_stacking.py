"""Stacked frames: each is stored once, and a stack never reaches into another episode."""

import numpy as np
import pytest
import torch
from collecting import assert_identical, collect
from environments import CountingEnv, ImageEnv
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, seeds

from ppo import Evaluation, PolicyConfig, PPOAgent, PPOConfig
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.stacking import FrameIndex, Stacks
from ppo.frames import FrameStack, newest, to_tensor
from ppo.policies.state import PolicyState
from ppo.spaces import Leaf

LEAF = Leaf((), np.dtype(np.int64))


class StackPolicy:
    """V of a stack of counts is 10 + a number whose digits are the counts, the newest last."""

    def __init__(self, frame_stack=3):
        self.frame_stack = frame_stack
        self.seen = []

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        self.seen.append(obs.clone())
        return torch.randint(2, (len(obs),), generator=generator)

    def evaluate(self, obs, actions):
        values = self.value(obs)
        return Evaluation(torch.full_like(values, -np.log(2.0)), torch.ones_like(values), values)

    def value(self, obs):
        assert obs.shape[1] == self.frame_stack
        return 10.0 + value_of(obs[..., 0])


def value_of(counts):
    digits = 10.0 ** torch.arange(counts.shape[-1] - 1, -1, -1)
    return (counts * digits).sum(-1)


def expected_stacks(rollouts, column, frame_stack):
    """The definition: the latest counts of the episode, its first one repeated before it."""
    history = []
    for rollout in rollouts:
        frames = newest(rollout.obs)[:, :, 0]
        for t in range(len(rollout.rewards)):
            count, tag = frames[t, column].tolist()
            if not history or history[-1][1] != tag or count == 0:
                history = [(count, tag)] * frame_stack
            else:
                history = [*history[1:], (count, tag)]
            yield rollout, t, history


@pytest.mark.parametrize("frame_stack", [2, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stack_holds_the_latest_observations_of_its_episode(frame_stack, num_workers):
    policy = StackPolicy(frame_stack)
    rollouts = collect(CountingEnv, [7, 2, 9], policy, num_workers=num_workers)
    acted = torch.stack(policy.seen)
    stored = torch.cat([to_tensor(rollout.obs) for rollout in rollouts])
    assert torch.equal(acted, stored), "the policy acted on what is stored"
    for column in range(3):
        for rollout, t, history in expected_stacks(rollouts, column, frame_stack):
            assert to_tensor(rollout.obs)[t, column].tolist() == [list(item) for item in history]


@pytest.mark.parametrize("ending", ["truncated", "terminated"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_value_of_a_successor_is_that_of_its_stack(ending, length):
    env = CountingEnv(length, ending)
    rollouts = collect(lambda: env, [6, 3, 5], StackPolicy(5), num_envs=1)
    for rollout, t, history in expected_stacks(rollouts, 0, 5):
        counts = torch.tensor([*(count for count, _ in history[1:]), history[-1][0] + 1.0])
        wanted = 0.0 if rollout.terminated[t, 0] else 10.0 + float(value_of(counts))
        assert rollout.next_values[t, 0] == wanted


def test_frames_are_stored_once():
    (rollout,) = collect(ImageEnv, [16], PolicyConfig(cnn_features=8, frame_stack=4))
    assert isinstance(rollout.obs, FrameStack)
    assert rollout.obs.shape == (16, 3, 4, 3, 40, 44)
    assert rollout.obs.dtype == torch.uint8
    assert len(rollout.obs.frames) == (16 + 3) * 3
    batch = rollout.flatten()
    assert batch.obs.frames.data_ptr() == rollout.obs.frames.data_ptr()
    minis = list(batch.minibatches(10, torch.Generator().manual_seed(0)))
    assert all(isinstance(mini.obs, torch.Tensor) for mini in minis)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([mini.obs for mini in minis])
    assert torch.equal(joined, to_tensor(rollout.obs).flatten(0, 1)[order])


@pytest.mark.parametrize(
    ("env", "config"),
    [
        (CountingEnv, PolicyConfig(hidden_sizes=(4,), frame_stack=3)),
        (ImageEnv, PolicyConfig(hidden_sizes=(), cnn_features=8, frame_stack=3)),
    ],
    ids=["vectors", "images"],
)
def test_the_number_of_workers_changes_nothing(env, config):
    alone = collect(env, [5, 9, 1], config)
    for num_workers in (1, 2, 3):
        assert_identical(collect(env, [5, 9, 1], config, num_workers=num_workers), alone)


class SelfActing(StackPolicy):
    """Acts where the environments are, in some of the rollouts."""

    def __init__(self, frame_stack, turns):
        super().__init__(frame_stack)
        self.turns = iter(turns)

    def snapshot(self):
        return Recorder(self.seen) if next(self.turns) else None


class Recorder:
    """An actor that sees two environments at once."""

    group_size = 2

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, obs, noise):
        self.seen.append(torch.from_numpy(obs.copy()))
        return np.zeros(len(obs), np.int64)


@pytest.mark.parametrize("frame_stack", [2, 4])
@pytest.mark.parametrize("turns", [[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]], ids=str)
def test_an_actor_sees_what_is_stored_whoever_acted_before(frame_stack, turns):
    policy = SelfActing(frame_stack, turns)
    rollouts = collect(CountingEnv, [7, 1, 2, 9], policy, num_envs=4)
    seen = iter(policy.seen)
    for rollout, by_itself in zip(rollouts, turns, strict=True):
        for stored in to_tensor(rollout.obs):
            acted = torch.cat([next(seen), next(seen)]) if by_itself else next(seen)
            assert torch.equal(acted, stored)
    for column in range(4):
        for rollout, t, history in expected_stacks(rollouts, column, frame_stack):
            assert to_tensor(rollout.obs)[t, column].tolist() == [list(item) for item in history]


def test_the_normaliser_counts_every_frame_once():
    config = PPOConfig(
        num_envs=2, num_steps=16, policy=PolicyConfig(hidden_sizes=(4,), frame_stack=3)
    )
    seen = []
    agent = PPOAgent(config=config)
    update = agent.update
    agent.update = lambda rollout: seen.append(newest(rollout.obs).flatten(0, 2)) or update(rollout)
    agent.learn(CountingEnv, 64)
    frames = torch.cat(seen).double()
    torch.testing.assert_close(agent.policy.normalizer.mean, frames.mean(0))
    assert agent.policy.normalizer.count == 64


@law
@given(seeds, st.integers(1, 12), st.integers(1, 3), st.integers(2, 5))
def test_acting_and_storing_agree_on_every_stack(seed, num_steps, num_envs, frame_stack):
    rng = np.random.default_rng(seed)
    ended = rng.random((num_steps, num_envs)) < 0.3
    age = rng.integers(0, frame_stack, num_envs)
    state = PolicyState.begin(StackPolicy(frame_stack), num_envs)
    # The frames from before the rollout, of episodes that are `age` steps old.
    frames = rng.normal(size=(frame_stack - 1 + num_steps + 1, num_envs, 2))
    for step in range(frame_stack - 1):
        state.age = np.maximum(age - (frame_stack - 1 - step), 0)
        state.see(frames[step], frame_stack)
    state.age = age.copy()
    buffers = Buffers(
        Layout(num_steps, num_envs, Leaf((2,), np.dtype(float)), LEAF, history=frame_stack - 1)
    )
    buffers.frames[:], buffers.ages[:] = frames, age
    buffers.valid[:], buffers.truncated[:] = ~ended, False  # lost rows end episodes as well
    stacks = Stacks(buffers, slice(1, num_envs))
    index = FrameIndex(age, ended, frame_stack)
    stored = index.stacks(frames, torch.from_numpy).tensor().numpy()
    for t in range(num_steps):
        seen = state.see(frames[frame_stack - 1 + t], frame_stack)
        np.testing.assert_array_equal(seen, stored[t])
        np.testing.assert_array_equal(stacks.at(t), stored[t, 1:])
        state.after(ended[t])
    np.testing.assert_array_equal(
        state.see(frames[frame_stack - 1 + num_steps], frame_stack), index.last(frames)
    )
