"""The gradient of the default policy in closed form, in NumPy.

A minibatch of a small MLP is call overhead, not arithmetic: autograd spends most of its time
between the matrix products. Written out, the gradient takes a fraction of that time. It is the
gradient of `ppo.losses.ppo_loss` to rounding; tests compare it with autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ppo.learner.eager import LossWeights
from ppo.learner.flat_adam import FlatAdam
from ppo.losses import MAX_LOG_RATIO
from ppo.policies.protocol import PlainLayers
from ppo.rollout import Batch

__all__ = ["ClosedFormGradient"]

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_LARGEST_LAYER = 256 * 256  # beyond it the arithmetic dominates


class _Network:
    """Forward and backward pass of linear layers with tanh or relu between them.

    Matrix products are torch's, whose threads the caller controls (NumPy's BLAS has no public
    switch, and its threads spin); everything between them is NumPy's, on the same memory.
    """

    def __init__(self, linears: list[nn.Linear], relu: bool) -> None:
        self._relu = relu
        # Views: the optimizer changes the weights, `backward` writes the gradients.
        self._layers = [_Layer(linear) for linear in linears]
        self._work: dict[int, _Work] = {}
        self._inputs: list[Tensor] = []

    def _buffers(self, rows: int) -> _Work:
        if rows not in self._work:
            widths = [len(layer.bias) for layer in self._layers]
            self._work[rows] = _Work(rows, widths)
        return self._work[rows]

    def forward(self, x: Tensor) -> np.ndarray:
        """Outputs `[B, k]`, valid until the next call."""
        work = self._buffers(len(x))
        self._inputs = [x, *work.outputs[:-1]]
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            torch.addmm(layer.bias, x, layer.weight_t, out=work.outputs[index])
            x, array = work.outputs[index], work.arrays[index]
            if index < last:
                if self._relu:
                    np.maximum(array, 0.0, out=array)
                else:
                    np.tanh(array, out=array)
        return array

    def backward(self, d_outputs: np.ndarray) -> None:
        """Write all gradients, given that of the outputs `[B, k]`."""
        work = self._buffers(len(d_outputs))
        d_out = torch.from_numpy(d_outputs)
        for index in reversed(range(len(self._layers))):
            layer = self._layers[index]
            torch.mm(d_out.t(), self._inputs[index], out=layer.d_weight)
            torch.mm(work.ones, d_out, out=layer.d_bias)
            if index == 0:
                return
            d_out = torch.mm(d_out, layer.weight, out=work.hidden[index - 1])
            h, d_hidden, slope = work.arrays[index - 1], d_out.numpy(), work.slopes[index - 1]
            if self._relu:
                np.sign(h, out=slope)  # h is not negative
            else:
                np.multiply(h, h, out=slope)
                np.subtract(1.0, slope, out=slope)
            np.multiply(d_hidden, slope, out=d_hidden)


class _Layer:
    """Views of one layer's parameters and gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = linear.weight.detach()
        self.weight_t = self.weight.t()
        self.bias = linear.bias.detach()
        self.d_weight = _gradient(linear.weight)
        self.d_bias = _gradient(linear.bias).view(1, -1)


