"""What tells whether the critic is sound."""

import math
from typing import Any, TypeVar, cast

import numpy.typing as npt
import torch
from torch import Tensor

from ppo._checks import at_least_float32, check_rows, to_tensors
from ppo._masks import all_of
from ppo._reductions import masked_moments

__all__ = ["explained_variance"]

ArrayT = TypeVar("ArrayT", Tensor, npt.NDArray[Any])


def explained_variance(values: ArrayT, returns: ArrayT, valid: ArrayT | None = None) -> ArrayT:
    r"""Return the share of the variance of the returns that the values explain.

    .. math:: 1 - \frac{\operatorname{Var}(R - V)}{\operatorname{Var}(R)}

    1 is a perfect critic, 0 one that might as well be a constant, below 0 a harmful one. NaN
    where the returns do not vary.

    Args:
        values: V(s_t), of any shape, in units of return.
        returns: R_t, of the same shape.
        valid: Bool: the rows that count; None means all.

    Returns:
        The share: a tensor without axes, or a NumPy array without axes for NumPy arrays.

    Raises:
        ValueError, TypeError: As :func:`~ppo.ppo_loss`, and for tensors mixed with NumPy arrays.

    Example:
        >>> explained_variance(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.6667)

    Source:
        openai/baselines, ``common/math_util.py``.
    """
    arrays: dict[str, object] = {"values": values, "returns": returns}
    if valid is not None:
        arrays["valid"] = valid
    (v, r, *mask), restore = to_tensors(arrays)
    counted = mask[0] if mask else None
    check_rows(counted, values=v, returns=r)
    with torch.no_grad():
        v, r = at_least_float32(v, r)
        share = _share_on_cpu(v, r, counted) if r.is_cpu else _share(v, r, counted)
    return cast("ArrayT", restore(share))


def _share(v: Tensor, r: Tensor, counted: Tensor | None) -> Tensor:
    """The share as a tensor, without a look at any number."""
    _, total = masked_moments(r, counted)
    _, unexplained = masked_moments(r - v, counted)
    return torch.where(total > 0, 1 - unexplained / total, torch.nan)


def _share_on_cpu(v: Tensor, r: Tensor, counted: Tensor | None) -> Tensor:
    """The same in a quarter of the operations: what is on the host can be looked at."""
    if counted is not None and not all_of(counted):
        v, r = v[counted], r[counted]
    if not r.numel():
        return r.new_tensor(math.nan)
    # This one is 0 for equal numbers, however many; that of torch.var may be rounding.
    total, _ = torch.var_mean(r, correction=0)
    known, unexplained = torch.stack([total, torch.var(r - v, correction=0)]).tolist()
    return r.new_tensor(1.0 - unexplained / known if known > 0.0 else math.nan)
