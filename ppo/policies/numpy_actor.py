"""Small actors in NumPy, which environments' processes run by themselves.

Acting on a handful of observations is all call overhead: NumPy spends about a third of torch's.
Every part is made for one number of rows, with memory of its own for results: BLAS then takes the
same path bit for bit, whoever calls. What is added to each row is there once for every row, as
spreading it takes longer than adding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = [
    "GRU",
    "LSTM",
    "Branch",
    "Choice",
    "Layers",
    "MLPActor",
    "MemoryActor",
    "Normalization",
]

# Python's numbers would be converted in every call.
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)

Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From features `[G, F]` and what was remembered `[G, K]` to outputs `[G, H]`; the third argument
`[G, K]` takes what is remembered then."""


def _spread(values: np.ndarray, rows: int) -> np.ndarray:
    """The values `[..., k]` once for every row, `[..., rows, k]`."""
    return np.repeat(values[..., None, :], rows, axis=-2)


class Normalization(NamedTuple):
    """Observations as float32 vectors `[k]`: shifted, scaled and clipped, or as they are."""

    shift: np.ndarray | None
    scale: np.ndarray | None
    clip: float
    size: int

    def for_rows(self, rows: int) -> Callable[[np.ndarray], np.ndarray]:
        """The function of `rows` observations `[G, ...]` to vectors `[G, k]`."""
        h = np.empty((rows, self.size), np.float32)

        def convert(obs: np.ndarray) -> np.ndarray:
            h[...] = obs if obs.ndim == 2 else obs.reshape(len(obs), -1)
            return h

        if self.shift is None or self.scale is None:
            return convert
        shift, scale = _spread(self.shift, rows), _spread(self.scale, rows)
        low, high = np.float32(-self.clip), np.float32(self.clip)

        def normalize(obs: np.ndarray) -> np.ndarray:
            np.subtract(obs if obs.ndim == 2 else obs.reshape(len(obs), -1), shift, out=h)
            np.multiply(h, scale, out=h)
            np.minimum(h, high, out=h)
            np.maximum(h, low, out=h)
            return h

        return normalize


