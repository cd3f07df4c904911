"""The linear recurrence behind every return, advantage and discounted sum of the library."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A tensor or a NumPy array: slices, `+=` and `*=` are written alike.
_Array = Any
_Steps = list[tuple[_Array, ...]]

# All measured on float32 with one thread, from 16 steps to 2048 and from one column to 8192.
# Bytes of an array's block, of which seven are in use at a time. With a second cache of 1 MB half
# as much is a tenth slower for many short rows, as operations begin more often, and 3 % faster for
# long ones; with one of 2 MB it is up to a tenth faster.
_BLOCK = 2**19
# Smaller arrays are solved in NumPy, where views and operations begin sooner; in larger ones torch
# gets faster over the gaps between every second row.
_SMALL = 2**13
_FEW = 8  # rows


def reverse_scan_(x: Tensor, c: Tensor) -> Tensor:
    """Solve ``y[t] = x[t] + c[t] * y[t+1]`` backwards along the first axis, in place.

    The last row stays as it is: ``y[T-1] = x[T-1]``. On return ``x`` holds the solution and
    ``c`` is scratch.

    Args:
        x: ``[T, ...]``, overwritten with the solution.
        c: ``[T, ...]``, of the shape and dtype of ``x``; overwritten.

    Returns:
        ``x``.

    Example:
        >>> import torch
        >>> reverse_scan_(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.5]))
        tensor([1.7500, 1.5000, 1.0000])
    """
    with np.errstate(all="ignore"):  # as silent as torch
        _take(_plan(*as_arrays(x, c)))
    return x


def as_arrays(*xs: Tensor) -> list[_Array]:
    """Return tensors on the CPU as NumPy arrays in the same memory; others without gradient."""
    return [x.numpy(force=True) if x.is_cpu else x.detach() for x in xs]


def scan_blocks(
    like: _Array, fill: Callable[[slice, _Array, _Array], None]
) -> Iterator[tuple[slice, _Array]]:
    """Solve the recurrence of :func:`reverse_scan_` in blocks of rows that stay in the cache.

    Off the CPU everything is one block.

    Args:
        like: ``[T, ...]``, from :func:`as_arrays`: of the shape, dtype and kind of ``x``.
        fill: Gets the rows of a block and two arrays of that length, and overwrites these with
            ``x`` and ``c``.

    Yields:
        The rows of a block and their solution, the last block first. The solution may be
        overwritten, and the next block does so.
    """
    num_steps, on_cpu = len(like), isinstance(like, np.ndarray)
    num_blocks = max(1, -(-like.nbytes // _BLOCK)) if on_cpu else 1
    rows = -(-num_steps // num_blocks)
    if on_cpu:
        x, c = np.empty((2, rows, *like.shape[1:]), like.dtype)
    else:
        x, c = like.new_empty(2, rows, *like.shape[1:]).unbind()
    steps = _plan(x, c)
    behind = None
    for stop in range(num_steps, 0, -rows):
        start = max(0, stop - rows)
        # The earliest block may be shorter. What the one behind it left in the rows before does
        # no harm: a solution depends only on later rows.
        part, factors = x[start - stop :], c[start - stop :]
        fill(slice(start, stop), part, factors)
        if behind is not None:
            part[-1:] += factors[-1:] * behind
        _take(steps)
        if start > 0:
            behind = part[:1].copy()
        yield slice(start, stop), part


def _plan(x: _Array, c: _Array) -> _Steps:
    """Return the operations that solve the recurrence in ``x`` and ``c``, for :func:`_take`.

    What they hold are views, which cost as much as the arithmetic; they may be taken again.
    """
    if not isinstance(x, np.ndarray):
        return _halving(x, c)
    # NumPy is faster on a vector than on a single column.
    x, c = (y.reshape(len(y)) if y.size == len(y) else y for y in (x, c))
    if len(x) <= 2 * _FEW:  # wide rows; to halve them takes three times the arithmetic
        return _row_by_row(x, c)
    steps = _halving(x, c)
    if x.size <= _SMALL:
        return steps
    return [tuple(y if y is None else torch.from_numpy(y) for y in step) for step in steps]


def _halving(x: _Array, c: _Array) -> _Steps:
    """Halve the recurrence until few rows are left.

    Each even row takes in the odd row behind it. That leaves the same recurrence between the even
    rows, with products as factors; once it is solved, each odd row takes in the even row behind
    it. Row by row it would be T operations, this is three for each factor of 2 in T.

    Source:
        Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.
    """
    if len(x) <= _FEW:
        return _row_by_row(x, c)
    even, odd, even_c, odd_c = x[::2], x[1::2], c[::2], c[1::2]
    pairs, gaps = len(odd), len(even) - 1
    return [
        (even[:pairs], even_c[:pairs], odd, odd_c),
        *_halving(even, even_c),
        (odd[:gaps], odd_c[:gaps], even[1:], None),
    ]


def _row_by_row(x: _Array, c: _Array) -> _Steps:
    rows, factors = ([y[t : t + 1] for t in range(len(y))] for y in (x, c))
    return [(rows[t], factors[t], rows[t + 1], None) for t in range(len(x) - 2, -1, -1)]


def _take(steps: _Steps) -> None:
    """Do ``x += c * y`` and, unless ``d`` is None, ``c *= d`` for each ``x, c, y, d`` in turn."""
    for x, c, y, d in steps:
        if isinstance(x, Tensor):
            x.addcmul_(c, y)
        else:
            x += c * y
        if d is not None:
            c *= d


def reverse_scan_plain_(x: Tensor, c: Tensor) -> Tensor:
    """Solve the same recurrence row by row; leaves ``c`` alone."""
    rows, factors = x.unbind(0), c.unbind(0)
    for t in range(x.shape[0] - 2, -1, -1):
        rows[t].addcmul_(factors[t], rows[t + 1])
    return x
