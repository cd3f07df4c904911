"""Acting for all environments in this process, without torch's cost per call.

A step of light environments takes less time than torch needs to choose their actions, nearly all
of it between its operations. `act` is therefore recorded, and replayed where it can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppo.recording import Fingerprint, Tape, UnsupportedError

__all__ = ["RecordedActing"]

# Beyond these, arithmetic outweighs what a recording saves.
_LARGEST_PARAMETER = 256 * 256
_LARGEST_BATCH = 2**16

_REPLAYS_PER_COMPARISON = 256


class RecordedActing:
    """Calls a policy's `act`, by a recording where that chooses the same.

    A recording holds while the policy computes the same (see `Fingerprint`), and is compared with
    the policy itself when it is new and on every 256th replay. Random numbers are drawn anew, from
    the generators they came from.

    Args:
        policy: Acts.
        device: Where it lives.
        generator: Passed to `act`, if any.
    """

    def __init__(
        self, policy: Any, device: torch.device, generator: torch.Generator | None
    ) -> None:
        self.policy = policy
        self._device = device
        self._arguments = {} if generator is None else {"generator": generator}
        self._fingerprint: Fingerprint | None = None
        self._recording: _Recording | None = None
        self._repeatable = False

    def begin(self) -> None:
        """Take note that a rollout begins: the policy may have changed since the last one."""
        if not isinstance(self.policy, nn.Module) or self._device.type != "cpu":
            return
        fingerprint = Fingerprint(self.policy)
        if fingerprint != self._fingerprint:
            self._fingerprint, self._recording = fingerprint, None
            sizes = [parameter.numel() for parameter in self.policy.parameters()]
            small = max(sizes, default=0) <= _LARGEST_PARAMETER
            self._repeatable = small and fingerprint.repeatable

    def __call__(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """Actions `[N, ...]` for observations `[N, ...]` and, if it takes any, noise `[N, k]`."""
        if not self._repeatable or obs.size > _LARGEST_BATCH:
            return self._by_policy(obs, noise)
        recording = self._recording
        if recording is None or recording.replays % _REPLAYS_PER_COMPARISON < 2:
            return self._compared(obs, noise)
        return recording.replay(obs, noise)

    def _by_policy(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        arguments: dict[str, Any] = dict(self._arguments)
        if noise is not None:
            arguments["noise"] = torch.from_numpy(noise.copy()).to(self._device)
        inputs = torch.from_numpy(obs.copy()).to(self._device)
        actions: np.ndarray = self.policy.act(inputs, **arguments).cpu().numpy()
        return actions

    def _compared(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """Replay if the policy itself chooses the same of the same numbers, or leave it to it."""
        states = _RandomStates(list(self._arguments.values()))
        start = states.get()
        wanted = self._by_policy(obs, noise)
        end = states.get()
        states.set(start)
        actions = self._replayed(obs, noise, states)
        if actions is not None and states.get() == end and _equal(actions, wanted):
            return actions
        self._repeatable, self._recording = False, None
        states.set(end)
        return wanted

    def _replayed(
        self, obs: np.ndarray, noise: np.ndarray | None, states: _RandomStates
    ) -> np.ndarray | None:
        """Actions by the recording, made first if there is none; None if there can be none."""
        if self._recording is None:
            assert self._fingerprint is not None
            known, start = self._fingerprint.tensors, states.get()
            try:
                self._recording = _Recording(self.policy, known, obs, noise, self._arguments)
            except UnsupportedError:
                return None
            states.set(start)
            if Fingerprint(self.policy) != self._fingerprint:
                return None  # it changes itself while it acts
        return self._recording.replay(obs, noise)


class _Recording:
    """A program that chooses actions for as many observations as it was recorded with."""

    def __init__(
        self,
        policy: Any,
        known: Sequence[Tensor],
        obs: np.ndarray,
        noise: np.ndarray | None,
        arguments: dict[str, Any],
    ) -> None:
        self.replays = 0
        inputs = [torch.from_numpy(array.copy()) for array in (obs, noise) if array is not None]
        self._inputs = [tensor.numpy() for tensor in inputs]
        if noise is not None:
            arguments = {**arguments, "noise": inputs[1]}
        tape = Tape([*known, *inputs], random=True)
        with tape.record():
            actions = policy.act(inputs[0], **arguments)
        if not tape.owns(actions):
            raise UnsupportedError("the actions were not computed by torch")
        (self._program,) = tape.programs()
        self._actions: np.ndarray = actions.numpy()

    def replay(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """Actions `[N, ...]`, valid until the next call."""
        self.replays += 1
        np.copyto(self._inputs[0], obs)
        if noise is not None:
            np.copyto(self._inputs[1], noise)
        self._program()
        return self._actions


class _RandomStates:
    """The states of every generator that `act` can reach without holding it."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = [torch.default_generator, *generators]

    def get(self) -> list[object]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002
        numpy["state"]["key"] = numpy["state"]["key"].tolist()
        ours = [generator.get_state().tolist() for generator in self._generators]
        return [random.getstate(), numpy, *ours]

    def set(self, states: Sequence[Any]) -> None:
        python, numpy, *ours = states
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in zip(self._generators, ours, strict=True):
            generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _equal(actions: np.ndarray, wanted: np.ndarray) -> bool:
    return actions.shape == wanted.shape and np.allclose(actions, wanted, rtol=1e-4, atol=1e-4)
