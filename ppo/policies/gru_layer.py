r"""A GRU over whole sequences in one operation, with its own backward pass.

On the CPU torch walks through a sequence by a dozen operations a step, and back by twice as many:
for small layers nothing but overhead, which a recording keeps. Here a step is a product and twelve
calls of NumPy. On the way back every slope of a step is that of its output times a factor, and the
factors are made for all steps at once: a step back is a product and four calls, and the gradient of
each weight one product over all steps (see `docs/decisions/0009`).

.. math::

    (r, z) = \sigma(W x + b + U h + d), \qquad k = U_n h + d_n, \qquad
    n = \tanh(W_n x + b_n + r k), \qquad h' = n + z (h - n)

.. math::

    \dot n = \dot h' (1 - z)(1 - n^2), \qquad \dot k = \dot n\, r, \qquad
    \dot r = \dot k\, k\,(1 - r), \qquad \dot z = \dot h' (h - n)\, z (1 - z), \qquad
    \dot h = z\,\dot h' + U^\top (\dot r, \dot z, \dot k)

A dot is a slope: of k and of outputs with respect to themselves, of r, z and n with respect to what
goes into them. Inside, rows are columns, `[H, S]` for S sequences: each gate lies in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppo.recording.kernels import KERNELS, Step, takes_one_thread

__all__ = ["GRULayer"]

_WIDEST = 128  # beyond, arithmetic outweighs overhead, and torch may take several threads for it

_Arrays = Sequence[np.ndarray]
_Run = Callable[[], None]


class GRULayer(nn.GRU):
    """`nn.GRU` of one layer; in the operations of this module where they are faster.

    That is on the CPU, in float32 or float64, up to a width of 128, for sequences `[L, S, F]` that
    begin with states `[1, S, H]`. Anything else is torch's.

    Args:
        num_inputs: Width F of the inputs.
        size: Width H of the outputs.
        device: Where the parameters are made.

    Example:
        >>> layer = GRULayer(3, 8)
        >>> outputs, state = layer(torch.ones(5, 2, 3), torch.zeros(1, 2, 8))
        >>> outputs.shape, state.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))

    Source:
        Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder", 2014.
    """

    def __init__(
        self, num_inputs: int, size: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__(num_inputs, size, device=device)

    def forward(self, inputs: Any, state: Tensor | None = None) -> tuple[Any, Tensor]:
        """Outputs `[L, S, H]`, and the states behind the last ones `[1, S, H]`."""
        core: Any = self
        weights = core.weight_ih_l0, core.weight_hh_l0, core.bias_ih_l0, core.bias_hh_l0
        if state is None or not _is_plain([inputs, state, *weights]):
            return super().forward(inputs, state)
        outputs: Tensor = _Layer.apply(inputs.contiguous(), state[0], *weights)[0]  # type: ignore[no-untyped-call]
        return outputs, outputs[-1:]


def _is_plain(tensors: Sequence[Any]) -> bool:
    """True for sequences, states and weights that the operations are for."""
    inputs, state, weight, *_ = tensors
    return (
        isinstance(inputs, Tensor)
        and inputs.dtype in (torch.float32, torch.float64)
        and {(t.device.type, t.dtype) for t in tensors} == {("cpu", inputs.dtype)}
        and inputs.ndim == 3
        and inputs.numel() > 0
        and inputs.shape[2] == weight.shape[1]
        and state.shape == (1, inputs.shape[1], len(weight) // 3)
        and state.shape[2] <= _WIDEST
        and not torch.is_autocast_enabled("cpu")
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(*args: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.ppo.gru_layer.default(*args)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if slopes is None:
            return (None,) * 6
        x, start, w, u, b, d, hidden, gates = ctx.saved_tensors
        if torch.is_grad_enabled():  # there will be second derivatives, which torch has
            known = [t for t in (x, start, w, u, b, d) if t.requires_grad]
            outputs = torch.gru(x, start[None], [w, u, b, d], True, 1, 0.0, False, False, False)[0]
            found = iter(torch.autograd.grad(outputs, known, slopes, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        gradients: tuple[Tensor, ...] = torch.ops.ppo.gru_layer_backward.default(
            slopes, x, w, u, hidden, gates
        )
        return gradients


def _results(
    x: Tensor, start: Tensor, w: Tensor, u: Tensor, b: Tensor, d: Tensor
) -> tuple[Tensor, ...]:
    """Outputs `[L, S, H]`, states from the start to the end `[L + 1, H, S]`, gates r, z, n, k."""
    (length, count, _), size = x.shape, u.shape[1]
    shapes = (length, count, size), (length + 1, size, count), (length, 4 * size, count)
    return tuple(x.new_empty(shape) for shape in shapes)


def _forward(results: _Arrays, args: _Arrays) -> _Run:
    (outputs, hidden, gates), (x, start, w, u, b, d) = results, args
    (length, count, _), size = x.shape, u.shape[1]
    r, z, n, k = gates.reshape(length, 4, size, count).swapaxes(0, 1)
    sigmoids, given = gates[:, : 2 * size], gates[:, : 3 * size]
    product, bias, bias_of_k = np.empty_like(given[0]), np.empty_like(given[0]), np.empty_like(k[0])
    of_sigmoids, of_k = product[: 2 * size], product[2 * size :]
    half, one = np.array(0.5, x.dtype), np.array(1.0, x.dtype)
    steps = list(zip(hidden[:-1], hidden[1:], sigmoids, r, z, n, k, strict=True))

    def run() -> None:
        np.copyto(bias, b[:, None])
        bias[: 2 * size] += d[: 2 * size, None]
        np.copyto(bias_of_k, d[2 * size :, None])
        _product(w, x.swapaxes(1, 2), given)
        np.add(given, bias, given)
        np.copyto(hidden[0], start.T)
        for before, after, sigmoid, reset, keep, new, kept in steps:
            _product(u, before, product)
            np.add(sigmoid, of_sigmoids, sigmoid)
            np.multiply(sigmoid, half, sigmoid)  # (1 + tanh(a / 2)) / 2
            np.tanh(sigmoid, sigmoid)
            np.add(sigmoid, one, sigmoid)
            np.multiply(sigmoid, half, sigmoid)
            np.add(of_k, bias_of_k, kept)
            np.multiply(reset, kept, of_k)
            np.add(new, of_k, new)
            np.tanh(new, new)
            np.subtract(before, new, after)
            np.multiply(keep, after, after)
            np.add(new, after, after)
        np.copyto(outputs, hidden[1:].swapaxes(1, 2))

    return run


def _gradients(
    slopes: Tensor, x: Tensor, w: Tensor, u: Tensor, hidden: Tensor, gates: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x, start, w, u, b and d, in their shapes."""
    start, bias = x.new_empty(slopes.shape[1:]), w[:, 0]
    return tuple(x.new_empty(like.shape) for like in (x, start, w, u, bias, bias))


