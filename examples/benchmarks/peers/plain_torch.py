"""The loop a careful newcomer writes by hand with PyTorch and Gymnasium, and no library of RL.

Careful: one vectorised pass of the running statistics per step instead of wrappers per environment,
truncated episodes bootstrap from their final observation, log-probabilities and values of a step in
one call, no validation inside distributions. With `compiled=True` the gradient step goes through
`torch.compile`.
"""

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn
from torch.distributions import Categorical, Normal


class RunningStatistics:
    """Mean and variance of everything seen, by Chan's parallel update."""

    def __init__(self, shape=()):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update(self, batch):
        mean, var, count = batch.mean(0), batch.var(0), len(batch)
        delta, total = mean - self.mean, self.count + count
        self.mean = self.mean + delta * (count / total)
        between = delta**2 * (self.count * count / total)
        self.var = (self.var * self.count + var * count + between) / total
        self.count = total

    @property
    def std(self):
        return np.sqrt(self.var + 1e-8)


class Normalization:
    """Running normalisation of observations and rewards; does nothing if it is off."""

    def __init__(self, shape, num_envs, gamma, on):
        self.on, self.gamma = on, gamma
        self.obs_statistics, self.return_statistics = RunningStatistics(shape), RunningStatistics()
        self.returns = np.zeros(num_envs)

    def apply(self, obs):
        if self.on:
            obs = ((obs - self.obs_statistics.mean) / self.obs_statistics.std).clip(-10.0, 10.0)
        return torch.as_tensor(obs, dtype=torch.float32)

    def observe(self, obs):
        if self.on:
            self.obs_statistics.update(obs)
        return self.apply(obs)

    def scale(self, rewards, over):
        if not self.on:
            return rewards
        self.returns = self.returns * self.gamma + rewards
        self.return_statistics.update(self.returns)
        self.returns[over] = 0.0
        return (rewards / self.return_statistics.std).clip(-10.0, 10.0)


class ActorCritic(nn.Module):
    def __init__(self, num_inputs, width, action_space):
        super().__init__()
        self.discrete = isinstance(action_space, gymnasium.spaces.Discrete)
        size = int(action_space.n) if self.discrete else action_space.shape[0]
        self.actor = self.mlp(num_inputs, width, size, 0.01)
        self.critic = self.mlp(num_inputs, width, 1, 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(size))

    @staticmethod
    def mlp(num_inputs, width, size, last_gain):
        def linear(rows, columns, gain):
            layer = nn.Linear(rows, columns)
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
            return layer

        return nn.Sequential(
            linear(num_inputs, width, 2**0.5),
            nn.Tanh(),
            linear(width, width, 2**0.5),
            nn.Tanh(),
            linear(width, size, last_gain),
        )

    def forward(self, obs, actions=None):
        """Actions, their log-probabilities, entropies and values."""
        outputs, values = self.actor(obs), self.critic(obs).squeeze(-1)
        if self.discrete:
            dist = Categorical(logits=outputs, validate_args=False)
            actions = dist.sample() if actions is None else actions
            return actions, dist.log_prob(actions), dist.entropy(), values
        dist = Normal(outputs, self.log_std.exp(), validate_args=False)
        actions = dist.sample() if actions is None else actions
        return actions, dist.log_prob(actions).sum(-1), dist.entropy().sum(-1), values


