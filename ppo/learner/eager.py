"""The gradient step in plain PyTorch: the readable reference for every faster one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppo.losses import ppo_loss
from ppo.policies.protocol import Evaluation
from ppo.rollout import Batch

__all__ = ["EagerStep", "StepMetrics", "parameter_groups"]


class StepMetrics(NamedTuple):
    """Detached scalars of one gradient step; read them once per update, not per step."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    grad_norm: Tensor


def parameter_groups(policy: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The policy's own groups, or all its parameters as one."""
    groups = getattr(policy, "parameter_groups", None)
    named: dict[str, list[nn.Parameter]] = (
        groups() if groups else {"policy": [*policy.parameters()]}
    )
    return {
        name: [parameter for parameter in parameters if parameter.requires_grad]
        for name, parameters in named.items()
    }


class EagerStep:
    """Loss, backward pass, one gradient clip per network, one optimizer step.

    Args:
        policy: Evaluated on the minibatch.
        optimizer: Steps the policy's parameters.
        value_coef: Weight of the value loss.
        value_clip_range: ε of the value clip, or None.
        max_grad_norm: Limit on each group's gradient norm.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        value_coef: float,
        value_clip_range: float | None,
        max_grad_norm: float,
    ) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._value_coef = value_coef
        self._value_clip_range = value_clip_range
        self._max_grad_norm = max_grad_norm
        self._groups = parameter_groups(policy)

    def __call__(self, batch: Batch, *, clip_range: float, entropy_coef: float) -> StepMetrics:
        """Improve the policy on one minibatch; its fields are those of `Learner.improve`."""
        new = Evaluation(*self._policy.evaluate(batch.obs, batch.actions))  # type: ignore[operator]
        loss = ppo_loss(
            new.log_probs,
            batch.log_probs,
            batch.advantages,
            new.values,
            batch.returns,
            new.entropy,
            clip_range=clip_range,
            value_coef=self._value_coef,
            entropy_coef=entropy_coef,
            value_clip_range=self._value_clip_range,
            old_values=batch.values,
        )
        self._optimizer.zero_grad()
        loss.total.backward()
        norms = [
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
            for parameters in self._groups.values()
        ]
        self._optimizer.step()
        return StepMetrics(
            loss.policy_loss.detach(),
            loss.value_loss.detach(),
            loss.entropy.detach(),
            loss.approx_kl,
            loss.clip_fraction,
            torch.linalg.vector_norm(torch.stack(norms)),
        )
