"""A NumPy copy of a small actor, which environments' processes run by themselves.

Acting on a handful of observations is all call overhead: NumPy spends about a third of torch's.
The copy only *chooses* actions; log-probabilities and values come from the torch policy in one
batched pass at the end of the rollout, by the code path the update uses, so the ratio starts at 1.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ppo.policies.bodies import MLP
from ppo.policies.heads import CategoricalHead, GaussianHead
from ppo.policies.normalizer import ObservationNormalizer
from ppo.policies.options import PolicyConfig
from ppo.policies.protocol import Actor

__all__ = ["MLPActor", "acts_in_workers", "snapshot"]

# Above this many weights in one layer a product for a group of environments may use several
# threads, and arithmetic outweighs overhead: torch then acts for all environments at once.
_MAX_LAYER = 128 * 64
_ZERO = np.float32(0.0)


def _array(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32, order="C")


class _Room(NamedTuple):
    """Memory for one number of rows: BLAS takes the same path bit for bit, whoever calls.

    What is added to every row is there once for each, as spreading it takes longer than adding.
    """

    inputs: np.ndarray
    normalizer: tuple[Any, ...]
    layers: list[tuple[np.ndarray, Any, np.ndarray]]
    std: np.ndarray | None


@dataclasses.dataclass
class MLPActor:
    """Normaliser, tanh or relu layers, and a categorical or Gaussian output, in NumPy.

    Attributes:
        shift: Mean of the normaliser `[k]`, or None without one.
        scale: Inverse standard deviation of the normaliser `[k]`.
        clip: Bound on the normalised observation.
        layers: Weights `[in, out]` and biases `[out]`, the output layer last.
        relu: The activation is relu instead of tanh.
        std: Standard deviation of Gaussian actions `[d]`; None for a categorical output.
        action_shape: Shape of one raw action.
    """

    shift: np.ndarray | None
    scale: np.ndarray | None
    clip: float
    layers: list[tuple[np.ndarray, np.ndarray]]
    relu: bool
    std: np.ndarray | None
    action_shape: tuple[int, ...]
    _rooms: dict[int, _Room] = dataclasses.field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rooms": {}}

    def _make_room(self, rows: int) -> _Room:
        def spread(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else np.repeat(values[None], rows, axis=0)

        # Python's numbers would be converted in every call.
        low, high = np.float32(-self.clip), np.float32(self.clip)
        layers = [
            (weight, spread(bias), np.empty((rows, bias.size), np.float32))
            for weight, bias in self.layers
        ]
        inputs = np.empty((rows, len(self.layers[0][0])), np.float32)
        normalizer = spread(self.shift), spread(self.scale), low, high
        room = self._rooms[rows] = _Room(inputs, normalizer, layers, spread(self.std))
        return room

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw actions `[G, ...]` for observations `[G, ...]` and noise `[G, k]`."""
        room = self._rooms.get(len(obs)) or self._make_room(len(obs))
        x = obs if obs.ndim == 2 else obs.reshape(len(obs), -1)
        h, (shift, scale, low, high), layers, std = room
        if shift is None:
            h[...] = x
        else:
            np.subtract(x, shift, out=h)
            np.multiply(h, scale, out=h)
            np.minimum(h, high, out=h)
            np.maximum(h, low, out=h)
        last = layers[-1][2]
        for weight, bias, out in layers:
            np.dot(h, weight, out=out)  # half a microsecond less than matmul
            np.add(out, bias, out=out)
            if out is last:
                break
            if self.relu:
                np.maximum(out, _ZERO, out=out)
            else:
                np.tanh(out, out=out)
            h = out
        if std is None:
            classes: np.ndarray = (last + noise).argmax(axis=-1)
            return classes
        actions: np.ndarray = last + std * noise
        return actions.reshape(len(x), *self.action_shape)


def acts_in_workers(policy: object | None, config: PolicyConfig) -> bool:
    """Whether a policy, or the default one still to be built, pays to be taken to the environments.

    For images it does not act there, but then the environments are slow enough to be shared out.
    """
    if policy is None or hasattr(policy, "action_head"):  # the default policy
        sizes = config.hidden_sizes
        small = all(one * other <= _MAX_LAYER for one, other in itertools.pairwise(sizes))
        plain = config.activation in ("tanh", "relu") and not config.layer_norm
        gaussian = config.distribution == "gaussian" and not config.state_dependent_std
        return small and plain and gaussian and config.memory is None and config.frame_stack == 1
    make: Callable[[], Actor | None] | None = getattr(policy, "snapshot", None)
    return make is not None and make() is not None


def snapshot(
    normalizer: nn.Module, body: nn.Module, head: nn.Module, action_shape: tuple[int, ...]
) -> MLPActor | None:
    """Copy an actor into NumPy, or return None where it is not small and plain."""
    if type(body) is not MLP or type(head) not in (CategoricalHead, GaussianHead):
        return None
    if isinstance(head, GaussianHead) and head.state_dependent:
        return None
    flatten, *hidden = body.children()
    linears, activations = [*hidden[::2], head.linear], {type(layer) for layer in hidden[1::2]}
    if type(flatten) is not nn.Flatten or len(hidden) % 2:
        return None
    if len(activations) > 1 or not activations <= {nn.Tanh, nn.ReLU}:
        return None
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    if type(normalizer) not in (ObservationNormalizer, nn.Identity):
        return None
    if any(linear.weight.numel() > _MAX_LAYER for linear in linears):  # type: ignore[operator, union-attr]
        return None
    shift = scale = std = None
    clip = 0.0
    if isinstance(normalizer, ObservationNormalizer):
        shift, scale = _array(normalizer.shift).reshape(-1), _array(normalizer.scale).reshape(-1)
        clip = normalizer.clip
    if isinstance(head, GaussianHead):
        std = _array(head.bounded_log_std().exp())
    return MLPActor(
        shift=shift,
        scale=scale,
        clip=clip,
        layers=[(_array(linear.weight.T), _array(linear.bias)) for linear in linears],  # type: ignore[union-attr, arg-type]
        relu=activations == {nn.ReLU},
        std=std,
        action_shape=action_shape,
    )