class _Work:
    """Arrays for one number of rows."""

    def __init__(self, rows: int, widths: list[int]) -> None:
        self.outputs = [torch.empty(rows, width) for width in widths]
        self.arrays = [output.numpy() for output in self.outputs]
        self.hidden = [torch.empty(rows, width) for width in widths[:-1]]
        self.slopes = [np.empty((rows, width), np.float32) for width in widths[:-1]]
        self.ones = torch.ones(1, rows)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class ClosedFormGradient:
    """Gradient for a policy of plain layers, separate for actor and critic, on the CPU.

    Args:
        layers: The policy; `supports` says whether it is of the right kind.
    """

    num_threads: int | None = 1

    def __init__(self, layers: PlainLayers) -> None:
        relu = layers.activation == "relu"
        self._layers = layers
        self._actor = _Network(layers.actor, relu)
        self._critic = _Network(layers.critic, relu)
        self._rows: dict[int, np.ndarray] = {}

    @staticmethod
    def supports(layers: PlainLayers, optimizer: FlatAdam, value_clip_range: float | None) -> bool:
        """True where the closed form holds, covers all parameters, and is worth it."""
        if layers.actor[0] is layers.critic[0] or value_clip_range is not None:
            return False
        parameters = [
            p for net in (layers.actor, layers.critic) for m in net for p in m.parameters()
        ]
        parameters += [] if layers.log_std is None else [layers.log_std]
        return sum(p.numel() for p in parameters) == optimizer.size and all(
            p.device.type == "cpu"
            and p.dtype == torch.float32
            and p.requires_grad
            and p.numel() <= _LARGEST_LAYER
            for p in parameters
        )

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """Normalise all observations once: the statistics are frozen during an update."""
        return batch.replace(obs=self._layers.normalize(batch.obs))

    def __call__(self, batch: Batch, weights: LossWeights) -> Tensor:
        """Write the gradient of one minibatch."""
        advantages = batch.advantages.numpy()
        rows = np.float32(len(advantages))
        outputs = self._actor.forward(batch.obs)
        family = self._categorical if self._layers.log_std is None else self._gaussian
        log_probs, entropy, backward = family(outputs, batch.actions.numpy(), weights)

        difference = log_probs - batch.log_probs.numpy()
        log_ratio = np.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        change = np.expm1(log_ratio)  # ratio - 1
        eps = weights.clip_range
        surrogate = (change + 1.0) * advantages
        clipped = (np.clip(change, -eps, eps) + 1.0) * advantages
        # Only rows whose unclipped term is the minimum pull, and none beyond the clamp.
        pulls = (surrogate <= clipped) & (log_ratio == difference)
        backward(np.where(pulls, surrogate, 0.0) / -rows)

        values = self._critic.forward(batch.obs)
        error = values[:, 0] - batch.returns.numpy()
        self._critic.backward((error * (2.0 * weights.value_coef / rows))[:, None])
        return torch.tensor(
            [
                -np.minimum(surrogate, clipped).mean(),
                (error * error).mean(),
                entropy,
                (change - log_ratio).mean(),
                np.count_nonzero(np.abs(change) > eps) / rows,
            ]
        )

    def _categorical(
        self, logits: np.ndarray, actions: np.ndarray, weights: LossWeights
    ) -> tuple[np.ndarray, float, Callable[[np.ndarray], None]]:
        """Log-probabilities `[B]`, mean entropy, and the backward pass from d log-prob `[B]`."""
        rows = len(logits)
        index = self._rows.setdefault(rows, np.arange(rows))
        log_p = logits - logits.max(1, keepdims=True)
        p = np.exp(log_p)
        total = p.sum(1, keepdims=True)
        log_p -= np.log(total)
        p /= total
        entropies = -(p * log_p).sum(1, keepdims=True)

        def backward(d_log_probs: np.ndarray) -> None:
            d_logits = p * -d_log_probs[:, None]
            d_logits[index, actions] += d_log_probs
            if weights.entropy_coef:
                d_logits += p * (log_p + entropies) * np.float32(weights.entropy_coef / rows)
            self._actor.backward(d_logits)

        return log_p[index, actions], float(entropies.mean()), backward

    def _gaussian(
        self, mean: np.ndarray, actions: np.ndarray, weights: LossWeights
    ) -> tuple[np.ndarray, float, Callable[[np.ndarray], None]]:
        """Log-probabilities `[B]`, mean entropy, and the backward pass from d log-prob `[B]`."""
        assert self._layers.log_std is not None
        assert self._layers.bounded_log_std is not None
        log_std = self._layers.bounded_log_std().detach().numpy()
        d_log_std = _gradient(self._layers.log_std).numpy()
        inverse_std = np.exp(-log_std)
        z = (actions.reshape(mean.shape) - mean) * inverse_std
        constant = float(log_std.sum()) + len(log_std) * _HALF_LOG_2PI

        def backward(d_log_probs: np.ndarray) -> None:
            d_log_std[...] = ((z * z - 1.0) * d_log_probs[:, None]).sum(0) - weights.entropy_coef
            self._actor.backward(z * inverse_std * d_log_probs[:, None])

        log_probs = -0.5 * np.einsum("ij,ij->i", z, z) - np.float32(constant)
        return log_probs, constant + 0.5 * len(log_std), backward
