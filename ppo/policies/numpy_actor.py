"""Small actors in NumPy, which environments' processes run by themselves.

Acting on a handful of observations is all call overhead: NumPy spends about a third of torch's.
Every part is made for one number of rows, and for the array that holds its inputs: it has an array
for its results, and all that is left to do in a step is arithmetic. What is added to each row is
there once for every row, as spreading it takes longer than adding.

Layers take every row by itself, a product of a vector and a matrix. For all rows at once BLAS has
faster kernels, but those of AVX-512 slow many processors down for the next 200 µs, and with it the
environments' steps, by a quarter (docs/decisions/0007-where-the-time-goes.rst). Besides, what comes
of a row does not depend on how many others there are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

__all__ = [
    "GRU",
    "LSTM",
    "Choice",
    "Layers",
    "MLPActor",
    "MemoryActor",
    "Normalization",
]

# Python's numbers would be converted in every call.
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)

Run = Callable[[], None]
"""Computes what belongs in an array from what lies in another."""

Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From features `[B, G, F]` and what was remembered `[B, G, K]` to outputs `[B, G, H]`; the third
argument `[B, G, K]` takes what is remembered then."""


def _spread(values: np.ndarray, rows: int) -> np.ndarray:
    """The values `[..., k]` once for every row, `[..., rows, k]`."""
    return np.repeat(values[..., None, :], rows, axis=-2)


class Normalization(NamedTuple):
    """Observations as float32 vectors `[k]`: shifted, scaled and clipped, or as they are."""

    shift: np.ndarray | None
    scale: np.ndarray | None
    clip: float
    size: int

    def for_rows(self, rows: int) -> tuple[Callable[[np.ndarray], None], np.ndarray]:
        """What takes `rows` observations `[G, ...]`, and where it puts their vectors `[G, k]`."""
        h = np.empty((rows, self.size), np.float32)

        def convert(obs: np.ndarray) -> None:
            h[...] = obs if obs.ndim == 2 else obs.reshape(rows, -1)

        if self.shift is None or self.scale is None:
            return convert, h
        shift, scale = _spread(self.shift, rows), _spread(self.scale, rows)
        low, high = np.float32(-self.clip), np.float32(self.clip)

        def normalize(obs: np.ndarray) -> None:
            np.subtract(obs if obs.ndim == 2 else obs.reshape(rows, -1), shift, out=h)
            np.multiply(h, scale, out=h)
            np.minimum(h, high, out=h)
            np.maximum(h, low, out=h)

        return normalize, h


class Layers(NamedTuple):
    """Linear layers, each followed by the activation: weights `[in, out]`, biases `[out]`.

    Of several networks side by side, they have one more axis in front, and so have the outputs.
    """

    layers: list[tuple[np.ndarray, np.ndarray]]
    activation: Literal["tanh", "relu"] | None = None

    def behind(self, inputs: np.ndarray) -> tuple[Run, np.ndarray]:
        """What computes the outputs `[G, out]` of the inputs `[G, in]`, and where they are."""
        h = inputs[..., None, :]  # a vector and a matrix for each row
        layers = []
        for weight, bias in self.layers:
            spread = _spread(bias, inputs.shape[-2])[..., None, :]  # [G, 1, out]
            layers.append((h, weight[..., None, :, :], spread, np.empty_like(spread)))
            h = layers[-1][-1]
        relu, tanh = self.activation == "relu", self.activation == "tanh"

        def run() -> None:
            for given, weight, bias, out in layers:
                np.matmul(given, weight, out=out)
                np.add(out, bias, out=out)
                if tanh:
                    np.tanh(out, out=out)
                elif relu:
                    np.maximum(out, _ZERO, out=out)

        return run, h[..., 0, :]