def _backward(results: _Arrays, args: _Arrays) -> _Run:
    (d_x, d_start, d_w, d_u, d_b, d_d), (slopes, x, w, u, hidden, gates) = results, args
    (length, count, width), size = x.shape, u.shape[1]
    r, z, n, k = gates.reshape(length, 4, size, count).swapaxes(0, 1)
    factors = np.empty((length, 3, size, count), x.dtype)  # then slopes, of r, z and k
    of_r, of_z, of_k = factors.swapaxes(0, 1)
    of_n, pulls = np.empty_like(n), np.empty_like(n)
    one, carry, kept = np.array(1.0, x.dtype), np.empty_like(n[0]), np.empty_like(n[0])
    back = list(zip(pulls, factors, factors.reshape(length, -1, count), z, strict=True))[::-1]
    # The slopes of all steps side by side, [r z n k, L * S]; the same memory serves before and
    # after the steps, as less of it stays in the cache.
    joined = np.empty((4, size, length, count), x.dtype)
    flat = joined.reshape(4 * size, length * count)
    rest, other = joined.reshape(4, *n.shape)[:2]
    before = pulls.reshape(length, count, size)
    rows, inputs, sums = before.reshape(-1, size), x.reshape(-1, width), np.empty_like(flat[:, 0])

    def run() -> None:
        np.subtract(one, z, rest)
        np.multiply(n, n, of_n)
        np.subtract(one, of_n, of_n)
        np.multiply(of_n, rest, of_n)
        np.multiply(of_n, r, of_k)
        np.subtract(one, r, other)
        np.multiply(other, k, other)
        np.multiply(of_k, other, of_r)
        np.subtract(hidden[:-1], n, of_z)
        np.multiply(rest, z, rest)
        np.multiply(of_z, rest, of_z)
        np.copyto(pulls, slopes.swapaxes(1, 2))
        carry.fill(0.0)
        for pull, factor, gate, keep in back:
            np.add(pull, carry, pull)
            np.multiply(factor, pull, factor)
            _product(u.T, gate, carry)
            np.multiply(keep, pull, kept)
            np.add(carry, kept, carry)
        np.copyto(d_start, carry.T)
        np.multiply(of_n, pulls, of_n)
        for place, found in zip(joined, (of_r, of_z, of_n, of_k), strict=True):
            np.copyto(place, found.swapaxes(0, 1))
        np.copyto(before, hidden[:-1].swapaxes(1, 2))
        _product(flat[: 3 * size], inputs, d_w)
        _product(flat[: 3 * size].T, w, d_x.reshape(-1, width))
        np.add.reduce(flat, 1, out=sums)
        np.copyto(d_b, sums[: 3 * size])
        for part in (slice(2 * size), slice(-size, None)):  # r and z; k, not n
            _product(flat[part], rows, d_u[part])
            np.copyto(d_d[part], sums[part])

    return run


