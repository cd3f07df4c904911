"""This library: the agent as it comes, or with a policy that is a plain module of the user's."""

import gymnasium
import torch
from torch import nn

from ppo import Categorical, DiagonalGaussian, Evaluation, PolicyConfig, PPOAgent, PPOConfig
from ppo.policies import ObservationNormalizer


class OwnPolicy(nn.Module):
    """Act, evaluate and value, and nothing else that could help the library to be fast."""

    def __init__(self, workload):
        super().__init__()
        env = gymnasium.make(workload.env)
        (num_inputs,), actions = env.observation_space.shape, env.action_space
        env.close()
        self.normalizer = ObservationNormalizer((num_inputs,)) if workload.normalize else None
        self.discrete = isinstance(actions, gymnasium.spaces.Discrete)
        num_outputs = int(actions.n) if self.discrete else actions.shape[0]
        self.actor = mlp(num_inputs, workload.hidden_size, num_outputs, gain=0.01)
        self.critic = mlp(num_inputs, workload.hidden_size, 1, gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(num_outputs))

    def inputs(self, obs):
        return obs if self.normalizer is None else self.normalizer(obs.float())

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        outputs = self.actor(self.inputs(obs))
        if self.discrete:
            if deterministic:
                return outputs.argmax(-1)
            return torch.multinomial(outputs.softmax(-1), 1, generator=generator).squeeze(-1)
        if deterministic:
            return outputs
        return outputs + self.log_std.exp() * torch.randn(outputs.shape, generator=generator)

    def evaluate(self, obs, actions):
        x = self.inputs(obs)
        outputs = self.actor(x)
        family = Categorical(outputs) if self.discrete else DiagonalGaussian(outputs, self.log_std)
        values = self.critic(x).squeeze(-1)
        return Evaluation(family.log_prob(actions), family.entropy(), values)

    def value(self, obs):
        return self.critic(self.inputs(obs)).squeeze(-1)

    def update_normalizer(self, obs):
        if self.normalizer is not None:
            self.normalizer.update(obs)


def mlp(num_inputs, width, num_outputs, gain):
    layers = [nn.Linear(num_inputs, width), nn.Linear(width, width), nn.Linear(width, num_outputs)]
    for layer, scale in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


ATARI = {
    # The wrapper looks at no picture that the game returns; gray ones are made faster.
    "env_kwargs": {"frameskip": 1, "obs_type": "grayscale"},
    "wrappers": [
        "AtariPreprocessing",
        {"ClipReward": {"min_reward": -1.0, "max_reward": 1.0}},
    ],
}


def make_config(workload, *, precision="float32", memory=None, shared=False, **changes):
    """The workload in this library's words; `num_workers` stays as the library chooses it.

    A memory stands behind the layers of the others and is as wide as they are.
    """
    size = workload.hidden_size
    policy = PolicyConfig(
        hidden_sizes=(size, size),
        activation="tanh",
        log_std_init=0.0,
        normalize_observations=workload.normalize,
        memory=memory,
        memory_size=size,
        shared=shared,
    )
    if workload.pixels:
        policy = PolicyConfig(hidden_sizes=(), shared=True, frame_stack=4, precision=precision)
        changes |= {"env": workload.env, **ATARI}
    learning_rate, clip_range = workload.learning_rate, workload.clip_range
    return PPOConfig(
        num_envs=workload.num_envs,
        num_steps=workload.num_steps,
        num_epochs=workload.num_epochs,
        minibatch_size=workload.minibatch_size,
        learning_rate={"linear": [learning_rate, 0.0]} if workload.decay else learning_rate,
        clip_range={"linear": [clip_range, 0.0]} if workload.decay else clip_range,
        gamma=workload.gamma,
        gae_lambda=workload.gae_lambda,
        value_coef=workload.value_coef,
        max_grad_norm=workload.max_grad_norm,
        adam_eps=workload.adam_eps,
        normalize_advantages="minibatch",
        normalize_rewards=workload.normalize,
        policy=policy,
    ).replace(**changes)


def train(workload, num_updates, seed, tick, *, own_module=False, **changes):
    torch.manual_seed(seed)
    policy = OwnPolicy(workload) if own_module else None
    agent = PPOAgent(policy, config=make_config(workload, **changes), seed=seed)
    steps = num_updates * workload.rollout_size
    agent.learn(workload.env, steps, callback=lambda report: tick(), progress=False)
    return agent.act
