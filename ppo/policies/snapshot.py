"""A NumPy copy of a small actor (`ppo.policies.numpy_actor`), or none where torch should act.

The copy only *chooses* actions; log-probabilities and values come from the torch policy in one
batched pass at the end of the rollout, by the code path the update uses, so the ratio starts at 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ppo.policies.bodies import MLP
from ppo.policies.heads import CategoricalHead, GaussianHead
from ppo.policies.memory import GRUMemory, LSTMMemory
from ppo.policies.normalizer import ObservationNormalizer
from ppo.policies.numpy_actor import (
    GRU,
    LSTM,
    Branch,
    Choice,
    Layers,
    MemoryActor,
    MLPActor,
    Normalization,
)
from ppo.policies.options import PolicyConfig
from ppo.policies.protocol import Actor, RecurrentActor

__all__ = ["acts_in_workers", "snapshot"]

# Above this many weights in one product, that for a group of environments may use several threads,
# and arithmetic outweighs overhead: torch then acts for all environments at once.
_MAX_LAYER = 128 * 64


def acts_in_workers(policy: object | None, config: PolicyConfig) -> bool:
    """Whether a policy, or the default one still to be built, pays to be taken to the environments.

    For images it does not act there, but then the environments are slow enough to be shared out.
    """
    if policy is None or hasattr(policy, "action_head"):  # the default policy
        plain = config.activation in ("tanh", "relu") and not config.layer_norm
        gaussian = config.distribution == "gaussian" and not config.state_dependent_std
        products = _products(config.hidden_sizes, config)
        if config.memory is not None and config.critic_hidden_sizes is not None:
            products += _products(config.critic_hidden_sizes, config)
        small = all(product <= _MAX_LAYER for product in products)
        stepped = config.memory in (None, "lstm", "gru") and config.frame_stack == 1
        return plain and gaussian and small and stepped
    make: Callable[[], Actor | None] | None = getattr(policy, "snapshot", None)
    return make is not None and make() is not None


def _products(sizes: tuple[int, ...], config: PolicyConfig) -> list[int]:
    """Weights in each product behind the first, whose size is unknown before the observations."""
    products = [one * other for one, other in itertools.pairwise(sizes)]
    if config.memory is not None:
        products.append((sum(sizes[-1:]) + config.memory_size) * config.memory_size)
    return products


class _NotPlainError(Exception):
    """Something is not small, or may compute anything."""


def snapshot(
    normalizer: nn.Module,
    bodies: Sequence[tuple[Any, Any]],
    head: nn.Module,
    action_shape: tuple[int, ...],
) -> Actor | RecurrentActor | None:
    """Copy an actor into NumPy, or return None where it is not small and plain.

    Args:
        normalizer: Of its observations.
        bodies: The body of the actor and the memory behind it, or None without; then those of a
            critic that has a memory of its own.
        head: From features to actions.
        action_shape: Shape of one raw action.
    """
    try:
        hidden = [_hidden(body) for body, _ in bodies]
        memories = [None if memory is None else _memory(memory) for _, memory in bodies]
        output, choice = Layers([_head_layer(head)]), Choice(_std(head), action_shape)
        normalization = _normalization(normalizer, bodies[0][0])
    except _NotPlainError:
        return None
    branches = [
        Branch(layers, memory, part.state_size)
        for layers, memory, (_, part) in zip(hidden, memories, bodies, strict=True)
        if memory is not None
    ]
    if branches:
        return MemoryActor(normalization, output, choice, branches)
    return MLPActor(normalization, hidden[0], output, choice)


def _array(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.detach().cpu().numpy(), dtype=np.float32, order="C")


def _require(plain: bool) -> None:
    if not plain:
        raise _NotPlainError


def _layer(weight: Tensor, bias: Tensor) -> tuple[np.ndarray, np.ndarray]:
    _require(weight.numel() <= _MAX_LAYER)
    return _array(weight.T), _array(bias)


def _linear(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    _require(type(layer) is nn.Linear)
    return _layer(layer.weight, layer.bias)


def _head_layer(head: Any) -> tuple[np.ndarray, np.ndarray]:
    _require(type(head) in (CategoricalHead, GaussianHead))
    return _linear(head.linear)


def _std(head: Any) -> np.ndarray | None:
    if not isinstance(head, GaussianHead):
        return None
    _require(not head.state_dependent)
    return _array(head.bounded_log_std().exp())


def _hidden(body: Any) -> Layers:
    _require(type(body) is MLP)
    flatten, *hidden = body.children()
    activations = {type(layer) for layer in hidden[1::2]}
    _require(type(flatten) is nn.Flatten and len(hidden) % 2 == 0)
    _require(len(activations) < 2 and activations <= {nn.Tanh, nn.ReLU})
    relu = activations == {nn.ReLU}
    return Layers([_linear(linear) for linear in hidden[::2]], "relu" if relu else "tanh")


def _normalization(normalizer: Any, body: Any) -> Normalization:
    _require(type(normalizer) in (ObservationNormalizer, nn.Identity))
    size = next(
        (layer.in_features for layer in body if type(layer) is nn.Linear), body.num_features
    )
    if not isinstance(normalizer, ObservationNormalizer):
        return Normalization(None, None, 0.0, size)
    shift, scale = _array(normalizer.shift).reshape(-1), _array(normalizer.scale).reshape(-1)
    return Normalization(shift, scale, normalizer.clip, size)


def _memory(memory: Any) -> LSTM | GRU:
    _require(type(memory) in (LSTMMemory, GRUMemory))
    core = memory.core
    _require(type(core) in (nn.LSTM, nn.GRU) and core.bias)
    size = core.hidden_size
    _require((core.input_size + size) * size <= _MAX_LAYER)
    # Of each gate, [in, out] and [out].
    given, kept, given_bias, kept_bias = (
        [_array(gate.mT if gate.ndim == 2 else gate) for gate in tensor.split(size)]
        for tensor in (core.weight_ih_l0, core.weight_hh_l0, core.bias_ih_l0, core.bias_hh_l0)
    )
    weights = np.stack([np.concatenate(pair) for pair in zip(given, kept, strict=True)])
    biases = np.stack(given_bias) + np.stack(kept_bias)
    half = np.float32(0.5)
    if isinstance(memory, GRUMemory):
        new = Layers([(given[2], given_bias[2])]), Layers([(kept[2], kept_bias[2])])
        return GRU(half * weights[:2], half * biases[:2], *new)
    order = [0, 1, 3, 2]  # i, f, o, g
    weights, biases = weights[order], biases[order]
    weights[:3] *= half
    biases[:3] *= half
    return LSTM(weights, biases)
