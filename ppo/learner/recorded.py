"""The gradient of a small policy, recorded once and replayed without autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo.learner.eager import EagerGradient, LossSettings
from ppo.learner.fixed_rows import FixedRows
from ppo.learner.flat_optimizer import FlatOptimizer
from ppo.learner.gradient_recording import GradientRecording
from ppo.recording import Fingerprint, UnsupportedError
from ppo.rollout import Batch
from ppo.trees import leaves, map_tree

__all__ = ["RecordedGradient"]

# Beyond these, arithmetic outweighs what a recording saves.
_LARGEST_PARAMETER = 256 * 256
_MOST_ROWS_OF_SEQUENCES = 2**10
_MOST_RECORDINGS = 16
_MOST_PADDING = 2  # rows with those that mean nothing, for one of a minibatch

_REPLAYS_PER_COMPARISON = 1024


class RecordedGradient:
    """Records `evaluate` and its backward pass, once per size of minibatch, and replays them.

    A recording holds while the policy computes the same (see `Fingerprint`). It is compared with
    autograd when it is new, on every 1024th replay, and where an update begins with rows of which
    it says something else than the policy that collected them: what code of a user's reads may have
    changed where no fingerprint looks, such as a global. A policy that cannot be repeated (random
    numbers, branches on values, hooks) is left to autograd.

    Args:
        policy: Evaluated on minibatches.
        optimizer: Holds the gradients that are written.

    Attributes:
        closed: Nothing runs but code of this library and of torch's layers, which reads only what a
            fingerprint sees.
    """

    num_threads: int | None = 1
    takes_arrays = True

    def __init__(self, policy: nn.Module, optimizer: FlatOptimizer) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._eager = EagerGradient(policy, optimizer)
        self._recordings: dict[object, GradientRecording] = {}
        self._fingerprint: Fingerprint | None = None
        self._repeatable = False
        self.closed = False
        self._checked = False  # the recordings, in this update

    def __getstate__(self) -> dict[str, Any]:
        """Copies record anew: a recording is of tensors at their places in this process."""
        return vars(self) | {"_recordings": {}, "_fingerprint": None, "_repeatable": False}

    @staticmethod
    def supports(optimizer: FlatOptimizer) -> bool:
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
            self.closed = all(map(_is_closed, self._policy.modules()))
        self._checked = self.closed or not self._recordings

    def __call__(self, batch: Batch, settings: LossSettings) -> list[float]:
        """Write the gradient of one minibatch; returns the `METRICS`."""
        if not (self._repeatable and _worth_it(batch)):
            return self._by_autograd(batch, settings)
        batch = _of_arrays(batch)
        parts = FixedRows.of(batch)
        key = _key(parts, settings)
        if key not in self._recordings:
            metrics = self._by_autograd(batch, settings)
            if not self._record(key, parts[0], settings):
                self._recordings.clear()
                self._repeatable = False
                return metrics
        recording = self._recordings[key] = self._recordings.pop(key)  # the last to be dropped
        new = recording.replays < 2
        due = new or (recording.replays + 1) % _REPLAYS_PER_COMPARISON == 0
        # The first that was there before the update: no step was taken yet, or at worst a few.
        first = not self._checked and not new
        metrics = recording.replay(parts, batch, settings, keep=due or first)
        due = due or (first and not recording.is_of_collector(batch))
        self._checked = self._checked or first
        if due and not recording.agrees(_of_tensors(batch)):
            self._recordings.clear()
            self._repeatable = not new
            self._fingerprint = Fingerprint(self._policy)  # no second process has it
            return self._by_autograd(batch, settings)
        return metrics

    def split(
        self, networks: Sequence[Sequence[nn.Parameter]]
    ) -> tuple[list[int], list[int]] | None:
        """Networks that learn from the policy loss, and from the value loss; `half` may follow.

        None where one learns from both, where a side has none, or where nothing is recorded yet.
        """
        splits = [recording.split(networks) for recording in self.settled]
        if not splits or any(split != splits[0] for split in splits):
            return None
        return splits[0]

    @property
    def settled(self) -> list[GradientRecording]:
        """The recordings that are not new any more, in whose place `half` may be called."""
        return [recording for recording in self._recordings.values() if recording.replays > 2]

    @property
    def all_settled(self) -> bool:
        """True if none is new."""
        return len(self.settled) == len(self._recordings)

    def half(self, batch: Batch, settings: LossSettings, *, critic: bool) -> list[float]:
        """Write the gradients of one side of `split`; returns the `METRICS` that are its own.

        Raises:
            KeyError: There is no recording for this minibatch.
        """
        batch = _of_arrays(batch)
        parts = FixedRows.of(batch)
        recording = self._recordings[_key(parts, settings)]
        return recording.replay(parts, batch, settings, actor=not critic, critic=critic)

    def begins_well(self, batch: Batch, settings: LossSettings) -> bool:
        """Whether what is recorded holds for the first minibatch of an update.

        Without a comparison if it says of the rows what the policy said that collected them.
        """
        batch = _of_arrays(batch)
        parts = FixedRows.of(batch)
        recording = self._recordings.get(_key(parts, settings))
        if recording is None:
            return True
        recording.look(parts)
        if recording.is_of_collector(batch):
            return True
        replays = recording.replays
        recording.replay(parts, batch, settings, keep=True)
        recording.replays = replays
        return recording.agrees(_of_tensors(batch))

    def holds(self, num_replays: int) -> bool:
        """Whether autograd agrees with all recordings that are due to be compared that soon."""
        for recording in self._recordings.values():
            now = recording.replays
            if now // _REPLAYS_PER_COMPARISON == (now + num_replays) // _REPLAYS_PER_COMPARISON:
                continue
            recording.repeat()
            if not recording.agrees():
                return False
        return True

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the policy that the recordings are of; another object for another policy."""
        return self._fingerprint

    @property
    def untrained(self) -> list[Tensor]:
        """What the policy holds besides the parameters that are trained."""
        trained = {id(parameter) for parameter in self._optimizer.members}
        held = self._fingerprint.tensors if self._fingerprint is not None else []
        return [tensor for tensor in held if id(tensor) not in trained]

    @property
    def replays(self) -> list[int]:
        """How often each recording was replayed, which decides when it is compared."""
        return [recording.replays for recording in self._recordings.values()]

    @replays.setter
    def replays(self, numbers: Sequence[int]) -> None:
        for recording, number in zip(self._recordings.values(), numbers, strict=True):
            recording.replays = number

    def _record(self, key: object, rows: FixedRows, settings: LossSettings) -> bool:
        """Record minibatches like this one, after the policy was evaluated; False if it cannot."""
        if self._fingerprint is None or Fingerprint(self._policy) != self._fingerprint:
            return False  # it changes itself when it is evaluated
        if len(self._recordings) == _MOST_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        known = self._fingerprint.tensors
        try:
            self._recordings[key] = GradientRecording(self._policy, known, rows, settings)
        except UnsupportedError:
            return False
        return True

    def _by_autograd(self, batch: Batch, settings: LossSettings) -> list[float]:
        return [metric.item() for metric in self._eager(_of_tensors(batch), settings)]


def _of_arrays(batch: Batch) -> Batch:
    """A minibatch of arrays, if it is one of tensors."""
    some = leaves(next(iter(vars(batch).values())))[0]
    return next(batch.minibatches(len(batch), arrays=True)) if isinstance(some, Tensor) else batch


def _of_tensors(batch: Batch) -> Batch:
    """A minibatch of tensors in the same memory, if it is one of arrays."""
    fields = {name: map_tree(torch.as_tensor, tree) for name, tree in batch.fields.items()}
    return Batch(sequences=batch.sequences, **fields)


def _worth_it(batch: Batch) -> bool:
    """Whether overhead weighs more than arithmetic, and rows more than padding."""
    if batch.sequences is None:
        return True
    rows = math.prod(batch.sequences.extended_shape)
    return rows <= min(_MOST_ROWS_OF_SEQUENCES, _MOST_PADDING * len(batch))


def _key(parts: Sequence[FixedRows], settings: LossSettings) -> tuple[object, ...]:
    return parts[0].shape, settings.entropy_coef != 0.0


def _is_closed(module: nn.Module) -> bool:
    own = type(module).__module__.startswith(("ppo.", "torch.nn."))
    return own and vars(module).keys().isdisjoint(vars(type(module)))  # with no method of its own
