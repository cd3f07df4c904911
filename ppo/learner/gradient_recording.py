"""One recording of a policy's gradient: its two programs, and the loss between them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ppo.learner.eager import LossSettings
from ppo.learner.fixed_rows import FixedRows, inputs_of
from ppo.learner.numpy_loss import normalized, policy_loss, share, value_loss
from ppo.policies.protocol import Evaluation, Evaluator
from ppo.recording import Program, Tape, UnsupportedError
from ppo.rollout import Batch

__all__ = ["GradientRecording"]

_TOLERANCE = 1e-3


class GradientRecording:
    """Forward and backward program for rows of one shape.

    Raises:
        UnsupportedError: The policy cannot be repeated.
    """

    def __init__(
        self,
        policy: nn.Module,
        known: Sequence[Tensor],
        rows: FixedRows,
        settings: LossSettings,
    ) -> None:
        self.replays = 0
        self.shape = None if rows.sequences is None else rows.sequences.shape
        self._evaluator = Evaluator(policy)
        self._rows = rows.copy()
        inputs = inputs_of(self._rows)
        self._trained = [p for p in policy.parameters() if p.requires_grad]
        tape = Tape([*known, *inputs])
        with torch.enable_grad():
            with tape.record():
                new = self._evaluate(self._rows)
            for name, output in new._asdict().items():
                if not _is_column(output, len(rows)) or output.dtype != new.values.dtype:
                    raise UnsupportedError(f"{name} is no vector of numbers, one for each row")
            self._pulling = [output.requires_grad for output in new]
            self._pulling[1] &= settings.entropy_coef != 0.0
            self._slopes = [torch.zeros_like(output) for output in new]
            tape.know(self._slopes)
            with tape.record():
                gradients = self._differentiate(new, self._slopes)
        self._tape, self._outputs, self._gradients = tape, new, gradients
        # By what they are for: the actor, the critic.
        self._programs = {(True, True): _programs(tape, self._trained, gradients, new)}
        self._arrays = [tensor.numpy() for tensor in inputs]
        self._log_probs, self._entropy, self._values = (x.detach().numpy() for x in new)
        self._d_log_probs, self._d_entropy, self._d_values = (x.numpy() for x in self._slopes)
        self._columns = [x.detach().numpy() for x in (*new, *self._slopes)]
        self._kept: list[list[np.ndarray]] = []  # of each part of the last minibatch

    def _evaluate(self, rows: Batch) -> Evaluation:
        return self._evaluator(rows.obs, rows.actions, rows.context)

    def _differentiate(self, new: Evaluation, slopes: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of the outputs, weighted with the slopes of the loss."""
        pulling = itertools.compress(new, self._pulling)
        loss = _Sloped.apply([*itertools.compress(slopes, self._pulling)], *pulling)  # type: ignore[no-untyped-call]
        return torch.autograd.grad(loss, self._trained, allow_unused=True)

    def split(
        self, networks: Sequence[Sequence[nn.Parameter]]
    ) -> tuple[list[int], list[int]] | None:
        """See `RecordedGradient.split`."""
        found = {id(p): g for p, g in zip(self._trained, self._gradients, strict=True)}
        sides: tuple[list[int], list[int]] = [], []
        for index, members in enumerate(networks):
            known = [g for p in members if (g := found.get(id(p))) is not None]
            sources = [self._tape.depends(known, slope) for slope in self._slopes]
            if sources[2] and (sources[0] or sources[1]):
                return None
            sides[sources[2]].append(index)
        if not (sides[0] and sides[1]):
            return None
        for critic in (False, True):
            own = {id(p) for index in sides[critic] for p in networks[index]}
            trained = [p for p in self._trained if id(p) in own]
            gradients = [found[id(p)] for p in trained]
            outputs = self._outputs[2:] if critic else self._outputs[:2]
            programs = _programs(self._tape, trained, gradients, outputs)
            self._programs[not critic, critic] = programs
        return sides

    def is_of_collector(self, batch: Batch) -> bool:
        """Whether log-probabilities and values are those that a minibatch was collected with.

        Before the first step of an update they are, but for rounding, if the policy is the same.

        Args:
            batch: The minibatch, of arrays, that was looked at or replayed last, and kept.
        """
        columns = zip(*self._kept, strict=True)
        log_probs, _, values, *_ = (np.concatenate(parts) for parts in columns)
        return _close(log_probs, batch.log_probs) and _close(values, batch.values)

    def agrees(self, batch: Batch | None = None) -> bool:
        """Whether autograd finds the same for the minibatch that was replayed last.

        With the slopes of the loss given: on an edge of the clip, rounding decides a row's slope.

        Args:
            batch: That minibatch, of tensors, whose replay was to `keep` it; None: look at what was
                repeated.
        """
        if batch is None:
            columns = self._columns
        else:
            columns = [np.concatenate(parts) for parts in zip(*self._kept, strict=True)]
        replayed, slopes = columns[:3], [torch.from_numpy(column) for column in columns[3:]]
        with torch.enable_grad():
            new = self._evaluate(self._rows if batch is None else batch)
            gradients = self._differentiate(new, slopes)
        for ours, output in zip(replayed, new, strict=True):
            truth = output.detach().numpy()
            if not np.allclose(ours, truth, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
                return False
        floor = 0.1 * _TOLERANCE * sum(float(slope.abs().sum()) for slope in slopes)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            assert parameter.grad is not None
            norm = 0.0 if gradient is None else float(gradient.norm())
            difference = parameter.grad if gradient is None else parameter.grad - gradient
            if math.isfinite(norm) and not difference.norm() <= _TOLERANCE * norm + floor:
                return False
        return True

    def replay(
        self,
        parts: Sequence[FixedRows],
        batch: Batch,
        settings: LossSettings,
        *,
        actor: bool = True,
        critic: bool = True,
        keep: bool = False,
    ) -> list[float]:
        """Write the gradient of a minibatch with these rows; returns the `METRICS`.

        Both are sums over the parts. (What is normalised is normalised over the minibatch.)

        Args:
            parts: Rows of the recorded shape.
            batch: The minibatch, of arrays.
            settings: Of its loss.
            actor: Do the actor's side of `split`.
            critic: Do the critic's.
            keep: Keep what `agrees` and `is_of_collector` want to see of the whole minibatch.
        """
        programs = self._programs[actor, critic]
        self.replays += 1
        self._kept = []
        advantages = _advantages(batch, settings) if actor else None

        def run(part: FixedRows) -> list[float]:
            self._begin(programs, part)
            metrics = []
            if advantages is not None:
                metrics += self._policy_loss(part, batch, advantages, settings)
            if critic:
                metrics.insert(1, self._value_loss(part, batch, settings))
            programs.finish()
            if keep:
                self._keep(part)
            return metrics

        metrics = run(parts[0])
        if len(parts) > 1:
            sums = [gradient.copy() for gradient in programs.gradients]
            for part in parts[1:]:
                metrics = [one + more for one, more in zip(metrics, run(part), strict=True)]
                for total, gradient in zip(sums, programs.gradients, strict=True):
                    total += gradient
            for total, gradient in zip(sums, programs.gradients, strict=True):
                np.copyto(gradient, total)
        return metrics

    def look(self, parts: Sequence[FixedRows]) -> None:
        """Evaluate a minibatch with these rows for `is_of_collector`; there is no gradient."""
        self._kept = []
        for part in parts:
            self._begin(self._programs[True, True], part)
            self._keep(part)

    def repeat(self) -> None:
        """Compute once more what the rows that are held gave."""
        self._programs[True, True].forward()
        self._programs[True, True].finish()

    def _begin(self, programs: _Programs, part: FixedRows) -> None:
        for ours, theirs in zip(self._arrays, part.arrays, strict=True):
            np.copyto(ours, theirs)
        programs.forward()

    def _keep(self, part: FixedRows) -> None:
        self._kept.append([column[part.places].copy() for column in self._columns])

    def _policy_loss(
        self, part: FixedRows, batch: Batch, advantages: np.ndarray, settings: LossSettings
    ) -> list[float]:
        """Write the slopes of policy loss and entropy; returns the metrics without the critic's."""
        places, counted, num_rows = part.places, part.counted, len(advantages)
        old = batch.log_probs[counted]
        loss, kl, clip_fraction, slopes = policy_loss(
            self._log_probs[places], old, advantages[counted], settings, num_rows
        )
        _pull(self._d_log_probs, slopes, places)
        if self._pulling[1]:
            _pull(self._d_entropy, -settings.entropy_coef / num_rows, places)
        return [loss, share(self._entropy[places], num_rows), kl, clip_fraction]

    def _value_loss(self, part: FixedRows, batch: Batch, settings: LossSettings) -> float:
        """Write the slopes of the value loss; returns it."""
        places, counted, num_rows = part.places, part.counted, len(batch.returns)
        returns = batch.returns[counted]
        old = None if settings.value_clip_range is None else batch.values[counted]
        loss, slopes = value_loss(self._values[places], returns, old, settings, num_rows)
        _pull(self._d_values, slopes, places)
        return loss


def _advantages(batch: Batch, settings: LossSettings) -> np.ndarray:
    advantages: np.ndarray = batch.advantages
    return normalized(advantages) if settings.normalize_advantages else advantages


def _pull(slopes: np.ndarray, wanted: np.ndarray | float, places: np.ndarray | slice) -> None:
    """Give the rows that count their slopes; others have none."""
    slopes.fill(0.0)
    slopes[places] = wanted


def _close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool((np.abs(ours - theirs) <= _TOLERANCE + _TOLERANCE * np.abs(theirs)).all())


class _Sloped(torch.autograd.Function):
    """A loss of which nothing is known but its slopes.

    `torch.autograd.grad` takes them as `grad_outputs`, too, but then imports sympy, for a quarter
    of a second.
    """

    @staticmethod
    def forward(ctx: Any, slopes: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.slopes = slopes
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.slopes


def _is_column(output: object, rows: int) -> bool:
    kinds = (torch.float32, torch.float64)
    return isinstance(output, Tensor) and output.shape == (rows,) and output.dtype in kinds


class _Programs(NamedTuple):
    """What computes the gradients of some parameters."""

    forward: Program
    backward: Program
    gradients: list[np.ndarray]  # of the parameters
    copies: list[tuple[np.ndarray, np.ndarray]]  # to one of them, from where it is found

    def finish(self) -> None:
        """From the slopes of the loss to the gradients."""
        self.backward()
        for gradient, found in self.copies:
            np.copyto(gradient, found)


def _programs(
    tape: Tape,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
) -> _Programs:
    """The two programs for these outputs and gradients."""
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
    wanted = [*outputs, *(g for g in gradients if g is not None)]
    forward, backward = tape.programs(homes, wanted)
    arrays = [p.grad.numpy() for p in parameters if p.grad is not None]
    return _Programs(forward, backward, arrays, copies)
