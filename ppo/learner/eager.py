"""The gradient in plain PyTorch: the readable reference for every faster one."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor, nn

from ppo.learner.flat_adam import FlatAdam
from ppo.losses import ppo_loss
from ppo.policies.protocol import Evaluation
from ppo.rollout import Batch

__all__ = ["METRICS", "EagerGradient", "Gradient", "LossWeights"]

METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
"""Names of what a gradient reports, in order."""


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The numbers in the loss that may change from update to update."""

    clip_range: float
    entropy_coef: float
    value_coef: float
    value_clip_range: float | None


class Gradient(Protocol):
    """Computes the gradient of the loss of a minibatch.

    Attributes:
        num_threads: Threads that serve it best inside one operation; None for torch's setting.
    """

    num_threads: int | None

    def prepare(self, batch: Batch) -> Batch:
        """Do once per update what does not depend on the parameters."""

    def __call__(self, batch: Batch, weights: LossWeights) -> Tensor:
        """Write the gradient of one prepared minibatch; returns the `METRICS`, detached `[5]`."""


class EagerGradient:
    """Loss and backward pass by autograd, for any policy on any device.

    Args:
        policy: Evaluated on the minibatch.
        optimizer: Holds the gradients that are written.
    """

    num_threads: int | None = None

    def __init__(self, policy: nn.Module, optimizer: FlatAdam) -> None:
        self._policy = policy
        self._optimizer = optimizer

    def prepare(self, batch: Batch) -> Batch:
        """Nothing to prepare."""
        return batch

    def __call__(self, batch: Batch, weights: LossWeights) -> Tensor:
        """Write the gradient of one minibatch."""
        new = Evaluation(*self._policy.evaluate(batch.obs, batch.actions))  # type: ignore[operator]
        loss = ppo_loss(
            new.log_probs,
            batch.log_probs,
            batch.advantages,
            new.values,
            batch.returns,
            new.entropy,
            clip_range=weights.clip_range,
            value_coef=weights.value_coef,
            entropy_coef=weights.entropy_coef,
            value_clip_range=weights.value_clip_range,
            old_values=batch.values,
        )
        self._optimizer.zero_grad()
        loss.total.backward()
        return torch.stack([getattr(loss, name) for name in METRICS])