class Layers(NamedTuple):
    """Linear layers, weights `[in, out]` and biases `[out]`, each followed by the activation."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    activation: Literal["tanh", "relu"] | None = None

    def for_rows(self, rows: int) -> Callable[[np.ndarray], np.ndarray]:
        """The function of inputs `[G, in]` to outputs `[G, out]`."""
        layers = [
            (weight, _spread(bias, rows), np.empty((rows, bias.size), np.float32))
            for weight, bias in self.layers
        ]
        relu, tanh = self.activation == "relu", self.activation == "tanh"

        def forward(h: np.ndarray) -> np.ndarray:
            for weight, bias, out in layers:
                np.dot(h, weight, out=out)  # half a microsecond less than matmul
                np.add(out, bias, out=out)
                if tanh:
                    np.tanh(out, out=out)
                elif relu:
                    np.maximum(out, _ZERO, out=out)
                h = out
            return h

        return forward


class LSTM(NamedTuple):
    r"""As `ppo.policies.memory.LSTMMemory`, of its gates i, f, o and g.

    Each gate's weights act on features and output together, `[4, F + H, H]`, biases `[4, H]`.
    Those of the first three are halved, for :math:`\sigma(x) = (1 + \tanh(x / 2)) / 2`.
    """

    weights: np.ndarray
    biases: np.ndarray

    def for_rows(self, rows: int) -> Step:
        """The step of `rows` episodes."""
        size = self.biases.shape[-1]
        width = self.weights.shape[1] - size
        weights, biases = self.weights, _spread(self.biases, rows)
        inputs = np.empty((rows, width + size), np.float32)
        given, kept = inputs[:, :width], inputs[:, width:]
        gates = np.empty((4, rows, size), np.float32)
        sigmoids, (add, keep, show, new) = gates[:3], gates

        def step(features: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
            given[...], kept[...] = features, before[:, :size]
            np.matmul(inputs, weights, out=gates)
            np.add(gates, biases, out=gates)
            np.tanh(gates, out=gates)
            np.add(sigmoids, _ONE, out=sigmoids)
            np.multiply(sigmoids, _HALF, out=sigmoids)
            hidden, cell = after[:, :size], after[:, size:]
            np.multiply(keep, before[:, size:], out=cell)
            np.multiply(add, new, out=add)
            np.add(cell, add, out=cell)
            np.tanh(cell, out=new)
            np.multiply(show, new, out=hidden)
            return hidden

        return step


class GRU(NamedTuple):
    """As `ppo.policies.memory.GRUMemory`, of its gates r and z as in `LSTM`, and of n.

    Weights of n on features `[F, H]` and on the output `[H, H]`, with a bias `[H]` each.
    """

    weights: np.ndarray
    biases: np.ndarray
    given: Layers
    kept: Layers

    def for_rows(self, rows: int) -> Step:
        """The step of `rows` episodes."""
        size = self.biases.shape[-1]
        width = self.weights.shape[1] - size
        weights, biases = self.weights, _spread(self.biases, rows)
        inputs = np.empty((rows, width + size), np.float32)
        given, kept = inputs[:, :width], inputs[:, width:]
        gates = np.empty((2, rows, size), np.float32)
        reset, keep = gates
        of_given, of_kept = self.given.for_rows(rows), self.kept.for_rows(rows)

        def step(features: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
            given[...], kept[...] = features, before
            np.matmul(inputs, weights, out=gates)
            np.add(gates, biases, out=gates)
            np.tanh(gates, out=gates)
            np.add(gates, _ONE, out=gates)
            np.multiply(gates, _HALF, out=gates)
            new = of_kept(kept)
            np.multiply(reset, new, out=new)
            np.add(of_given(given), new, out=new)
            np.tanh(new, out=new)
            np.subtract(kept, new, out=after)
            np.multiply(keep, after, out=after)
            np.add(new, after, out=after)
            return after

        return step


class Choice(NamedTuple):
    """Actions from a head's outputs and noise: of a Gaussian with `std [d]`, or a class."""

    std: np.ndarray | None
    action_shape: tuple[int, ...]

    def for_rows(self, rows: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The function of outputs and noise to raw actions `[G, ...]`."""
        shape = (rows, *self.action_shape)

        def choose_class(outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
            classes: np.ndarray = (outputs + noise).argmax(axis=-1)
            return classes

        if self.std is None:
            return choose_class
        std = _spread(self.std, rows)

        def choose(outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
            actions: np.ndarray = outputs + std * noise
            return actions.reshape(shape)

        return choose


@dataclasses.dataclass
class MLPActor:
    """Observation, hidden layers and a choice: the actor of a policy without memory."""

    normalization: Normalization
    hidden: Layers
    output: Layers
    choice: Choice
    _rooms: dict[int, tuple[Any, ...]] = dataclasses.field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rooms": {}}

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw actions `[G, ...]` for observations `[G, ...]` and noise `[G, k]`."""
        rows = len(obs)
        if rows not in self._rooms:
            parts = self.normalization, self.hidden, self.output, self.choice
            self._rooms[rows] = tuple(part.for_rows(rows) for part in parts)
        normalize, hidden, output, choose = self._rooms[rows]
        actions: np.ndarray = choose(output(hidden(normalize(obs))), noise)
        return actions


class Branch(NamedTuple):
    """Hidden layers and the memory behind them, whose state has `size` numbers."""

    hidden: Layers
    memory: LSTM | GRU
    size: int

    def for_rows(self, rows: int) -> Step:
        """The step of `rows` episodes, from vectors `[G, k]`."""
        hidden, remember = self.hidden.for_rows(rows), self.memory.for_rows(rows)
        return lambda vectors, before, after: remember(hidden(vectors), before, after)


@dataclasses.dataclass
class MemoryActor:
    """The actor of a policy with memory: branches are its own and that of a critic with one."""

    normalization: Normalization
    output: Layers
    choice: Choice
    branches: list[Branch]
    _rooms: dict[int, tuple[Any, ...]] = dataclasses.field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rooms": {}}

    def __call__(
        self, obs: np.ndarray, noise: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw actions `[G, ...]` and the next states `[G, K]`, given the present ones."""
        rows = len(obs)
        if rows not in self._rooms:
            parts: list[Any] = [self.normalization, self.output, self.choice, *self.branches]
            self._rooms[rows] = tuple(part.for_rows(rows) for part in parts)
        normalize, output, choose, *steps = self._rooms[rows]
        vectors, after = normalize(obs), np.empty_like(states)
        features, first = [], 0
        for branch, step in zip(self.branches, steps, strict=True):
            own = slice(first, first + branch.size)
            features.append(step(vectors, states[:, own], after[:, own]))
            first += branch.size
        return choose(output(features[0]), noise), after
