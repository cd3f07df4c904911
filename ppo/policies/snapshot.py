"""A copy of an actor that is small or sees images, or none where torch should act for all.

The copy only *chooses* actions; log-probabilities and values come from the torch policy in one
batched pass at the end of the rollout, by the code path the update uses, so the ratio starts at 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ppo._hooks import any_global_hook
from ppo.policies.bodies import MLP, NatureCNN
from ppo.policies.encoders import Chain
from ppo.policies.gru_layer import GRULayer
from ppo.policies.heads import CategoricalHead, GaussianHead
from ppo.policies.image_actor import ImageActor
from ppo.policies.memory import GRUMemory, LSTMMemory
from ppo.policies.normalizer import ObservationNormalizer
from ppo.policies.numpy_actor import (
    GRU,
    LSTM,
    Choice,
    Layers,
    MemoryActor,
    MLPActor,
    Normalization,
)
from ppo.policies.options import PolicyConfig
from ppo.policies.protocol import Actor, RecurrentActor, modules_in
from ppo.policies.tanh import Tanh

__all__ = ["acts_in_workers", "snapshot"]

# Above this many weights in one product, that for a group of environments may use several threads,
# and arithmetic outweighs overhead: torch then acts for all environments at once.
_MAX_LAYER = 128 * 64

_METHODS = {"forward", "step", "bounded_log_std"}  # what acting calls


def acts_in_workers(policy: object | None, config: PolicyConfig) -> bool:
    """Whether a policy, or the default one still to be built, can be taken to the environments.

    That of the default one of images is not known here.
    """
    if policy is None or hasattr(policy, "action_head"):  # the default policy
        plain = config.activation in ("tanh", "relu") and not config.layer_norm
        gaussian = config.distribution == "gaussian" and not config.state_dependent_std
        sizes = config.hidden_sizes
        products = [one * other for one, other in itertools.pairwise(sizes)]
        if config.memory is not None:
            products.append((sum(sizes[-1:]) + config.memory_size) * config.memory_size)
        small = all(product <= _MAX_LAYER for product in products)
        alike = config.memory is None or config.critic_hidden_sizes in (None, sizes)
        stepped = config.memory in (None, "lstm", "gru") and config.frame_stack == 1
        return plain and gaussian and small and alike and stepped
    make: Callable[[], Actor | None] | None = getattr(policy, "snapshot", None)
    return make is not None and make() is not None


class _NotPlainError(Exception):
    """Something is not small, or may compute anything."""


def snapshot(
    normalizer: nn.Module,
    bodies: Sequence[tuple[Any, Any]],
    head: nn.Module,
    action_shape: tuple[int, ...],
    frame_stack: int = 1,
) -> Actor | RecurrentActor | None:
    """Copy an actor, or return None where it is neither small and plain nor of images.

    Args:
        normalizer: Of its observations.
        bodies: The body of the actor and the memory behind it, or None without; then those of a
            critic that has a memory of its own.
        head: From features to actions.
        action_shape: Shape of one raw action.
        frame_stack: Observations it sees at once.
    """
    try:
        parts = [normalizer, head, *itertools.chain(*bodies)]
        _require(not (any_global_hook() or any(map(_is_altered, modules_in(parts)))))
        choice = Choice(*_head_layer(head), _std(head), action_shape)
        encoder, body = _image_encoder(bodies)
        if encoder is not None:
            _require(type(normalizer) is nn.Identity)
            layers = Layers([]) if body is None else _hidden(body)
            features = Normalization(None, None, 0.0, encoder.num_features)
            return ImageActor(encoder, MLPActor(features, layers, choice))
        _require(frame_stack == 1)  # an MLP sees vectors side by side
        hidden = [_hidden(body) for body, _ in bodies]
        normalization = _normalization(normalizer, bodies[0][0])
        if bodies[0][1] is None:
            return MLPActor(normalization, hidden[0], choice)
        memory = _memory([memory for _, memory in bodies])
        return MemoryActor(normalization, _abreast(hidden), memory, choice)
    except _NotPlainError:
        return None


def _is_altered(module: nn.Module) -> bool:
    """True if more happens when a module runs than its class says."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or not vars(module).keys().isdisjoint(_METHODS)
    )


