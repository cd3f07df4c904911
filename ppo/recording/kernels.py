"""How to repeat single torch operations on fixed memory, in NumPy where that is faster.

A call of NumPy costs about a third of one of torch; matrix products stay torch's, whose threads
the caller controls. A kernel gets the result's tensor and the operation's arguments, and returns
the steps that write the result again, or None where it does not hold for these arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CONSTANTS", "KERNELS", "Step", "takes_one_thread"]

Step = tuple[Callable[..., object], Sequence[Any]]
Kernel = Callable[..., "list[Step] | None"]

_aten = torch.ops.aten

CONSTANTS = {
    _aten.ones_like.default,
    _aten.zeros_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}
"""Operations whose result depends on the shape of their arguments alone."""


def _arrays(values: Sequence[Any]) -> list[Any]:
    return [value.numpy() if isinstance(value, Tensor) else value for value in values]


def _same_type(result: Tensor, values: Sequence[Any]) -> bool:
    """True if NumPy computes in the type of the result, as torch does."""
    return result.dtype in (torch.float32, torch.float64) and all(
        value.dtype == result.dtype if isinstance(value, Tensor) else not isinstance(value, bool)
        for value in values
    )


# What takes `out` by position, too, which is a third faster for few numbers.
_BY_POSITION = {
    *(np.add, np.subtract, np.multiply, np.divide, np.negative, np.exp, np.log, np.tanh, np.sqrt),
    *(np.expm1, np.log1p, np.greater_equal, np.less_equal, np.greater, np.less, np.dot, np.matmul),
}


def _written_by(function: Callable[..., Any], out: Any, *args: Any) -> Step:
    if function in _BY_POSITION:
        return function, (*args, out)
    return functools.partial(function, out=out), args


def _copied_where(mask: np.ndarray, out: np.ndarray, source: np.ndarray) -> Step:
    return np.copyto, (out, source, "same_kind", mask)


def _elementwise(ufunc: np.ufunc) -> Kernel:
    def kernel(result: Tensor, *args: Any) -> list[Step] | None:
        if not _same_type(result, args):
            return None
        out = result.numpy()
        # Python's numbers would be converted in every call.
        constants = [x if isinstance(x, Tensor) else np.asarray(x, out.dtype) for x in args]
        return [_written_by(ufunc, out, *_arrays(constants))]

    return kernel


def _comparison(ufunc: np.ufunc) -> Kernel:
    def kernel(result: Tensor, x: Tensor, other: Any) -> list[Step] | None:
        if not _same_type(x, [other]):
            return None
        array = x.numpy()
        return [_written_by(ufunc, result.numpy(), array, np.asarray(other, array.dtype))]

    return kernel


def _power(result: Tensor, x: Tensor, exponent: Any) -> list[Step] | None:
    if exponent != 2 or not _same_type(result, [x]):
        return None
    return [_written_by(np.multiply, result.numpy(), x.numpy(), x.numpy())]


def _clamp(result: Tensor, x: Tensor, low: Any = None, high: Any = None) -> list[Step] | None:
    if not _same_type(result, [x]) or low is high is None:
        return None
    out, steps, array = result.numpy(), [], x.numpy()
    for ufunc, bound in ((np.maximum, low), (np.minimum, high)):
        if bound is not None:
            steps.append(_written_by(ufunc, out, array, np.asarray(bound, out.dtype)))
            array = out
    return steps


def _relu(result: Tensor, x: Tensor) -> list[Step] | None:
    return _clamp(result, x, 0.0)


def _tanh_backward(result: Tensor, grad: Tensor, tanh: Tensor) -> list[Step] | None:
    if not _same_type(result, [grad, tanh]):
        return None
    d, h, out = _arrays([grad, tanh, result])
    return [
        _written_by(np.multiply, out, h, h),
        _written_by(np.subtract, out, np.ones((), h.dtype), out),
        _written_by(np.multiply, out, d, out),
    ]


def _threshold_backward(result: Tensor, grad: Tensor, x: Tensor, at: Any) -> list[Step] | None:
    if not _same_type(result, [grad, x]):
        return None
    d, h, out = _arrays([grad, x, result])
    stops = np.empty(h.shape, np.bool_)
    return [
        # False for NaN, which passes in torch too.
        _written_by(np.less_equal, stops, h, np.asarray(at, h.dtype)),
        (np.copyto, (out, d)),
        _copied_where(stops, out, np.zeros((), out.dtype)),
    ]


def _where(result: Tensor, condition: Tensor, x: Tensor, other: Tensor) -> list[Step] | None:
    if condition.dtype != torch.bool or not _same_type(result, [x, other]):
        return None
    mask, yes, no, out = _arrays([condition, x, other, result])
    return [
        (np.copyto, (out, no)),
        _copied_where(mask, out, yes),
    ]


def _copy(result: Tensor, x: Tensor) -> list[Step] | None:
    return [(np.copyto, (result.numpy(), x.numpy()))] if _same_type(result, [x]) else None


def _cat(result: Tensor, parts: Sequence[Tensor], axis: int = 0) -> list[Step] | None:
    if not _same_type(result, parts) or any(part.ndim != result.ndim for part in parts):
        return None
    homes = result.split([part.shape[axis] for part in parts], axis)
    return [(np.copyto, _arrays(pair)) for pair in zip(homes, parts, strict=True)]


def _argmax(result: Tensor, x: Tensor, axis: Any = None, keep: bool = False) -> list[Step] | None:
    if axis is None or keep or x.dtype not in (torch.float32, torch.float64):
        return None
    return [(x.numpy().argmax, (axis, result.numpy()))]


def _sum(result: Tensor, x: Tensor, axes: Any = (), keep: bool = False) -> list[Step] | None:
    if not _same_type(result, [x]) or x.ndim == 0:
        return None
    over = {axis % x.ndim for axis in axes or range(x.ndim)}
    if x.ndim <= 2 and len(over) == 1 and 0 not in x.stride() and result.is_contiguous():
        # As a product with ones: for a few columns several times faster than a reduction.
        rows, columns = x.shape if x.ndim == 2 else (len(x), 1)
        if over == {1}:
            return _mm(result.view(rows, 1), x, torch.ones(columns, 1, dtype=x.dtype))
        ones, matrix = torch.ones(1, rows, dtype=x.dtype), x.view(rows, columns)
        if takes_one_thread(1, rows, columns):
            return [_written_by(np.dot, *_arrays([result.view(columns), ones[0], matrix]))]
        return _mm(result.view(1, columns), ones, matrix)
    reduce = functools.partial(np.add.reduce, axis=tuple(over), keepdims=keep)
    return [_written_by(reduce, result.numpy(), x.numpy())]


def _multinomial(
    result: Tensor,
    weights: Tensor,
    number: int,
    replacement: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> list[Step] | None:
    """One class for each row: the one with the largest weight / Exp(1), which is torch's own way.

    Torch looks for weights that are no distribution first, in ten operations. Here two find what
    may be none, which is left to torch, as are all weights of 0.
    """
    if number != 1 or weights.ndim != 2 or not weights.numel() or not weights.is_contiguous():
        return None
    if weights.dtype not in (torch.float32, torch.float64):
        return None
    waits = torch.empty_like(weights)
    ratios, values, classes = waits.numpy(), weights.numpy(), result.numpy()[:, 0]
    flat = values.reshape(-1)

    def draw() -> None:
        if flat[flat.argmin()] > 0.0 and flat[flat.argmax()] < math.inf:
            waits.exponential_(generator=generator)
            np.divide(values, ratios, ratios)
            ratios.argmax(-1, classes)
        else:
            _aten.multinomial.out(weights, 1, replacement, generator=generator, out=result)

    return [(draw, ())]


# NumPy's BLAS has no public switch for its threads, which wait by spinning; for products of up to
# so many terms it takes none. (Matrix times vector has a lower limit.)
_TERMS_OF_ONE_THREAD = 2**18
_TERMS_OF_ONE_THREAD_BY_A_VECTOR = 2**15


def takes_one_thread(rows: int, inner: int, columns: int) -> bool:
    """True for a product of matrices, `[rows, inner]` and `[inner, columns]`, for NumPy's BLAS."""
    limit = _TERMS_OF_ONE_THREAD if min(rows, columns) > 1 else _TERMS_OF_ONE_THREAD_BY_A_VECTOR
    return rows * inner * columns <= limit


