"""A function of a policy, called by a recording wherever that gives the same."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo._threads import threads
from ppo.recording.fingerprint import Fingerprint
from ppo.recording.tape import Tape, UnsupportedError

__all__ = ["RecordedCall"]

# Beyond these, arithmetic outweighs what a recording saves.
_LARGEST_PARAMETER = 256 * 256
_LARGEST_INPUT = 2**16

_FEW = 2**18  # numbers; with fewer, torch's threads wait for one another more than they work

_REPLAYS_PER_COMPARISON = 256


class RecordedCall:
    """Calls a function on arrays, by a recording where that gives the same.

    A recording holds while the policy computes the same (see `Fingerprint`), and is compared with
    the function itself when it is new and on every 256th replay. Random numbers are drawn anew,
    from the generators they came from. No replay makes NumPy warn of a number: torch would not.

    Args:
        policy: What the function depends on besides its arguments.
        function: From tensors to a tensor, or to a tuple of tensors.
        device: Where the policy lives.
        generators: What the function may draw random numbers from; None: it must not draw any.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> call = RecordedCall(layer, layer.forward, torch.device("cpu"))
        >>> call.begin(Fingerprint(layer))
        >>> with torch.no_grad():
        ...     (outputs,) = call(np.ones((3, 2), np.float32))
        >>> outputs.shape
        (3, 1)
    """

    def __init__(
        self,
        policy: Any,
        function: Callable[..., Any],
        device: torch.device,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        self.policy = policy
        self._function = function
        self._device = device
        self._random = generators is not None
        self._states = _RandomStates(generators or ())
        self._fingerprint: Fingerprint | None = None
        self._recording: _Recording | None = None
        self._repeatable = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies record anew: a recording is of tensors at their places in this process."""
        return vars(self) | {"_recording": None, "_fingerprint": None, "_repeatable": False}

    def begin(self, fingerprint: Fingerprint | None) -> None:
        """Take note of how the policy is now; None: it cannot be told, so do not record."""
        if fingerprint is None or self._device.type != "cpu":
            self._repeatable = False
        elif fingerprint != self._fingerprint:
            self._fingerprint, self._recording = fingerprint, None
            sizes = [tensor.numel() for tensor in fingerprint.tensors]
            small = max(sizes, default=0) <= _LARGEST_PARAMETER
            self._repeatable = small and fingerprint.repeatable

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The function's results, valid until the next call."""
        if not self._repeatable or inputs[0].size > _LARGEST_INPUT:
            return self.plainly(*inputs)
        recording = self._recording
        if recording is None or not recording.fits(inputs):
            self._recording = None
            return self._compared(inputs)
        if recording.replays == 1 or recording.replays % _REPLAYS_PER_COMPARISON == 0:
            return self._compared(inputs)
        return recording.replay(inputs)

    def plainly(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The function's results, by the function."""
        tensors = [torch.from_numpy(array.copy()).to(self._device) for array in inputs]
        few = sum(array.size for array in inputs) <= _FEW
        with threads(1 if few else None):
            return [result.cpu().numpy() for result in _as_tuple(self._function(*tensors))]

    def _compared(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Replay if the function gives the same with the same numbers, or leave it to it."""
        states = self._states
        start = states.get()
        wanted = self.plainly(*inputs)
        end = states.get()
        if Fingerprint(self.policy) == self._fingerprint:  # else it changes itself when called
            states.set(start)
            if self._recording is None:
                self._recording = self._record(inputs)
                states.set(start)
            results = None if self._recording is None else self._recording.replay(inputs)
            if results is not None and states.get() == end and all(map(_equal, results, wanted)):
                return results
            states.set(end)
        self._repeatable, self._recording = False, None
        return wanted

    @np.errstate(all="ignore")
    def _record(self, inputs: Sequence[np.ndarray]) -> _Recording | None:
        assert self._fingerprint is not None
        try:
            return _Recording(self._function, inputs, self._fingerprint.tensors, self._random)
        except UnsupportedError:
            return None


class _Recording:
    """A program for inputs of the shapes it was recorded with."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[np.ndarray],
        known: Sequence[Tensor],
        random: bool,
    ) -> None:
        self.replays = 0
        tensors = [torch.from_numpy(array.copy()) for array in inputs]
        self._inputs = [tensor.numpy() for tensor in tensors]
        tape = Tape([*known, *tensors], random=random)
        with tape.record():
            results = _as_tuple(function(*tensors))
        if not all(tape.owns(result) for result in results):
            raise UnsupportedError("a result was not computed by torch")
        (self._program,) = tape.programs()
        self._results = [result.detach().numpy() for result in results]

    def fits(self, inputs: Sequence[np.ndarray]) -> bool:
        """True if the inputs have the shapes and types of the recorded ones."""
        return all(
            ours.shape == theirs.shape and ours.dtype == theirs.dtype
            for ours, theirs in zip(self._inputs, inputs, strict=True)
        )

    @np.errstate(all="ignore")
    def replay(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Results for these inputs, valid until the next call."""
        self.replays += 1
        for ours, theirs in zip(self._inputs, inputs, strict=True):
            np.copyto(ours, theirs)
        self._program()
        return self._results


class _RandomStates:
    """The states of every generator that a function can reach without holding it."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = [torch.default_generator, *generators]

    def get(self) -> list[object]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        numpy["state"]["key"] = numpy["state"]["key"].tolist()
        ours = [generator.get_state().numpy().tobytes() for generator in self._generators]
        return [random.getstate(), numpy, *ours]

    def set(self, states: Sequence[Any]) -> None:
        """Put back what has moved; a generator the function never drew from is not written to."""
        writers = [random.setstate, np.random.set_state]
        writers += [functools.partial(_set_state, generator) for generator in self._generators]
        for write, now, wanted in zip(writers, self.get(), states, strict=True):
            if now != wanted:
                write(wanted)


def _set_state(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


@np.errstate(all="ignore")
def _equal(results: np.ndarray, wanted: np.ndarray) -> bool:
    return results.shape == wanted.shape and np.allclose(
        results, wanted, rtol=1e-4, atol=1e-4, equal_nan=True
    )
