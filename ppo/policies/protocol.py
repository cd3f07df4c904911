"""What the rest of the library asks of a policy, and nothing more."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Actor", "Evaluation", "Policy"]


class Evaluation(NamedTuple):
    """What a policy says about given observations and actions.

    Attributes:
        log_probs: Log-density (or log-mass) of the actions in nats, `[B]`.
        entropy: Entropy of the distribution over actions in nats, `[B]`.
        values: State values, in units of (scaled) return, `[B]`.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


@runtime_checkable
class Policy(Protocol):
    """An `nn.Module` with these three methods works everywhere in the library.

    A policy may further offer

    - `draw_noise(rng, num_steps)`: float32 noise `[num_steps, k]` for that many actions of one
      environment. It is then called as `act(obs, noise=...)`, which makes the noise a function of
      (seed, environment, step) alone; otherwise `act(obs, generator=...)` gets a torch generator.
    - `snapshot()`: an `Actor`, a small NumPy copy that worker processes run by themselves.
    - `update_normalizer(obs)`: fold observations `[B, ...]` into its running statistics; the agent
      calls it between rollouts.
    - `parameter_groups()`: parameters by name of the network they belong to; each group's gradient
      is clipped on its own.
    """

    def act(
        self,
        obs: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """Raw actions for observations `[B, ...]`: sampled, or the mode if `deterministic`."""

    def evaluate(self, obs: Tensor, actions: Tensor) -> Evaluation:
        """Log-probabilities, entropies and values `[B]`, with gradient."""

    def value(self, obs: Tensor) -> Tensor:
        """State values `[B]`, with gradient."""


class Actor(Protocol):
    """A picklable, torch-free copy of the acting half of a policy."""

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw actions `[G, ...]` for observations `[G, ...]` and noise `[G, k]`."""


def takes_generator(policy: Policy) -> bool:
    """True if `policy.act` has a parameter `generator`."""
    return "generator" in inspect.signature(policy.act).parameters


def frozen_parameters(policy: nn.Module) -> list[str]:
    """Names of the parameters that are not to be trained."""
    return [name for name, tensor in policy.named_parameters() if not tensor.requires_grad]


def freeze_exactly(policy: nn.Module, names: Collection[str]) -> None:
    """Freeze these parameters and release all others; `ValueError` for an unknown name."""
    parameters = dict(policy.named_parameters())
    unknown = sorted(set(names) - parameters.keys())
    if unknown:
        raise ValueError(f"it freezes {unknown}, which the policy does not have")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in names)


def policy_device(policy: nn.Module) -> torch.device:
    """Device of the policy's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in policy.parameters()), torch.device("cpu"))
