"""Returns and advantages of rollouts: how good was what was done.

Time runs along the first axis; any further axes are carried through (``[T]``, ``[T, N]``,
``[T, N, agents]``). Two flags have two jobs: ``terminated`` removes the future, and either flag
cuts the trace. A truncated step bootstraps from the value of its true successor, and so does the
last row of the data.

Tensors give tensors and NumPy arrays give NumPy arrays; no gradient flows and no argument is
modified. The result has the widest dtype among the numbers, float32 at least.
"""

from typing import Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import NamedTuple

from ppo._checks import (
    at_least_float32,
    check_flags,
    check_floating,
    check_non_negative,
    check_positive_integer,
    check_same_shape,
    check_unit_interval,
    open_trajectory,
    to_tensors,
)
from ppo._masks import zero_where_
from ppo._reductions import masked_moments
from ppo._scan import as_arrays, reverse_scan_, scan_blocks

__all__ = [
    "AdvantageEstimate",
    "discounted_returns",
    "gae",
    "lambda_returns",
    "n_step_returns",
    "normalize",
]

ArrayT = TypeVar("ArrayT", Tensor, npt.NDArray[Any])


class AdvantageEstimate(NamedTuple, Generic[ArrayT]):
    """Advantages and the value targets that belong to them.

    Attributes:
        advantages: Â_t, ``[T, ...]``, in units of reward.
        returns: Â_t + V(s_t), ``[T, ...]``, the λ-returns.
    """

    advantages: ArrayT
    returns: ArrayT