def _row_by_row(x: Tensor, y: Tensor) -> bool:
    """True for rows so few that somebody acts: they are taken as in `ppo.policies.numpy_actor`."""
    return len(x) <= 16 and x.is_contiguous() and takes_one_thread(1, *y.shape)


def _mm(result: Tensor, x: Tensor, y: Tensor) -> list[Step] | None:
    if not _same_type(result, [x, y]):
        return None
    rows, inner, columns = *x.shape, y.shape[1]
    few = takes_one_thread(rows, inner, columns)
    out, *factors = _arrays([result, x, y])
    if _row_by_row(x, y):
        return [_written_by(np.matmul, out[:, None], factors[0][:, None], factors[1])]
    if few and out.flags.c_contiguous and all(factor.flags.forc for factor in factors):
        return [_written_by(np.dot, out, *factors)]  # the same, and half a microsecond less
    if inner == 1:
        return [_written_by(np.multiply, out, *factors)]
    if few:
        return [_written_by(np.matmul, out, *factors)]
    return [_written_by(torch.mm, result, x, y)]


def _by_torch(function: Callable[..., Any]) -> Kernel:
    """Torch's function, which takes a microsecond less to call than the operator."""

    def kernel(result: Tensor, *args: Any) -> list[Step]:
        return [_written_by(function, result, *args)]

    return kernel