class Learner:
    """One gradient step on a minibatch, and the loop over minibatches and epochs."""

    def __init__(self, network, workload, compiled=False):
        self.network, self.workload = network, workload
        self.learning_rate = torch.tensor(workload.learning_rate)
        self.clip_range = torch.tensor(workload.clip_range)
        self.optimizer = torch.optim.Adam(
            network.parameters(),
            # A compiled step would be compiled anew for every other Python number.
            lr=self.learning_rate if compiled else workload.learning_rate,
            eps=workload.adam_eps,
        )
        self.step = torch.compile(self.gradient_step) if compiled else self.gradient_step

    def set_progress(self, progress):
        if self.workload.decay:
            self.clip_range.fill_(self.workload.clip_range * (1.0 - progress))
            learning_rate = self.workload.learning_rate * (1.0 - progress)
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(learning_rate)
                else:
                    group["lr"] = learning_rate

    def gradient_step(self, obs, actions, log_probs, advantages, returns):
        _, new_log_probs, _, values = self.network(obs, actions)
        ratio = (new_log_probs - log_probs).exp()
        clipped = torch.clamp(ratio, 1.0 - self.clip_range, 1.0 + self.clip_range)
        policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
        value_loss = (values - returns).square().mean()
        loss = policy_loss + self.workload.value_coef * value_loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.workload.max_grad_norm)
        self.optimizer.step()

    def improve(self, obs, actions, log_probs, advantages, returns):
        size = self.workload.minibatch_size
        for _ in range(self.workload.num_epochs):
            for rows in torch.randperm(len(obs)).split(size):
                a = advantages[rows]
                a = (a - a.mean()) / (a.std() + 1e-8)
                self.step(obs[rows], actions[rows], log_probs[rows], a, returns[rows])


def estimate(rewards, values, last_value, over, gamma, gae_lambda):
    """Generalised advantages `[T, N]`; an end cuts the trace and the bootstrap."""
    advantages = torch.zeros_like(rewards)
    advantage, next_value = torch.zeros_like(last_value), last_value
    for t in reversed(range(len(rewards))):
        goes_on = 1.0 - over[t]
        delta = rewards[t] + gamma * next_value * goes_on - values[t]
        advantage = delta + gamma * gae_lambda * goes_on * advantage
        advantages[t], next_value = advantage, values[t]
    return advantages


def train(workload, num_updates, seed, tick, *, compiled=False):
    torch.manual_seed(seed)
    T, N = workload.num_steps, workload.num_envs
    envs = SyncVectorEnv(
        [lambda: gymnasium.make(workload.env)] * N, autoreset_mode=AutoresetMode.SAME_STEP
    )
    shape, action_space = envs.single_observation_space.shape, envs.single_action_space
    network = ActorCritic(shape[0], workload.hidden_size, action_space)
    learner = Learner(network, workload, compiled)
    normalization = Normalization(shape, N, workload.gamma, workload.normalize)

    observations = torch.zeros(T, N, *shape)
    actions = torch.zeros(T, N, *action_space.shape)
    log_probs, values, rewards, over = (torch.zeros(T, N) for _ in range(4))
    obs = normalization.observe(envs.reset(seed=seed)[0])
    for update in range(num_updates):
        learner.set_progress(update / num_updates)
        with torch.no_grad():
            for t in range(T):
                observations[t] = obs
                actions[t], log_probs[t], _, values[t] = network(obs)
                raw, reward, terminated, truncated, infos = envs.step(to_env(actions[t], envs))
                ends = terminated | truncated
                reward = normalization.scale(reward, ends)
                for index in np.flatnonzero(truncated & ~terminated):
                    final = normalization.apply(infos["final_obs"][index])
                    reward[index] += workload.gamma * network.critic(final).item()
                obs = normalization.observe(raw)
                rewards[t], over[t] = torch.as_tensor(reward), torch.as_tensor(ends)
            last_value = network.critic(obs).squeeze(-1)
            advantages = estimate(
                rewards, values, last_value, over, workload.gamma, workload.gae_lambda
            )
            returns = advantages + values
        fields = (observations, actions, log_probs, advantages, returns)
        learner.improve(*(field.flatten(0, 1) for field in fields))
        tick()
    envs.close()

    @torch.no_grad()
    def act(obs):
        outputs = network.actor(normalization.apply(obs))
        return (outputs.argmax(-1) if network.discrete else outputs).numpy()

    return act


def to_env(actions, envs):
    """What the environments take: whole numbers, or vectors within the bounds."""
    space = envs.single_action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return actions.numpy().astype(np.int64)
    return actions.numpy().clip(space.low, space.high)