def _parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter that is just that: not absent, nor computed from others."""
    found = getattr(module, name)
    _require(type(found) is nn.Parameter)
    return cast("Tensor", found)


def _array(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.numpy(force=True), dtype=np.float32, order="C")


def _require(plain: bool) -> None:
    if not plain:
        raise _NotPlainError


def _layer(weight: Tensor, bias: Tensor) -> tuple[np.ndarray, np.ndarray]:
    _require(weight.numel() <= _MAX_LAYER)
    return _array(weight.T), _array(bias)


def _linear(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    _require(type(layer) is nn.Linear)
    return _layer(_parameter(layer, "weight"), _parameter(layer, "bias"))


def _head_layer(head: Any) -> tuple[np.ndarray, np.ndarray]:
    _require(type(head) in (CategoricalHead, GaussianHead))
    return _linear(head.linear)


def _std(head: Any) -> np.ndarray | None:
    if not isinstance(head, GaussianHead):
        return None
    _require(not head.state_dependent)
    _parameter(head, "log_std")
    return _array(head.bounded_log_std().exp())


def _image_encoder(bodies: Sequence[tuple[Any, Any]]) -> tuple[NatureCNN | None, Any]:
    """The encoder of a body that begins with convolutions, and the layers behind it, if any."""
    (body, memory), *others = bodies
    encoder, layers = body if type(body) is Chain else (body, None)
    if type(encoder) is not NatureCNN:
        return None, None
    _require(memory is None and not others)
    _require(repr(encoder) == repr(NatureCNN(**encoder.options, generator=None)))
    kinds = {(parameter.device.type, parameter.dtype) for parameter in encoder.parameters()}
    _require(kinds == {("cpu", torch.float32)})
    # A tensor that is neither a parameter nor a buffer may be in use, and would not be sent.
    held = [value for module in encoder.modules() for value in vars(module).values()]
    _require(not any(isinstance(value, Tensor) for value in held))
    return encoder, layers


def _hidden(body: Any) -> Layers:
    _require(type(body) is MLP)
    flatten, *hidden = body.children()
    activations = {type(layer) for layer in hidden[1::2]}
    _require(type(flatten) is nn.Flatten and len(hidden) % 2 == 0)
    _require(len(activations) < 2 and activations <= {Tanh, nn.Tanh, nn.ReLU})
    relu = activations == {nn.ReLU}
    return Layers([_linear(linear) for linear in hidden[::2]], "relu" if relu else "tanh")


def _abreast(networks: Sequence[Layers]) -> Layers:
    """Networks of one shape as one of an axis more."""
    kinds = {(n.activation, tuple(weight.shape for weight, _ in n.layers)) for n in networks}
    _require(len(kinds) == 1)
    joined = zip(*(network.layers for network in networks), strict=True)
    layers = [(np.stack([w for w, _ in each]), np.stack([b for _, b in each])) for each in joined]
    return Layers(layers, networks[0].activation)


def _normalization(normalizer: Any, body: Any) -> Normalization:
    _require(type(normalizer) in (ObservationNormalizer, nn.Identity))
    size = next(
        (layer.in_features for layer in body if type(layer) is nn.Linear), body.num_features
    )
    if not isinstance(normalizer, ObservationNormalizer):
        return Normalization(None, None, 0.0, size)
    shift, scale = _array(normalizer.shift).reshape(-1), _array(normalizer.scale).reshape(-1)
    return Normalization(shift, scale, normalizer.clip, size)


def _memory(memories: Sequence[Any]) -> LSTM | GRU:
    """Memories of one kind and size, side by side."""
    kinds = {type(memory) for memory in memories}
    _require(len(kinds) == 1 and kinds <= {LSTMMemory, GRUMemory})
    cores = [memory.core for memory in memories]
    _require(all(type(core) in (nn.LSTM, GRULayer) and core.bias for core in cores))
    _require(len({(core.input_size, core.hidden_size) for core in cores}) == 1)
    size = cores[0].hidden_size
    _require((cores[0].input_size + size) * size <= _MAX_LAYER)

    def gates(name: str) -> np.ndarray:  # [gates, B, in, H] or [gates, B, H]
        each = torch.stack([_parameter(core, name).unflatten(0, (-1, size)) for core in cores], 1)
        return _array(each.mT if each.ndim == 4 else each)

    given, kept = gates("weight_ih_l0"), gates("weight_hh_l0")
    given_bias, kept_bias = gates("bias_ih_l0"), gates("bias_hh_l0")
    if kinds == {GRUMemory}:  # n in two parts
        given, given_bias = given[[0, 1, 2, 2]], given_bias[[0, 1, 2, 2]]
        kept, kept_bias = kept[[0, 1, 2, 2]], kept_bias[[0, 1, 2, 2]]
        given[3], given_bias[3], kept[2], kept_bias[2] = 0.0, 0.0, 0.0, 0.0
    weights, biases = np.concatenate([given, kept], axis=-2), given_bias + kept_bias
    if kinds == {GRUMemory}:
        weights[:2] *= 0.5
        biases[:2] *= 0.5
        return GRU(weights, biases)
    order = [0, 1, 3, 2]  # i, f, o, g
    weights, biases = weights[order], biases[order]
    weights[:3] *= 0.5
    biases[:3] *= 0.5
    return LSTM(weights, biases)
