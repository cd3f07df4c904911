"""Small policies of all kinds, batches for them, and learners to train them with."""

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from ppo import Batch, Evaluation, PolicyConfig, make_policy
from ppo.learner import Learner, LearnerSettings

DISCRETE = spaces.Discrete(3)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
SMALL = PolicyConfig(hidden_sizes=(8,), output_gain=1.0)
OPTIONS = {
    "num_epochs": 3,
    "minibatch_size": 16,
    "value_coef": 0.5,
    "value_clip_range": None,
    "max_grad_norm": 0.5,
    "target_kl": None,
    "adam_eps": 1e-5,
    "normalize_advantages": "none",
}
UPDATE = {"learning_rate": 1e-3, "clip_range": 0.2, "entropy_coef": 0.01}


class OwnPolicy(nn.Module):
    """The least that the protocol asks for."""

    def __init__(self, num_inputs=4, num_actions=3):
        super().__init__()
        self.actor = nn.Linear(num_inputs, num_actions)
        self.critic = nn.Linear(num_inputs, 1)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        probs = self.actor(obs).softmax(-1)
        if deterministic:
            return probs.argmax(-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

    def evaluate(self, obs, actions):
        log_p = self.actor(obs).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        chosen = log_p.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        return Evaluation(chosen, entropy, self.value(obs))

    def value(self, obs):
        return self.critic(obs).squeeze(-1)


def build(action_space=DISCRETE, config=SMALL, seed=0, num_inputs=4):
    observation_space = spaces.Box(-np.inf, np.inf, (num_inputs,), np.float32)
    return make_policy(observation_space, action_space, config, seed=seed)


def look_on(module, inputs, output):
    """A forward hook that wants to be called, so that autograd has to do the work."""


def eager(policy):
    next(policy.children()).register_forward_hook(look_on)
    return policy


def make_batch(policy, rows=48, seed=0, log_ratios=0.1, num_inputs=4):
    """Rows on which the ratio is exp of what is given: a scale, or one log-ratio per row."""
    generator = torch.Generator().manual_seed(seed)
    obs = 2.0 * torch.randn(rows, num_inputs, generator=generator)
    actions = policy.act(obs, generator=generator)
    if not isinstance(log_ratios, torch.Tensor):
        log_ratios = log_ratios * torch.randn(rows, generator=generator)
    with torch.no_grad():
        new = Evaluation(*(output.detach() for output in policy.evaluate(obs, actions)))
    return Batch(
        obs=obs,
        actions=actions,
        log_probs=new.log_probs - log_ratios,
        values=new.values + torch.randn(rows, generator=generator),
        advantages=torch.randn(rows, generator=generator),
        returns=new.values + 3.0 * torch.randn(rows, generator=generator),
    )


def make_learner(policy, **options):
    return Learner(policy, LearnerSettings(**OPTIONS | options))


def improve(learner, batch, seed=0, **update):
    return learner.improve(batch, torch.Generator().manual_seed(seed), **UPDATE | update)


def parts(policy, learner):
    """Every tensor that training moves, copied."""
    state = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    state |= {f"optimizer.{name}": tensor for name, tensor in learner.state_dict().items()}
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_bitwise_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def parameters(policy):
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


class FromFeatures(OwnPolicy):
    """An own policy with something between observations and outputs: a module or a function."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def evaluate(self, obs, actions):
        return super().evaluate(self.features(obs), actions)


class Branching(OwnPolicy):
    """Looks at values to decide what to compute."""

    def evaluate(self, obs, actions):
        return super().evaluate(obs if obs.mean() > 0 else 2.0 * obs, actions)


class Tied(OwnPolicy):
    """One weight in two layers, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.alias = self.second

    def value(self, obs):
        hidden = self.alias(self.second(self.first(obs).tanh()).tanh())
        return self.critic(hidden).squeeze(-1)


def seeded(make):
    torch.manual_seed(0)
    return make()


KINDS = {
    "own": OwnPolicy,
    "tied": Tied,
    "branching": Branching,
    "layer norm": lambda: FromFeatures(nn.LayerNorm(4)),
    "dropout": lambda: FromFeatures(nn.Dropout(0.5)),
    "batch norm": lambda: FromFeatures(nn.BatchNorm1d(4)),
    "shared": lambda: build(config=PolicyConfig(hidden_sizes=(8,), shared=True)),
    "gelu": lambda: build(BOX, PolicyConfig(hidden_sizes=(8,), activation="gelu")),
}


class Drawn(torch.autograd.Function):
    """Doubles its argument; its gradient is drawn."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, grad):
        return 2.0 * grad * torch.rand_like(grad)
