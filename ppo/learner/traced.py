"""The eager gradient recorded once as a flat graph of tensor operations, for any policy.

Most of a small minibatch's time is autograd's and Python's bookkeeping. Recording loss and
backward pass together leaves a list of operations without either, which computes the eager
gradient bit for bit. A policy that cannot be recorded (it branches on values, or changes buffers
while it is evaluated) stays with the eager gradient, and one that no longer does what was recorded
returns to it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

from ppo.learner.eager import METRICS, EagerGradient, LossWeights
from ppo.losses import ppo_loss
from ppo.policies.protocol import Evaluation
from ppo.rollout import Batch

__all__ = ["TracedGradient"]

_FIELDS = ("obs", "actions", "log_probs", "values", "advantages", "returns")
_WARM_UP = 500  # eager steps; recording costs about as much, so short runs never record
_UPDATES_BETWEEN_CHECKS = 16
_MAX_SHAPES = 4  # numbers of rows that are recorded; others stay eager

_Function = Callable[..., Sequence[Tensor]]


class _Evaluate(nn.Module):
    """Gives `policy.evaluate` the name that `functional_call` calls."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: Tensor, actions: Tensor) -> Evaluation:
        return Evaluation(*self.policy.evaluate(obs, actions))  # type: ignore[operator]


class TracedGradient:
    """Records the eager gradient after a warm-up, then replays the recording.

    Args:
        policy: Evaluated on the minibatch.
        eager: Used before the recording, and for ever where recording fails.
        warm_up: Eager steps before recording.
    """

    num_threads: int | None = None

    def __init__(self, policy: nn.Module, eager: EagerGradient, warm_up: int = _WARM_UP) -> None:
        self._eager = eager
        self._policy = policy
        self._module = _Evaluate(policy)
        self._parameters = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        self._until_recording = warm_up
        self._functions: dict[tuple[Any, ...], _Function | None] = {}
        self._updates = 0
        self._check_next = False

    def prepare(self, batch: Batch) -> Batch:
        """Count the updates; now and then the recordings are compared with the eager gradient."""
        self._updates += 1
        self._check_next = self._updates % _UPDATES_BETWEEN_CHECKS == 0
        return batch

    def __call__(self, batch: Batch, weights: LossWeights) -> Tensor:
        """Write the gradient of one minibatch."""
        if self._until_recording > 0:
            self._until_recording -= 1
            return self._eager(batch, weights)
        inputs = self._inputs(batch, weights)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs[: len(_FIELDS)])
        key = (weights.value_coef, weights.value_clip_range, self._policy.training, *shapes)
        if key not in self._functions:
            full = len(self._functions) >= _MAX_SHAPES
            self._functions[key] = None if full else self._record(batch, weights, inputs)
        function = self._functions[key]
        if function is not None and self._check_next:
            # A plain attribute that `evaluate` reads is frozen in a recording: find out.
            self._check_next = False
            if not self._agrees(function, batch, weights, inputs):
                self._functions = dict.fromkeys(self._functions)
                self._until_recording = sys.maxsize
                function = None
        if function is None:
            return self._eager(batch, weights)
        *gradients, metrics = function(*inputs)
        own = [cast("Tensor", parameter.grad) for parameter in self._parameters.values()]
        torch._foreach_copy_(own, gradients)
        return metrics

    def _inputs(self, batch: Batch, weights: LossWeights) -> list[Tensor]:
        fields = [getattr(batch, name) for name in _FIELDS]
        scalars = fields[2].new_tensor([weights.clip_range, weights.entropy_coef])
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        return [*fields, scalars, *parameters, *self._module.buffers()]

    def _record(self, batch: Batch, weights: LossWeights, inputs: list[Tensor]) -> _Function | None:
        names = [*self._parameters, *(name for name, _ in self._module.named_buffers())]
        count = len(self._parameters)

        def loss_of(parameters: list[Tensor], fields: list[Tensor], rest: list[Tensor]) -> Any:
            obs, actions, log_probs, values, advantages, returns, scalars = fields
            state = dict(zip(names, [*parameters, *rest], strict=True))
            new = functional_call(self._module, state, (obs, actions))
            loss = ppo_loss(
                new.log_probs,
                log_probs,
                advantages,
                new.values,
                returns,
                new.entropy,
                clip_range=scalars[0],
                value_coef=weights.value_coef,
                entropy_coef=scalars[1],
                value_clip_range=weights.value_clip_range,
                old_values=values,
            )
            return loss.total, torch.stack([getattr(loss, name) for name in METRICS])

        def gradient(*tensors: Tensor) -> list[Tensor]:
            fields, rest = list(tensors[: len(_FIELDS) + 1]), list(tensors[len(_FIELDS) + 1 :])
            differentiate = grad_and_value(loss_of, has_aux=True)
            gradients, (_, metrics) = differentiate(rest[:count], fields, rest[count:])
            return [*gradients, metrics]

        try:
            graph = make_fx(gradient)(*inputs)
        except Exception:  # whatever a policy does that cannot be recorded
            return None
        if any(_changes_input(node) for node in graph.graph.nodes):
            return None
        function = _scripted(graph, inputs)
        return function if self._agrees(function, batch, weights, inputs) else None

    def _agrees(
        self, function: _Function, batch: Batch, weights: LossWeights, inputs: list[Tensor]
    ) -> bool:
        """True if the function gives this minibatch's eager gradient and metrics."""
        metrics = self._eager(batch, weights)
        *gradients, replayed = function(*inputs)
        pairs = [(p.grad, g) for p, g in zip(self._parameters.values(), gradients, strict=True)]
        return all(
            eager is not None and torch.allclose(eager, replay, 1e-4, 1e-7, equal_nan=True)
            for eager, replay in [*pairs, (metrics, replayed)]
        )


def _changes_input(node: torch.fx.Node) -> bool:
    """True for an operation in place on an input, such as a buffer of running statistics."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and isinstance(value, torch.fx.Node)
        and value.op in ("placeholder", "get_attr")
        for argument, value in zip(schema.arguments, node.args, strict=False)
    )


def _scripted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> _Function:
    """The graph without Python between its operations, where torch still offers that."""
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated and may go; without it the graph itself is run.
            warnings.simplefilter("ignore")
            traced: _Function = torch.jit.trace(graph, tuple(inputs), check_trace=False)
            return traced
    except Exception:  # optional: whatever goes wrong, the graph itself still runs
        return graph