def _product(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """The product of a matrix and another one, or several; NumPy's where that takes one thread."""
    rows, inner = x.shape
    if not takes_one_thread(rows, inner, y.shape[-1]):
        torch.matmul(torch.from_numpy(x), torch.from_numpy(y), out=torch.from_numpy(out))
    elif y.ndim == 2:
        np.dot(x, y, out)
    else:
        np.matmul(x, y, out)


def _define(
    name: str,
    signature: str,
    make: Callable[..., tuple[Tensor, ...]],
    prepare: Callable[[_Arrays, _Arrays], _Run],
) -> None:
    """An operator of torch's, and how a recording repeats it: the same, in memory that stays.

    Args:
        name: Its name, among `torch.ops.ppo`.
        signature: Arguments and results, all tensors.
        make: Makes the results of these arguments, without values.
        prepare: From results and arguments to what computes the one from the other.
    """

    def prepared(results: Sequence[Tensor], args: Sequence[Tensor]) -> _Run:
        return prepare(*([t.detach().numpy() for t in tensors] for tensors in (results, args)))

    def compute(*args: Tensor) -> tuple[Tensor, ...]:
        results = make(*args)
        with np.errstate(all="ignore"):
            prepared(results, args)()
        return results

    def kernel(*tensors: Tensor) -> list[Step]:
        count = len(operator._schema.returns)
        return [(prepared(tensors[:count], tensors[count:]), ())]

    _library.define(name + signature)
    _library.impl(name, compute, "CPU")
    _library.impl(name, make, "Meta")
    operator: Any = getattr(torch.ops.ppo, name).default
    KERNELS[operator] = kernel


_library = torch.library.Library("ppo", "FRAGMENT")
_define(
    "gru_layer",
    "(Tensor x, Tensor start, Tensor w, Tensor u, Tensor b, Tensor d) -> (Tensor, Tensor, Tensor)",
    _results,
    _forward,
)
_define(
    "gru_layer_backward",
    "(Tensor slopes, Tensor x, Tensor w, Tensor u, Tensor hidden, Tensor gates)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _backward,
)
