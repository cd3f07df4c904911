"""Policies whose every value is known, and policies as if they had been trained."""

import numpy as np
import torch

from ppo.policies import Evaluation

VALUE_OF_ZERO = 10.0
"""Not 0, or the value of a first observation could not be told from that of an absorbing state."""


class CountPolicy:
    """V(obs) is 10 + the first entry; actions are fair, drawn from the collector's generator."""

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return torch.randint(2, (len(obs),), generator=generator)

    def evaluate(self, obs, actions):
        values = self.value(obs)
        return Evaluation(torch.full_like(values, -np.log(2.0)), torch.ones_like(values), values)

    def value(self, obs):
        return VALUE_OF_ZERO + obs.reshape(len(obs), -1)[:, 0].float()


class NoisyCountPolicy(CountPolicy):
    """A count policy whose actions are a function of noise per environment and step."""

    def draw_noise(self, rng, num_steps):
        return rng.random((num_steps, 1), dtype=np.float32)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return (noise[:, 0] < 0.5).long()


class CountActor:
    def __call__(self, obs, noise):
        return (noise[:, 0] < 0.5).astype(np.int64)


class SnapshotCountPolicy(NoisyCountPolicy):
    """A noisy count policy that can act in the workers."""

    def snapshot(self):
        return CountActor()


class LargeCountPolicy(NoisyCountPolicy):
    """Its actor is larger than what fits between a writer and a reader that does not read."""

    def snapshot(self):
        actor = CountActor()
        actor.ballast = np.zeros(2**20)
        return actor


class MemoryCountPolicy(NoisyCountPolicy):
    """Its memory is the number of steps since the episode began, and its value 10 more than that.

    In a counting environment it is thus worth what a count policy is, if nothing is forgotten in
    an episode and everything behind it.
    """

    state_size, memory_steps = 1, 3

    def act(self, obs, *, noise=None, generator=None, deterministic=False, state=None):
        return super().act(obs, noise=noise), state + 1.0

    def evaluate(self, obs, actions, *, sequences):
        steps = [torch.arange(length) for length in sequences.lengths]
        before = sequences.states[:, 0].repeat_interleave(torch.tensor(sequences.lengths))
        values = VALUE_OF_ZERO + before + torch.cat(steps)
        return Evaluation(torch.full_like(values, -np.log(2.0)), torch.ones_like(values), values)

    def value(self, obs, *, state):
        return VALUE_OF_ZERO + state[:, 0]


class MemoryCountActor(CountActor):
    def __call__(self, obs, noise, states):
        return super().__call__(obs, noise), states + np.float32(1.0)


class SnapshotMemoryCountPolicy(MemoryCountPolicy):
    """The same, and it can act in the workers."""

    def snapshot(self):
        return MemoryCountActor()


def observations(space, rows=7, seed=0):
    """A batch of observations of a Box."""
    rng = np.random.default_rng(seed)
    if space.dtype == np.uint8:
        return torch.from_numpy(rng.integers(0, 256, (rows, *space.shape), dtype=np.uint8))
    return torch.from_numpy(rng.normal(0, 2, (rows, *space.shape)).astype(np.float32))


def trained_like(policy, seed=0):
    """Move every parameter and fill the normaliser, as training would."""
    shuffle = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=shuffle)
    policy.update_normalizer(3.0 * observations(policy.observation_space, 50, seed) + 1.0)
    return policy
