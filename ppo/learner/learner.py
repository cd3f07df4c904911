"""`Learner`: several epochs of gradient steps over one batch, undone if they go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ppo.advantages import normalize
from ppo.errors import NonFiniteError
from ppo.learner.eager import EagerStep, StepMetrics, parameter_groups
from ppo.learner.state import Undo, load_optimizer_tensors, optimizer_tensors
from ppo.rollout import Batch

__all__ = ["Learner"]


class Learner:
    """Owns the optimizer and improves a policy on a batch.

    Args:
        policy: The policy, on its device.
        num_epochs: Passes over the batch.
        minibatch_size: Rows per gradient step.
        value_coef: Weight of the value loss.
        value_clip_range: ε of the value clip, or None.
        max_grad_norm: Limit on the gradient norm of each network.
        target_kl: Stop after an epoch whose mean KL exceeds this, or None.
        adam_eps: Adam's denominator floor.
        normalize_advantages: Normalise the advantages of each minibatch by itself.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        num_epochs: int,
        minibatch_size: int,
        value_coef: float,
        value_clip_range: float | None,
        max_grad_norm: float,
        target_kl: float | None,
        adam_eps: float,
        normalize_advantages: bool,
    ) -> None:
        self._policy = policy
        self._num_epochs = num_epochs
        self._minibatch_size = minibatch_size
        self._target_kl = target_kl
        self._normalize_advantages = normalize_advantages
        parameters = [p for group in parameter_groups(policy).values() for p in group]
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        self._optimizer = torch.optim.Adam(parameters, eps=adam_eps, fused=fused)
        self._step = EagerStep(
            policy,
            self._optimizer,
            value_coef=value_coef,
            value_clip_range=value_clip_range,
            max_grad_norm=max_grad_norm,
        )

    def improve(
        self,
        batch: Batch,
        generator: torch.Generator,
        *,
        learning_rate: float,
        clip_range: float,
        entropy_coef: float,
    ) -> dict[str, float]:
        """Take all gradient steps of one update.

        Args:
            batch: Rows with `obs, actions, log_probs, values, advantages, returns`.
            generator: Draws the minibatches.
            learning_rate: Adam's step size.
            clip_range: ε of the ratio clip.
            entropy_coef: Weight of the entropy bonus.

        Returns:
            Means of the `StepMetrics` over all gradient steps, by name.

        Raises:
            NonFiniteError: A loss or gradient is not finite; policy and optimizer are as before.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        undo = Undo.take(self._policy, self._optimizer)
        records: list[StepMetrics] = []
        for _ in range(self._num_epochs):
            first = len(records)
            for mini in batch.minibatches(self._minibatch_size, generator):
                if self._normalize_advantages:
                    mini = mini.replace(advantages=normalize(mini.advantages))
                records.append(self._step(mini, clip_range=clip_range, entropy_coef=entropy_coef))
            epoch = _means(records[first:])
            bad = [name for name, mean in epoch.items() if not math.isfinite(mean)]
            if bad:
                undo.apply(self._policy, self._optimizer)
                raise NonFiniteError(
                    f"{', '.join(bad)} became non-finite during an update; policy and optimizer "
                    "are as they were before it. Lower learning_rate or max_grad_norm, or look "
                    "for huge rewards and observations."
                )
            if self._target_kl is not None and epoch["approx_kl"] > self._target_kl:
                break
        return _means(records)

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by name."""
        return optimizer_tensors(self._optimizer)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned."""
        load_optimizer_tensors(self._optimizer, tensors)


def _means(records: list[StepMetrics]) -> dict[str, float]:
    """Mean of every metric, with one transfer to the host."""
    means = torch.stack([torch.stack(record) for record in records]).mean(0).tolist()
    return dict(zip(StepMetrics._fields, means, strict=True))