class LSTM(NamedTuple):
    r"""As `ppo.policies.memory.LSTMMemory`, of `B` networks side by side; gates i, f, o and g.

    Each gate's weights act on features and output together, `[4, B, F + H, H]`, with biases
    `[4, B, H]`. Those of the first three are halved, for
    :math:`\sigma(x) = (1 + \tanh(x / 2)) / 2`.
    """

    weights: np.ndarray
    biases: np.ndarray

    def for_rows(self, rows: int) -> Step:
        """The step of `rows` episodes."""
        forward, given, kept, gates = _gates(self.weights, self.biases, rows)
        sigmoids, size = gates[:3], kept.shape[-1]
        add, keep, show, new = gates

        def step(features: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
            given[...], kept[...] = features, before[..., :size]
            forward()
            np.tanh(gates, out=gates)
            np.add(sigmoids, _ONE, out=sigmoids)
            np.multiply(sigmoids, _HALF, out=sigmoids)
            hidden, cell = after[..., :size], after[..., size:]
            np.multiply(keep, before[..., size:], out=cell)
            np.multiply(add, new, out=add)
            np.add(cell, add, out=cell)
            np.tanh(cell, out=new)
            np.multiply(show, new, out=hidden)
            return hidden

        return step


class GRU(NamedTuple):
    """As `ppo.policies.memory.GRUMemory`; gates r and z as in `LSTM`, then both parts of n.

    The third gate's weights act on features alone, the fourth one's on the output: the others are
    zeros, since one product of all takes less time than three.
    """

    weights: np.ndarray
    biases: np.ndarray

    def for_rows(self, rows: int) -> Step:
        """The step of `rows` episodes."""
        forward, given, kept, gates = _gates(self.weights, self.biases, rows)
        sigmoids = gates[:2]
        reset, keep, new, kept_part = gates

        def step(features: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
            given[...], kept[...] = features, before
            forward()
            np.tanh(sigmoids, out=sigmoids)
            np.add(sigmoids, _ONE, out=sigmoids)
            np.multiply(sigmoids, _HALF, out=sigmoids)
            np.multiply(reset, kept_part, out=kept_part)
            np.add(new, kept_part, out=new)
            np.tanh(new, out=new)
            np.subtract(kept, new, out=after)
            np.multiply(keep, after, out=after)
            np.add(new, after, out=after)
            return after

        return step


def _gates(
    weights: np.ndarray, biases: np.ndarray, rows: int
) -> tuple[Callable[[], None], np.ndarray, np.ndarray, np.ndarray]:
    """What computes all gates before tanh, its inputs `[B, G, F]` and `[B, G, H]`, its results."""
    _, count, width, size = weights.shape
    inputs = np.empty((count, rows, width), np.float32)
    spread = _spread(biases, rows)
    gates = np.empty_like(spread)

    def forward() -> None:
        np.matmul(inputs, weights, out=gates)
        np.add(gates, spread, out=gates)

    return forward, inputs[..., : width - size], inputs[..., width - size :], gates


class Choice(NamedTuple):
    """Actions from a head's outputs and noise: of a Gaussian with `std [d]`, or a class.

    Outputs are `features @ weight + bias`, with weights `[H, k]` and biases `[k]`.
    """

    weight: np.ndarray
    bias: np.ndarray
    std: np.ndarray | None
    action_shape: tuple[int, ...]

    def behind(self, features: np.ndarray, noise: np.ndarray) -> Callable[[int], np.ndarray]:
        """What chooses raw actions `[G, ...]` by the features `[G, H]` in step `t`.

        They are valid until the next call. Of noise `[T, G, k]` and biases one sum is made here.
        """
        summands = (noise if self.std is None else noise * self.std) + self.bias
        given, weight = features[:, None, :], self.weight
        sums = np.empty((len(features), 1, weight.shape[1]), np.float32)
        outputs, classes = sums[:, 0, :], self.std is None
        actions = outputs.reshape(len(features), *self.action_shape) if not classes else outputs

        def choose(t: int) -> np.ndarray:
            np.matmul(given, weight, out=sums)
            np.add(outputs, summands[t], out=outputs)
            return outputs.argmax(-1) if classes else actions

        return choose


@dataclasses.dataclass
class MLPActor:
    """Observation, hidden layers and a choice: the actor of a policy without memory; float32."""

    row_wise: ClassVar[bool] = True

    normalization: Normalization
    hidden: Layers
    choice: Choice

    def __reduce__(self) -> tuple[Any, ...]:
        # All numbers in one piece: it takes pickle longer to find out how to treat an array than to
        # copy it.
        (shift, scale, *bounds), choice = self.normalization, self.choice
        layers = [*self.hidden.layers, (choice.weight, choice.bias)]
        arrays = [shift, scale, choice.std, *itertools.chain(*layers)]
        numbers = b"".join([b"" if array is None else array.tobytes() for array in arrays])
        shapes = [None if array is None else array.shape for array in arrays]
        rest = bounds, self.hidden.activation, choice.action_shape
        return _mlp_actor, (numbers, shapes, *rest)

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw actions `[G, ...]` for observations `[G, ...]` and noise `[G, k]`."""
        return self.for_rollout(noise[None])(obs, 0)

    def for_rollout(self, noise: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
        """The function of observations `[G, ...]` and step `t` to actions, for noise `[T, G, k]`.

        What it returns is valid until the next call.
        """
        normalize, inputs = self.normalization.for_rows(noise.shape[1])
        layers, features = self.hidden.behind(inputs)
        choose = self.choice.behind(features, noise)

        def act(obs: np.ndarray, t: int) -> np.ndarray:
            normalize(obs)
            layers()
            return choose(t)

        return act


def _mlp_actor(
    numbers: bytes,
    shapes: list[Any],
    bounds: tuple[float, int],
    activation: Any,
    action_shape: tuple[int, ...],
) -> MLPActor:
    """What was pickled."""
    arrays: list[Any] = []
    end = 0
    for shape in shapes:
        if shape is None:
            arrays.append(None)
            continue
        array = np.ndarray(shape, np.float32, numbers, end)
        arrays.append(array.copy())  # so that it is aligned, and products are the same bit for bit
        end += array.nbytes
    shift, scale, std, *layers = arrays
    *hidden, output = zip(layers[::2], layers[1::2], strict=True)
    return MLPActor(
        Normalization(shift, scale, *bounds),
        Layers(hidden, activation),
        Choice(*output, std, action_shape),
    )


@dataclasses.dataclass
class MemoryActor:
    """The actor of a policy with memory, and beside it the memory of a critic that has its own.

    Both are of one shape: the products of a layer, or of a gate, are one call.
    """

    normalization: Normalization
    hidden: Layers
    memory: LSTM | GRU
    choice: Choice

    def __call__(
        self, obs: np.ndarray, noise: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw actions `[G, ...]` and the next states `[G, K]`, given the present ones."""
        return self.for_rollout(noise[None])(obs, 0, states)

    def for_rollout(
        self, noise: np.ndarray
    ) -> Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """As `MLPActor.for_rollout`, with the states before and after."""
        rows = noise.shape[1]
        normalize, inputs = self.normalization.for_rows(rows)
        layers, features = self.hidden.behind(inputs)
        remember = self.memory.for_rows(rows)
        _, networks, _, size = self.memory.weights.shape
        hidden = np.empty((rows, size), np.float32)
        choose = self.choice.behind(hidden, noise)

        def act(obs: np.ndarray, t: int, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            after = np.empty_like(states)
            before_each, after_each = (
                array.reshape(rows, networks, -1).swapaxes(0, 1)  # [B, G, K / B]
                for array in (states, after)
            )
            normalize(obs)
            layers()
            hidden[...] = remember(features, before_each, after_each)[0]
            return choose(t), after

        return act
