"""The critic's part of an update in a second process, on the processor that idles then.

With bodies of their own, actor and critic do not look at each other during an update. The child is
a fork of this process: it has the policy, the recordings and the optimizer, at the same addresses.
Parameters and moments lie in shared memory, so what it trains is trained here. It draws the same
minibatches from the same generator, and every number comes out as in one process, bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import warnings
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo.learner.eager import Gradient, LossSettings
from ppo.learner.fixed_rows import FixedRows
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.flat_optimizer import FlatOptimizer, in_shared_memory
from ppo.learner.recorded import RecordedGradient
from ppo.learner.settings import LearnerSettings
from ppo.rollout import Batch
from ppo.sequences import Sequences
from ppo.trees import leaves, map_tree

__all__ = ["CriticProcess"]

_FEWEST_PARTS = 8  # of all gradient steps of an update, that are worth the messages
_MOST_OTHERS = 2**16  # numbers of the policy that nobody trains
_PATIENCE = 5.0  # seconds
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

Record = tuple[list[float], list[float]]
"""Of one gradient step: the metrics of one side and the norms of its networks."""


class CriticProcess:
    """A forked process that trains the critic while this one trains the actor.

    It holds while the policy is the same (see `Fingerprint`) and batches have the same shapes.

    Args:
        gradient: With recordings for all minibatches of such a batch.
        optimizer: Over parameters in shared memory.
        settings: Of the learner.
        batch: One like those to come.
        sides: What `gradient.split` returned.
    """

    def __init__(
        self,
        gradient: RecordedGradient,
        optimizer: FlatAdam,
        settings: LearnerSettings,
        batch: Batch,
        sides: tuple[list[int], list[int]],
    ) -> None:
        self._gradient, self._optimizer, self._settings = gradient, optimizer, settings
        self._sides = sides
        self._fingerprint = gradient.fingerprint
        self._known = _shapes_known(gradient)
        self._rows = Batch(**map_tree(in_shared_memory, _critics_fields(batch)))
        self._sequences = None if batch.sequences is None else _Room(batch.sequences, len(batch))
        self._others = gradient.untrained
        self._copies = [in_shared_memory(tensor) for tensor in self._others]
        context = multiprocessing.get_context("fork")
        self._conn, theirs = context.Pipe()
        with_thread = threading.current_thread() is threading.main_thread()
        self._process = context.Process(
            target=self._serve, args=(theirs, with_thread), name="ppo-critic", daemon=True
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            self._process.start()
        theirs.close()
        self._finalizer = multiprocessing.util.Finalize(
            self, _end, (self._conn, self._process), exitpriority=100
        )

    @staticmethod
    def possible(gradient: object, optimizer: object, settings: LearnerSettings) -> bool:
        """False where results could differ, or where this process may have no child."""
        return (
            isinstance(gradient, RecordedGradient)
            and isinstance(optimizer, FlatAdam)
            and len(optimizer.names) > 1
            and settings.target_kl is None
            and settings.adaptive_kl is None
            and _may_fork()
        )

    @classmethod
    def where_it_pays(
        cls,
        gradient: Gradient,
        optimizer: FlatOptimizer,
        settings: LearnerSettings,
        batch: Batch,
    ) -> CriticProcess | None:
        """Start one if batches like this can be trained on by two, and it is worth it."""
        if not (isinstance(gradient, RecordedGradient) and isinstance(optimizer, FlatAdam)):
            return None
        rows = [leaf for tree in batch.fields.values() for leaf in leaves(tree)]
        rows_of_step = min(settings.minibatch_size, len(batch))
        if _num_steps(batch, settings) * FixedRows.num_parts(rows_of_step) < _FEWEST_PARTS:
            return None
        if batch.sequences is None and not gradient.all_settled:
            return None
        if not all(isinstance(leaf, Tensor) for leaf in rows):
            return None
        sides = gradient.split(optimizer.networks)
        if sides is None or sum(tensor.numel() for tensor in gradient.untrained) > _MOST_OTHERS:
            return None
        return cls(gradient, optimizer, settings, batch, sides)

    def fits(self, gradient: object, batch: Batch) -> bool:
        """True if the child still knows the policy, and this batch has its place."""
        same = gradient is self._gradient and self._gradient.fingerprint is self._fingerprint
        kinds = [_kinds(fields) for fields in (_critics_fields(batch), self._rows.fields)]
        if batch.sequences is not None and self._known != _shapes_known(self._gradient):
            return False
        return same and kinds[0] == kinds[1]

    def knows(self, batch: Batch, generator: torch.Generator) -> bool:
        """True if minibatches of sequences in all shapes of the next update were recorded."""
        if batch.sequences is None:
            return True  # they have the sizes they always have
        settings, twin = self._settings, torch.Generator()
        twin.set_state(generator.get_state())
        return all(
            sequences is not None and sequences.extended_shape in self._known
            for _ in range(settings.num_epochs)
            for sequences in batch.minibatch_sequences(settings.minibatch_size, twin)
        )

    def improve(
        self,
        batch: Batch,
        generator: torch.Generator,
        loss: LossSettings,
        rates: float | list[float],
    ) -> list[list[float]] | None:
        """Take all gradient steps of an update; returns `METRICS` and gradient norm of each.

        None if it failed, in this process or in the other. Policy, optimizer and generator have
        then to be put back, and this object to be closed.
        """
        # Whatever changed in Python would be changed here only.
        if not self._gradient.holds(_num_steps(batch, self._settings)):
            return None
        theirs = leaves(tuple(_critics_fields(batch).values()))
        ours = leaves(tuple(self._rows.fields.values()))
        for shared, tensor in zip([*ours, *self._copies], [*theirs, *self._others], strict=True):
            shared.copy_(tensor)
        if self._sequences is not None and batch.sequences is not None:
            self._sequences.put(batch.sequences)
        state = generator.get_state().numpy().tobytes()
        try:
            self._conn.send((_LIBC.sched_getcpu(), state, self._optimizer.step_counts, loss, rates))
            start = time.monotonic()
            fields = {k: tree for k, tree in batch.fields.items() if k not in _CRITICS}
            rows = Batch(sequences=batch.sequences, **fields)
            mine = self._train(rows, generator, loss, rates, critic=False)
            if not self._conn.poll(_PATIENCE + 10.0 * (time.monotonic() - start)):
                raise TimeoutError("no answer")
            other: list[Record] | None = self._conn.recv()
        except (EOFError, OSError) as error:
            warnings.warn(
                f"the process that trained the critic failed ({error!r}); from now on it is "
                "trained in this one",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        except KeyError:
            return None
        return None if other is None else self._merged(mine, other)

    def _merged(self, mine: list[Record], other: list[Record]) -> list[list[float]]:
        of_each = [*zip(*(norms for _, norms in mine), strict=True)]
        of_each += zip(*(norms for _, norms in other), strict=True)
        order = np.argsort([*self._sides[0], *self._sides[1]])
        norms_of_all = map(math.hypot, *(of_each[index] for index in order))
        return [
            [policy_loss, value_loss, *rest, norm]
            for ((policy_loss, *rest), _), ((value_loss,), _), norm in zip(
                mine, other, norms_of_all, strict=True
            )
        ]

    def _train(
        self,
        batch: Batch,
        generator: torch.Generator,
        loss: LossSettings,
        rates: float | list[float],
        *,
        critic: bool,
    ) -> list[Record]:
        settings, networks = self._settings, self._sides[critic]
        records = []
        for _ in range(settings.num_epochs):
            for mini in batch.minibatches(settings.minibatch_size, generator, arrays=True):
                metrics = self._gradient.half(mini, loss, critic=critic)
                norms = self._optimizer.step_some(networks, rates, settings.max_grad_norm)
                records.append((metrics, norms))
        return records

    def _serve(self, conn: Connection, ended_by_parent: bool) -> None:
        """What the child does until the parent closes its end."""
        self._conn.close()  # or the child would not see that the parent is gone
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ended_by_parent:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.set_num_threads(1)
        generator = torch.Generator()
        with contextlib.suppress(EOFError, OSError), torch.no_grad(), np.errstate(all="ignore"):
            while True:
                processor, state, step_counts, loss, rates = conn.recv()
                _leave(processor)
                generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
                self._optimizer.step_counts = step_counts
                for tensor, shared in zip(self._others, self._copies, strict=True):
                    tensor.copy_(shared)
                sequences = None if self._sequences is None else self._sequences.get()
                batch = Batch(sequences=sequences, **self._rows.fields)
                records = None
                with contextlib.suppress(KeyError):
                    records = self._train(batch, generator, loss, rates, critic=True)
                conn.send(records)

    def close(self) -> None:
        """End the child, at once."""
        self._finalizer()


class _Room:
    """A place in shared memory for the sequences of any batch of so many rows."""

    def __init__(self, sequences: Sequences, num_rows: int) -> None:
        empty = torch.zeros(num_rows, dtype=torch.int64)
        self._lengths = in_shared_memory(empty)  # 0 behind the last one
        self._states = in_shared_memory(
            sequences.states.new_zeros(num_rows, sequences.states.shape[1])
        )

    def put(self, sequences: Sequences) -> None:
        count = len(sequences)
        self._lengths[:count] = torch.tensor(sequences.lengths)
        self._lengths[count:] = 0
        self._states[:count] = sequences.states

    def get(self) -> Sequences:
        count = int(self._lengths.count_nonzero())
        return Sequences(tuple(self._lengths[:count].tolist()), self._states[:count])


def _shapes_known(gradient: RecordedGradient) -> set[object]:
    return {recording.shape for recording in gradient.settled}


_CRITICS = ("returns", "values")
_ACTORS = ("log_probs", "advantages")


def _critics_fields(batch: Batch) -> dict[str, Any]:
    return {name: tree for name, tree in batch.fields.items() if name not in _ACTORS}


def _num_steps(batch: Batch, settings: LearnerSettings) -> int:
    return settings.num_epochs * math.ceil(len(batch) / settings.minibatch_size)


def _kinds(fields: dict[str, Any]) -> list[object]:
    named = [(name, leaf) for name, tree in fields.items() for leaf in leaves(tree)]
    return [(name, getattr(leaf, "dtype", None), leaf.shape) for name, leaf in named]


def _may_fork() -> bool:
    """A second processor, and nothing that speaks against a child of this process."""
    return (
        sys.platform == "linux"
        and len(os.sched_getaffinity(0)) > 1
        and not multiprocessing.current_process().daemon
        and threading.current_thread() is threading.main_thread()
    )


def _leave(processor: int) -> None:
    """Go on elsewhere: the kernel wakes a reader where the writer is, who works on there."""
    everywhere = os.sched_getaffinity(0)
    if others := everywhere - {processor}:
        os.sched_setaffinity(0, others)
        os.sched_setaffinity(0, everywhere)


def _end(conn: Connection, process: BaseProcess) -> None:
    """It holds nothing that would have to be put in order, so it is not asked."""
    conn.close()
    process.kill()
    process.join(1.0)
