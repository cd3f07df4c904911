"""`Learner`: several epochs of gradient steps over one batch, undone if they go wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ppo.errors import NonFiniteError
from ppo.learner.eager import METRICS, EagerGradient, Gradient, LossSettings
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.recorded import RecordedGradient
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
        self._value_coef = value_coef
        self._value_clip_range = value_clip_range
        self._max_grad_norm = max_grad_norm
        self._target_kl = target_kl
        self._normalize_advantages = normalize_advantages
        self._adam_eps = adam_eps
        self._build()

    def _build(self) -> None:
        self._optimizer = FlatAdam(parameter_groups(self._policy), self._adam_eps)
        self._trained = _trainable(self._policy)
        self._gradient = _fastest_gradient(self._policy, self._optimizer)

    def _take_up_changes(self) -> None:
        """Follow what the caller did to the policy since the last update.

        Parameters that were moved or re-allocated are bound again. If some were exchanged, frozen
        or released, optimizer and gradient are made anew; parameters that stay keep their moments.
        """
        if _trainable(self._policy) == self._trained:
            self._optimizer.bind()
            return
        before = self._optimizer
        self._build()
        self._optimizer.take_over(before)

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
            Means over all gradient steps of `METRICS` and `grad_norm`, by name.

        Raises:
            NonFiniteError: A loss or gradient is not finite; policy and optimizer are as before.
        """
        self._take_up_changes()
        self._gradient.begin()
        settings = LossSettings(
            clip_range,
            entropy_coef,
            self._value_coef,
            self._value_clip_range,
            self._normalize_advantages,
        )
        # Rows are constants, also if whoever collected them left their history on.
        batch = batch.detach()
        undo = _Undo(self._policy, self._optimizer)
        # What overflows is found by its metric; NumPy need not warn of it as well.
        with _threads(self._gradient.num_threads), np.errstate(all="ignore"):
            return self._run_epochs(batch, generator, settings, learning_rate, undo)

    def _run_epochs(
        self,
        batch: Batch,
        generator: torch.Generator,
        settings: LossSettings,
        learning_rate: float,
        undo: _Undo,
    ) -> dict[str, float]:
        records: list[list[float | Tensor]] = []
        for _ in range(self._num_epochs if len(batch) else 0):
            first = len(records)
            for mini in batch.minibatches(self._minibatch_size, generator):
                metrics = self._gradient(mini, settings)
                norm = self._optimizer.step(learning_rate, self._max_grad_norm)
                records.append([*metrics, norm])
            epoch = _means(records[first:])
            bad = [name for name, mean in epoch.items() if not math.isfinite(mean)]
            if bad:
                self._give_up(undo, bad)
            if self._target_kl is not None and epoch["approx_kl"] > self._target_kl:
                break
        if not self._optimizer.is_finite():  # before, the next epoch's loss would have told
            self._give_up(undo, ["parameters"])
        return _means(records)

    def _give_up(self, undo: _Undo, bad: list[str]) -> NoReturn:
        undo.apply()
        raise NonFiniteError(
            f"{', '.join(bad)} became non-finite during an update; policy and optimizer are as "
            "they were before it. Lower learning_rate or max_grad_norm, or look for huge rewards "
            "and observations."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by name."""
        return self._optimizer.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned."""
        self._optimizer.load_state_dict(tensors)


def _trainable(policy: nn.Module) -> list[tuple[int, bool]]:
    return [(id(parameter), parameter.requires_grad) for parameter in policy.parameters()]


def _fastest_gradient(policy: nn.Module, optimizer: FlatAdam) -> Gradient:
    """A recording where that pays, else autograd; both compute the same gradient."""
    if RecordedGradient.supports(optimizer):
        return RecordedGradient(policy, optimizer)
    return EagerGradient(policy, optimizer)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads inside one operation; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Undo:
    """Copies of all tensors of policy and optimizer, to go back to if an update fails."""

    def __init__(self, policy: nn.Module, optimizer: FlatAdam) -> None:
        self._policy, self._optimizer = policy, optimizer
        self._tensors = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        self._moments = optimizer.state_dict()

    def apply(self) -> None:
        self._policy.load_state_dict(self._tensors)
        self._optimizer.load_state_dict(self._moments)


def _means(records: list[list[float | Tensor]]) -> dict[str, float]:
    """Mean of every metric, with one transfer to the host; NaN without a gradient step."""
    names = (*METRICS, "grad_norm")
    if not records:
        return dict.fromkeys(names, math.nan)
    if isinstance(records[0][0], Tensor):
        rows = torch.stack([torch.stack([torch.as_tensor(x) for x in row]) for row in records])
        return dict(zip(names, rows.mean(0).tolist(), strict=True))
    means: list[float] = np.array(records, np.float64).mean(0).tolist()
    return dict(zip(names, means, strict=True))


def parameter_groups(policy: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The policy's own groups, and all parameters that none of them names as one more."""
    groups = getattr(policy, "parameter_groups", None)
    named: dict[str, list[nn.Parameter]] = groups() if groups else {}
    known = {id(parameter) for group in named.values() for parameter in group}
    rest = [parameter for parameter in policy.parameters() if id(parameter) not in known]
    return {**named, "policy": [*named.get("policy", []), *rest]} if rest else named