def gae(
    rewards: ArrayT,
    values: ArrayT,
    next_values: ArrayT,
    terminated: ArrayT,
    truncated: ArrayT | None = None,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> AdvantageEstimate[ArrayT]:
    r"""Estimate advantages by generalised advantage estimation.

    Going backwards in time,

    .. math::

        \delta_t &= r_t + \gamma\,[\text{not terminated}_t]\,V(s'_t) - V(s_t) \\
        \hat A_t &= \delta_t + \gamma\lambda\,
            [\text{not terminated}_t \text{ and not truncated}_t]\,\hat A_{t+1} \\
        \hat R_t &= \hat A_t + V(s_t)

    The last row needs no special case: it bootstraps from ``next_values[T-1]`` like any other.

    Args:
        rewards: r_t, ``[T, ...]``, what the environment paid.
        values: V(s_t), ``[T, ...]``, in units of reward.
        next_values: V(s'_t), ``[T, ...]``, the value of the state the action led to, before any
            reset. Ignored, even if NaN or infinite, where ``terminated``.
        terminated: ``[T, ...]``, bool: the episode reached an end; there is no future.
        truncated: ``[T, ...]``, bool: the episode was cut off; its future is ``next_values``.
            Where both flags hold, termination wins. None means that none was.
        gamma: Discount γ per step, in [0, 1].
        gae_lambda: Trace decay λ per step, in [0, 1].

    Returns:
        ``AdvantageEstimate(advantages, returns)``, each ``[T, ...]``.

    Raises:
        ValueError: For unequal shapes, T = 0, or a coefficient outside [0, 1].
        TypeError: For flags that are not boolean, numbers that are not floating, or tensors
            mixed with NumPy arrays.

    Example:
        >>> import torch
        >>> advantages, returns = gae(
        ...     rewards=torch.tensor([1.0, 2.0, 3.0]),
        ...     values=torch.tensor([5.0, 6.0, 7.0]),
        ...     next_values=torch.tensor([6.0, torch.nan, 8.0]),
        ...     terminated=torch.tensor([False, True, False]),
        ...     gamma=0.9,
        ...     gae_lambda=0.8,
        ... )
        >>> advantages
        tensor([-1.4800, -4.0000,  3.2000])
        >>> returns
        tensor([ 3.5200,  2.0000, 10.2000])

    Source:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation", 2016, equations 11 to 16.
    """
    check_unit_interval("gamma", gamma)
    check_unit_interval("gae_lambda", gae_lambda)
    numbers, done, cut, restore = open_trajectory(
        {"rewards": rewards, "values": values, "next_values": next_values}, terminated, truncated
    )
    # One piece, since allocators keep that for the next call and hand two back to the system; to
    # touch fresh memory takes longer than the arithmetic.
    results = [half.detach() for half in numbers[0].new_empty(2, *numbers[0].shape)]
    r, v, successor, done, cut, advantages, returns = as_arrays(*numbers, done, cut, *results)
    library: Any = torch if isinstance(v, Tensor) else np
    gamma, trace = float(gamma), float(gamma) * float(gae_lambda)

    def fill(block: slice, x: Any, decay: Any) -> None:
        library.multiply(successor[block], gamma, out=x)
        zero_where_(x, done[block])
        x += r[block]
        x -= v[block]
        decay[...] = ~(done[block] | cut[block])
        decay *= trace

    with np.errstate(all="ignore"):  # as silent as torch
        for block, x in scan_blocks(v, fill):
            advantages[block] = x
            x += v[block]
            returns[block] = x
    return AdvantageEstimate(*map(restore, results))


def lambda_returns(
    rewards: ArrayT,
    values: ArrayT,
    next_values: ArrayT,
    terminated: ArrayT,
    truncated: ArrayT | None = None,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> ArrayT:
    r"""Return the λ-returns, the value targets of :func:`gae`.

    .. math::

        R_t(\lambda) = \hat A_t + V(s_t)
            = (1-\lambda) \sum_{n \ge 1} \lambda^{n-1} R_t^{(n)}

    with the n-step returns of :func:`n_step_returns`. λ = 0 gives the one-step return, λ = 1 the
    Monte-Carlo return with a bootstrap where the data end. The second equation holds, as in every
    rollout, where ``next_values[t]`` is ``values[t+1]`` inside an episode.

    Args:
        rewards: r_t, ``[T, ...]``, what the environment paid.
        values: V(s_t), ``[T, ...]``, in units of reward.
        next_values: V(s'_t), ``[T, ...]``, as for :func:`gae`.
        terminated: ``[T, ...]``, bool.
        truncated: ``[T, ...]``, bool; None means that no step was truncated.
        gamma: Discount γ per step, in [0, 1].
        gae_lambda: Trace decay λ per step, in [0, 1].

    Returns:
        R_t(λ), ``[T, ...]``, in units of reward.

    Raises:
        ValueError: For unequal shapes, T = 0, or a coefficient outside [0, 1].
        TypeError: For flags that are not boolean, numbers that are not floating, or tensors
            mixed with NumPy arrays.

    Example:
        >>> import torch
        >>> rewards, values = torch.ones(2), torch.tensor([7.0, 4.0])
        >>> next_values, never = torch.tensor([4.0, 8.0]), torch.tensor([False, False])
        >>> lambda_returns(rewards, values, next_values, never, gamma=0.5, gae_lambda=0.0)
        tensor([3., 5.])
        >>> lambda_returns(rewards, values, next_values, never, gamma=0.5, gae_lambda=1.0)
        tensor([3.5000, 5.0000])

    Source:
        Sutton and Barto, "Reinforcement Learning: An Introduction", 2nd edition, section 12.1.
    """
    return gae(
        rewards, values, next_values, terminated, truncated, gamma=gamma, gae_lambda=gae_lambda
    ).returns


def n_step_returns(
    rewards: ArrayT,
    next_values: ArrayT,
    terminated: ArrayT,
    truncated: ArrayT | None = None,
    *,
    n: int,
    gamma: float,
) -> ArrayT:
    r"""Return n discounted rewards plus the discounted value of the state they lead to.

    .. math::

        R_t^{(n)} = \sum_{k=0}^{m-1} \gamma^k r_{t+k}
            + \gamma^m\,[\text{not terminated}_{t+m-1}]\,V(s'_{t+m-1})

    where m is n or, if that comes first, the number of steps to the end of the episode or of the
    data.

    Args:
        rewards: r_t, ``[T, ...]``, what the environment paid.
        next_values: V(s'_t), ``[T, ...]``, as for :func:`gae`.
        terminated: ``[T, ...]``, bool.
        truncated: ``[T, ...]``, bool; None means that no step was truncated.
        n: Number of rewards before the bootstrap, at least 1.
        gamma: Discount γ per step, in [0, 1].

    Returns:
        R_t^(n), ``[T, ...]``, in units of reward.

    Raises:
        ValueError: For unequal shapes, T = 0, n < 1, or γ outside [0, 1].
        TypeError: For flags that are not boolean, numbers that are not floating, an ``n`` that is
            no integer, or tensors mixed with NumPy arrays.

    Example:
        >>> import torch
        >>> n_step_returns(
        ...     torch.ones(4),
        ...     torch.full((4,), 8.0),
        ...     terminated=torch.tensor([False, False, False, True]),
        ...     n=2,
        ...     gamma=0.5,
        ... )
        tensor([3.5000, 3.5000, 1.5000, 1.0000])

    Source:
        Sutton and Barto, "Reinforcement Learning: An Introduction", 2nd edition, section 7.1.
    """
    check_unit_interval("gamma", gamma)
    check_positive_integer("n", n)
    numbers, done, cut, restore = open_trajectory(
        {"rewards": rewards, "next_values": next_values}, terminated, truncated
    )
    r, successor = numbers
    with torch.no_grad():
        returns = zero_where_(successor.clone(), done).mul_(gamma).add_(r)
        paid, decay = _until_bootstrap(r, returns, done | cut, gamma)
        for _ in range(min(n, len(r)) - 1):
            returns[:-1] = torch.addcmul(paid[:-1], decay[:-1], returns[1:])
    return cast("ArrayT", restore(returns))


def discounted_returns(
    rewards: ArrayT,
    terminated: ArrayT,
    truncated: ArrayT | None = None,
    next_values: ArrayT | None = None,
    *,
    gamma: float,
) -> ArrayT:
    r"""Return the discounted sum of the rewards up to the end of each episode.

    .. math::

        G_t = \sum_{k=0}^{m-1} \gamma^k r_{t+k}
            + \gamma^m\,[\text{not terminated}_{t+m-1}]\,V(s'_{t+m-1})

    where m is the number of steps to the end of the episode or of the data.

    Args:
        rewards: r_t, ``[T, ...]``, what the environment paid.
        terminated: ``[T, ...]``, bool.
        truncated: ``[T, ...]``, bool; None means that no step was truncated.
        next_values: V(s'_t), ``[T, ...]``, as for :func:`gae`; read only at truncations and in
            the last row. None stands for 0: rewards beyond the data count nothing.
        gamma: Discount γ per step, in [0, 1].

    Returns:
        G_t, ``[T, ...]``, in units of reward.

    Raises:
        ValueError: For unequal shapes, T = 0, or γ outside [0, 1].
        TypeError: For flags that are not boolean, numbers that are not floating, or tensors
            mixed with NumPy arrays.

    Example:
        >>> import torch
        >>> discounted_returns(torch.ones(4), torch.tensor([False, False, True, False]), gamma=0.5)
        tensor([1.7500, 1.5000, 1.0000, 1.0000])

    Source:
        Sutton and Barto, "Reinforcement Learning: An Introduction", 2nd edition, section 3.3.
    """
    check_unit_interval("gamma", gamma)
    numbers: dict[str, object] = {"rewards": rewards}
    if next_values is not None:
        numbers["next_values"] = next_values
    (r, *successor), done, cut, restore = open_trajectory(numbers, terminated, truncated)
    with torch.no_grad():
        last = r.clone()
        if successor:
            last = zero_where_(successor[0].clone(), done).mul_(gamma).add_(r)
        paid, decay = _until_bootstrap(r, last, done | cut, gamma)
        returns = reverse_scan_(paid, decay)
    return cast("ArrayT", restore(returns))


def normalize(x: ArrayT, valid: ArrayT | None = None, *, eps: float = 1e-8) -> ArrayT:
    r"""Shift and scale ``x`` to zero mean and unit standard deviation.

    .. math::

        y = \frac{x - \operatorname{mean}(x)}{\max(\operatorname{std}(x), \text{eps})}

    with the population standard deviation (division by the number of entries). One entry, or
    equal entries, become 0: a spread that is only rounding is not blown up.

    Args:
        x: Numbers of any shape.
        valid: Bool, of the shape of ``x``: the entries that count. Others become 0, whatever they
            held. None means all.
        eps: Smallest standard deviation to divide by, in units of ``x``.

    Returns:
        y, of the shape of ``x``, without unit.

    Raises:
        ValueError: For unequal shapes or a negative ``eps``.
        TypeError: For ``x`` not floating, ``valid`` not boolean, or a tensor mixed with a NumPy
            array.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
        >>> normalize(torch.tensor([0.1, 0.1, 0.1]))
        tensor([0., 0., 0.])

    Source:
        Huang et al., "The 37 Implementation Details of PPO", 2022, core detail 7; Andrychowicz et
        al., "What Matters in On-Policy Reinforcement Learning?", 2021, choice C67.
    """
    check_non_negative("eps", eps)
    arrays: dict[str, object] = {"x": x} if valid is None else {"x": x, "valid": valid}
    (numbers, *mask), restore = to_tensors(arrays)
    check_floating("x", numbers)
    if mask:
        check_flags("valid", mask[0])
        check_same_shape("valid", mask[0], "x", numbers)
    with torch.no_grad():
        (numbers,) = at_least_float32(numbers)
        counted = mask[0] if mask else None
        mean, variance = masked_moments(numbers, counted)
        result = (numbers - mean) / variance.sqrt().clamp(min=eps)
        seen = variance > 0 if counted is None else counted & (variance > 0)
        result = torch.where(seen, result, 0.0)
    return cast("ArrayT", restore(result))


def _until_bootstrap(
    rewards: Tensor, one_step: Tensor, ended: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Split a return into what a row adds and the factor of the next row's return.

    Rows that end an episode, and the last row, are closed: they hold their one-step return and
    take nothing from the row after.
    """
    closed = ended.clone()
    closed[-1] = True
    paid = torch.where(closed, one_step, rewards)
    decay = zero_where_(torch.full_like(paid, gamma), closed)
    return paid, decay
