"""The gradient of a small policy, recorded once and replayed without autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ppo.learner.eager import EagerGradient, LossSettings
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.numpy_loss import normalized, policy_loss, value_loss
from ppo.policies.protocol import Evaluation
from ppo.recording import Fingerprint, Program, Tape, UnsupportedError
from ppo.rollout import Batch

__all__ = ["RecordedGradient"]

# Beyond these, arithmetic outweighs what a recording saves.
_LARGEST_PARAMETER = 256 * 256
_MOST_ROWS = 4096
_MOST_RECORDINGS = 16

_REPLAYS_PER_COMPARISON = 1024
_TOLERANCE = 1e-3  # of a gradient's norm


class RecordedGradient:
    """Records `evaluate` and its backward pass, once per size of minibatch, and replays them.

    A recording holds while the policy computes the same (see `Fingerprint`), and is compared with
    autograd when it is new and on every 1024th replay. A policy that cannot be repeated (random
    numbers, branches on values, hooks) is left to autograd.

    Args:
        policy: Evaluated on minibatches.
        optimizer: Holds the gradients that are written.
    """

    num_threads: int | None = 1

    def __init__(self, policy: nn.Module, optimizer: FlatAdam) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._eager = EagerGradient(policy, optimizer)
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._fingerprint: Fingerprint | None = None
        self._repeatable = False

    @staticmethod
    def supports(optimizer: FlatAdam) -> bool:
        """True for parameters on the CPU that are small enough."""
        return all(
            p.device.type == "cpu"
            and p.dtype in (torch.float32, torch.float64)
            and p.numel() <= _LARGEST_PARAMETER
            for p in optimizer.members
        )

    def begin(self) -> None:
        """Drop the recordings if the policy is not as it was at the last update."""
        fingerprint = Fingerprint(self._policy)
        if fingerprint != self._fingerprint:
            self._recordings.clear()
            self._fingerprint, self._repeatable = fingerprint, fingerprint.repeatable

    def __call__(self, batch: Batch, settings: LossSettings) -> list[float]:
        """Write the gradient of one minibatch; returns the `METRICS`."""
        if not self._repeatable or len(batch) > _MOST_ROWS:
            return self._by_autograd(batch, settings)
        obs, actions = batch.obs, batch.actions
        key = obs.shape, obs.dtype, actions.shape, actions.dtype, settings.entropy_coef != 0.0
        try:
            if key not in self._recordings:
                if len(self._recordings) == _MOST_RECORDINGS:
                    del self._recordings[next(iter(self._recordings))]
                self._recordings[key] = self._record(batch, settings)
                if Fingerprint(self._policy) != self._fingerprint:
                    raise UnsupportedError("the policy changes itself when it is evaluated")
        except UnsupportedError:
            self._recordings.clear()
            self._repeatable = False
            return self._by_autograd(batch, settings)
        recording = self._recordings[key]
        metrics = recording.replay(batch, settings)
        if recording.replays <= 2 or recording.replays % _REPLAYS_PER_COMPARISON == 0:
            return self._compare(recording, metrics, batch, settings)
        return metrics

    def _record(self, batch: Batch, settings: LossSettings) -> _Recording:
        assert self._fingerprint is not None
        return _Recording(self._policy, self._fingerprint.tensors, batch, settings)

    def _by_autograd(self, batch: Batch, settings: LossSettings) -> list[float]:
        return [metric.item() for metric in self._eager(batch, settings)]

    def _compare(
        self,
        recording: _Recording,
        metrics: list[float],
        batch: Batch,
        settings: LossSettings,
    ) -> list[float]:
        """Keep what was replayed if autograd agrees; else take what autograd says."""
        replayed = [gradient.clone() for gradient in self._optimizer.gradients]
        true_metrics = self._by_autograd(batch, settings)
        for ours, truth in zip(replayed, self._optimizer.gradients, strict=True):
            norm = truth.norm()
            if norm.isfinite() and not (ours - truth).norm() <= _TOLERANCE * norm + 1e-7:
                self._recordings.clear()
                self._repeatable = recording.replays > 2
                return true_metrics
        for ours, gradient in zip(replayed, self._optimizer.gradients, strict=True):
            gradient.copy_(ours)
        return metrics


class _Recording:
    """Forward and backward program for minibatches of one size.

    Raises:
        UnsupportedError: The policy cannot be repeated.
    """

    def __init__(
        self,
        policy: nn.Module,
        known: Sequence[Tensor],
        batch: Batch,
        settings: LossSettings,
    ) -> None:
        self.replays = 0
        obs, actions = batch.obs.clone(), batch.actions.clone()
        self._obs, self._actions = obs.numpy(), actions.numpy()
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        tape = Tape([*known, obs, actions])
        with torch.enable_grad():
            with tape.record():
                new = Evaluation(*policy.evaluate(obs, actions))  # type: ignore[operator]
            for name, output in new._asdict().items():
                if not _is_column(output, len(batch)) or output.dtype != new.values.dtype:
                    raise UnsupportedError(f"{name} is no vector of numbers, one for each row")
            slopes = {name: torch.zeros_like(output) for name, output in new._asdict().items()}
            tape.know(slopes.values())
            pulling = [name for name in slopes if getattr(new, name).requires_grad]
            if settings.entropy_coef == 0.0 and "entropy" in pulling:
                pulling.remove("entropy")
            with tape.record():
                gradients = torch.autograd.grad(
                    [getattr(new, name) for name in pulling],
                    trained,
                    [slopes[name] for name in pulling],
                    allow_unused=True,
                )
        self._forward, self._backward, self._copies = _programs(tape, trained, gradients)
        self._log_probs, self._entropy, self._values = (x.detach().numpy() for x in new)
        self._d_log_probs, self._d_entropy, self._d_values = (x.numpy() for x in slopes.values())

    def replay(self, batch: Batch, settings: LossSettings) -> list[float]:
        """Write the gradient of a minibatch; returns the `METRICS`."""
        self.replays += 1
        np.copyto(self._obs, batch.obs.numpy())
        np.copyto(self._actions, batch.actions.numpy())
        self._forward()
        advantages = batch.advantages.numpy()
        if settings.normalize_advantages:
            advantages = normalized(advantages)
        loss, kl, clip_fraction = policy_loss(
            self._log_probs,
            batch.log_probs.numpy(),
            advantages,
            settings.clip_range,
            self._d_log_probs,
        )
        error = value_loss(self._values, batch, settings, self._d_values)
        self._d_entropy.fill(-settings.entropy_coef / len(advantages))
        entropy = float(np.add.reduce(self._entropy)) / len(advantages)
        self._backward()
        for gradient, found in self._copies:
            np.copyto(gradient, found)
        return [loss, error, entropy, kl, clip_fraction]


def _is_column(output: object, rows: int) -> bool:
    kinds = (torch.float32, torch.float64)
    return isinstance(output, Tensor) and output.shape == (rows,) and output.dtype in kinds


def _programs(
    tape: Tape, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> tuple[Program, Program, list[tuple[np.ndarray, np.ndarray]]]:
    """The two programs, and the gradients that have to be copied to their parameters."""
    homes, copies = [], []
    # The gradients of two parameters may be one tensor: of a and b in a + b, for example.
    places = Counter(g.untyped_storage().data_ptr() for g in gradients if g is not None)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        found = torch.zeros_like(parameter) if gradient is None else gradient
        if tape.can_move(found) and places[found.untyped_storage().data_ptr()] == 1:
            homes.append((found, parameter.grad))
        else:
            copies.append((parameter.grad.numpy(), found.detach().numpy()))
    forward, backward = tape.programs(homes)
    return forward, backward, copies