def _addmm(result: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> list[Step] | None:
    if result.shape[1] > 8 and not _row_by_row(x, y):
        if not _same_type(result, [bias, x, y]):
            return None
        # NumPy spreads the bias over the rows faster than torch would.
        copied = np.copyto, (result.numpy(), bias.numpy())
        return [copied, _written_by(torch.addmm, result, result, x, y)]
    product = _mm(result, x, y)
    if product is None:
        return None
    out = result.numpy()
    return [*product, _written_by(np.add, out, out, bias.numpy())]


KERNELS: dict[Any, Kernel] = {
    _aten.add.Tensor: _elementwise(np.add),
    _aten.sub.Tensor: _elementwise(np.subtract),
    _aten.mul.Tensor: _elementwise(np.multiply),
    _aten.div.Tensor: _elementwise(np.divide),
    _aten.minimum.default: _elementwise(np.minimum),
    _aten.maximum.default: _elementwise(np.maximum),
    _aten.neg.default: _elementwise(np.negative),
    _aten.exp.default: _elementwise(np.exp),
    _aten.log.default: _elementwise(np.log),
    _aten.tanh.default: _elementwise(np.tanh),
    _aten.sqrt.default: _elementwise(np.sqrt),
    _aten.expm1.default: _elementwise(np.expm1),
    _aten.log1p.default: _elementwise(np.log1p),
    _aten.ge.Scalar: _comparison(np.greater_equal),
    _aten.le.Scalar: _comparison(np.less_equal),
    _aten.gt.Scalar: _comparison(np.greater),
    _aten.lt.Scalar: _comparison(np.less),
    _aten.pow.Tensor_Scalar: _power,
    _aten.clamp.default: _clamp,
    _aten.relu.default: _relu,
    _aten.tanh_backward.default: _tanh_backward,
    _aten.threshold_backward.default: _threshold_backward,
    _aten.where.self: _where,
    _aten.clone.default: _copy,
    _aten.cat.default: _cat,
    _aten.argmax.default: _argmax,
    _aten.multinomial.default: _multinomial,
    _aten.sum.dim_IntList: _sum,
    _aten.sum.default: _sum,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.gather.default: _by_torch(torch.gather),
    _aten.scatter_add.default: _by_torch(torch.scatter_add),
    _aten._softmax.default: _by_torch(torch._softmax),
    _aten._log_softmax.default: _by_torch(torch._log_softmax),
    _aten._log_softmax_backward_data.default: _by_torch(torch._log_softmax_backward_data),
}
"""By operator; whatever is not here is called again as it is."""
