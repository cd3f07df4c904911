"""The gradient in plain PyTorch: the readable reference for every faster one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from ppo.advantages import normalize
from ppo.learner.flat_optimizer import FlatOptimizer
from ppo.losses import ppo_loss
from ppo.policies.protocol import Evaluator
from ppo.rollout import Batch

__all__ = ["METRICS", "EagerGradient", "Gradient", "LossSettings"]

METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
"""Names of what a gradient reports, in order."""


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the loss of a minibatch depends on besides its rows."""

    clip_range: float
    entropy_coef: float
    value_coef: float
    value_clip_range: float | None
    normalize_advantages: bool  # of each minibatch by itself
    clip_range_high: float | None = None
    dual_clip: float | None = None


class Gradient(Protocol):
    """Computes the gradient of the loss of a minibatch.

    Attributes:
        num_threads: Threads that serve it best inside one operation; None for torch's setting.
        takes_arrays: Minibatches are best of arrays, not of tensors (see `Batch.minibatches`).
    """

    num_threads: int | None
    takes_arrays: bool

    def begin(self) -> None:
        """Take note that an update begins: the policy may have changed since the last one."""

    def __call__(self, batch: Batch, settings: LossSettings) -> Sequence[float | Tensor]:
        """Write the gradient of one minibatch; returns the `METRICS`, as numbers or tensors."""


class EagerGradient:
    """Loss and backward pass by autograd, for any policy on any device.

    Args:
        policy: Evaluated on the minibatch.
        optimizer: Holds the gradients that are written.
    """

    num_threads: int | None = None
    takes_arrays = False

    def __init__(self, policy: nn.Module, optimizer: FlatOptimizer) -> None:
        self._evaluate = Evaluator(policy)
        self._optimizer = optimizer

    def begin(self) -> None:
        """Nothing to note."""

    def __call__(self, batch: Batch, settings: LossSettings) -> list[Tensor]:
        """Write the gradient of one minibatch; returns the `METRICS`, detached."""
        advantages = batch.advantages
        if settings.normalize_advantages:
            advantages = normalize(advantages)
        new = self._evaluate(batch.obs, batch.actions, batch.context)
        loss = ppo_loss(
            new.log_probs,
            batch.log_probs,
            advantages,
            new.values,
            batch.returns,
            new.entropy,
            clip_range=settings.clip_range,
            value_coef=settings.value_coef,
            entropy_coef=settings.entropy_coef,
            value_clip_range=settings.value_clip_range,
            old_values=batch.values,
            clip_range_high=settings.clip_range_high,
            dual_clip=settings.dual_clip,
        )
        self._optimizer.zero_grad()
        loss.total.backward()
        return [getattr(loss, name).detach() for name in METRICS]
