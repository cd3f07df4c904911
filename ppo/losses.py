"""The clipped surrogate loss of PPO, and its parts.

Everything here takes and returns tensors, looks into no network and never waits for a device:
no value is read on the host, so the functions can be traced, compiled and run under autocast.
Half-precision inputs are computed in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo._checks import at_least_float32, check_above_1, check_limit, check_rows, require
from ppo._reductions import masked_mean, select

__all__ = [
    "PPOLoss",
    "approximate_kl",
    "clip_fraction",
    "policy_loss",
    "ppo_loss",
    "value_loss",
]

# exp(20) = 4.9e8 is far beyond any clip range, and leaves an advantage of 1e29 finite in float32.
MAX_LOG_RATIO = 20.0


class PPOLoss(NamedTuple):
    """The loss to descend and what it is made of, each a tensor without axes.

    Attributes:
        total: The loss; the only field that carries a gradient.
        policy_loss: Minus the clipped surrogate objective, in units of advantage.
        value_loss: Mean squared error of the values, in units of return squared.
        entropy: Mean entropy of the policy, in nats.
        approx_kl: Estimate of KL(old policy, new policy), in nats.
        clip_fraction: Share of the rows whose ratio left the clip range.
    """

    total: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    clip_range: float | Tensor = 0.2,
    value_coef: float | Tensor = 0.5,
    entropy_coef: float | Tensor = 0.0,
    value_clip_range: float | Tensor | None = None,
    old_values: Tensor | None = None,
    valid: Tensor | None = None,
    clip_range_high: float | Tensor | None = None,
    dual_clip: float | None = None,
) -> PPOLoss:
    r"""Return the loss of PPO and its parts.

    .. math:: L = L^{\text{policy}} + c_v\,L^{\text{value}} - c_e\,\operatorname{mean}(H)

    with :func:`policy_loss` and :func:`value_loss`. The value loss carries no ½: coefficients
    port from Stable-Baselines3 unchanged, those of CleanRL are halved. Parts whose inputs are
    None are 0.

    All tensors have one shape, say ``[B]`` or ``[T, N]``. Coefficients and clip ranges are
    numbers or tensors without axes (on the device of the rest).

    Args:
        log_probs: log π(a_t|s_t) under the policy that learns, in nats.
        old_log_probs: The same under the policy that collected, in nats.
        advantages: Â_t, in units of reward or normalised; taken as constants.
        values: V(s_t) of the critic that learns, in units of return.
        returns: The targets of ``values``; taken as constants.
        entropy: Entropy of the policy in s_t, in nats.
        clip_range: ε, the largest useful departure of the ratio from 1.
        value_coef: c_v, the weight of the value loss.
        entropy_coef: c_e, the weight of the entropy; the number 0 leaves it out of the gradient.
        value_clip_range: Largest useful departure from ``old_values``; None for no clipping.
        old_values: V(s_t) of the critic that collected; needed with ``value_clip_range``.
        valid: Bool: the rows that count. Others reach neither means nor gradients, whatever they
            hold. None means all.
        clip_range_high: ε⁺, the same upwards; None for ``clip_range`` on both sides.
        dual_clip: c > 1 of the second clip, see :func:`policy_loss`; None for none.

    Returns:
        :class:`PPOLoss`; every field but ``total`` is detached.

    Raises:
        ValueError: For unequal shapes, a negative clip range, a ``dual_clip`` of 1 or less, or a
            missing partner: ``values`` and ``returns``, ``value_clip_range`` and ``old_values``,
            ``entropy_coef`` and ``entropy``.
        TypeError: For arguments that are no tensors or of the wrong dtype.

    Example:
        >>> loss = ppo_loss(
        ...     log_probs=torch.tensor([0.5, -0.5]).log(),
        ...     old_log_probs=torch.tensor([0.25, -0.5]).log(),
        ...     advantages=torch.tensor([1.0, 1.0]),
        ...     valid=torch.tensor([True, False]),
        ... )
        >>> loss.policy_loss, loss.clip_fraction
        (tensor(-1.2000), tensor(1.))

    Source:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 9.
    """
    check_rows(
        valid,
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        values=values,
        returns=returns,
        entropy=entropy,
        old_values=old_values,
    )
    low, high = _clip_ranges(clip_range, clip_range_high)
    log_ratio = _log_ratio(log_probs, old_log_probs, valid)
    policy = _policy_loss(log_ratio, advantages, low, high, dual_clip, valid)
    total, value, mean_entropy = policy, policy.new_zeros(()), policy.new_zeros(())
    if not (values is None and returns is None and value_clip_range is None):
        values = require("values", values, "returns or value_clip_range")
        returns = require("returns", returns, "values")
        value = _value_loss(values, returns, value_clip_range, old_values, valid)
        total = total + value_coef * value
    # A weight in a tensor stays unread: reading it would wait for its device.
    weighted = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    if entropy is not None or weighted:
        mean_entropy = _mean_entropy(require("entropy", entropy, "entropy_coef"), valid)
        if weighted:
            total = total - entropy_coef * mean_entropy

    log_ratio = log_ratio.detach()
    return PPOLoss(
        total=total,
        policy_loss=policy.detach(),
        value_loss=value.detach(),
        entropy=mean_entropy.detach(),
        approx_kl=_approximate_kl(log_ratio, valid),
        clip_fraction=_clip_fraction(log_ratio, low, high, valid),
    )


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float | Tensor = 0.2,
    valid: Tensor | None = None,
    clip_range_high: float | Tensor | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    r"""Return minus the clipped surrogate objective.

    .. math::

        L = -\operatorname{mean}\bigl(\min(\rho\hat A,\;
            \operatorname{clip}(\rho, 1-\varepsilon, 1+\varepsilon^+)\,\hat A)\bigr),
        \qquad \rho = \exp(\log\pi - \log\pi_{\text{old}})

    The minimum makes the objective a pessimistic bound: it never exceeds the mean of ρÂ. The
    log-ratio is limited to ±20 before the exponential, so loss and gradient stay finite; beyond
    the limit a row has no gradient.

    Where Â < 0 the minimum has no bound below, and a large ρ pulls with all its weight. With
    ``dual_clip`` it is max(min(...), cÂ) there: a row whose ratio exceeds c has no gradient.

    Args:
        log_probs: log π(a_t|s_t) under the policy that learns, in nats.
        old_log_probs: The same under the policy that collected, in nats.
        advantages: Â_t; taken as constants.
        clip_range: ε, a number or a tensor without axes.
        valid: Bool: the rows that count; None means all.
        clip_range_high: ε⁺, likewise; None for ε.
        dual_clip: c > 1; None for the minimum alone.

    Returns:
        L, a tensor without axes, in units of advantage.

    Raises:
        ValueError, TypeError: As :func:`ppo_loss`.

    Example:
        >>> new, old = torch.tensor([0.3, 0.1]).log(), torch.tensor([0.2, 0.2]).log()
        >>> policy_loss(new, old, torch.tensor([1.0, -1.0]))
        tensor(-0.2000)

    Source:
        Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7. Dual clip:
        Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
        2020, section "Dual-clip PPO". Upper ε of its own: Yu et al., "DAPO", 2025, section 3.1.
    """
    check_rows(valid, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    low, high = _clip_ranges(clip_range, clip_range_high)
    log_ratio = _log_ratio(log_probs, old_log_probs, valid)
    return _policy_loss(log_ratio, advantages, low, high, dual_clip, valid)


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    value_clip_range: float | Tensor | None = None,
    old_values: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Return the mean squared error of the values.

    .. math::

        L = \operatorname{mean}\bigl((V - R)^2\bigr)
        \quad\text{or}\quad
        \operatorname{mean}\bigl(\max((V - R)^2,\, (V_{\text{clip}} - R)^2)\bigr),
        \qquad V_{\text{clip}} = V_{\text{old}} +
            \operatorname{clip}(V - V_{\text{old}}, -\varepsilon, \varepsilon)

    Args:
        values: V(s_t) of the critic that learns, in units of return.
        returns: R_t, their targets; taken as constants.
        value_clip_range: ε, in units of return; None for the first form.
        old_values: V(s_t) of the critic that collected; needed with ``value_clip_range``.
        valid: Bool: the rows that count; None means all.

    Returns:
        L, without axes, in units of return squared; no ½.

    Raises:
        ValueError, TypeError: As :func:`ppo_loss`.

    Example:
        >>> value_loss(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(5.)

    Source:
        Schulman et al., 2017, equation 9; clipped as in openai/baselines, ppo2.
    """
    check_rows(valid, values=values, returns=returns, old_values=old_values)
    return _value_loss(values, returns, value_clip_range, old_values, valid)


def approximate_kl(log_probs: Tensor, old_log_probs: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Estimate KL(π_old, π) from actions that π_old drew.

    .. math:: \widehat{\mathrm{KL}} = \operatorname{mean}(\rho - 1 - \log\rho) \ge 0

    It is unbiased, like the mean of −log ρ, but never negative and of lower variance near ρ = 1.

    Args:
        log_probs: log π(a_t|s_t) under the policy that learns, in nats.
        old_log_probs: The same under the policy that collected, in nats.
        valid: Bool: the rows that count; None means all.

    Returns:
        The estimate in nats, a tensor without axes and without gradient.

    Raises:
        ValueError, TypeError: As :func:`ppo_loss`.

    Example:
        >>> approximate_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor(0.3591)

    Source:
        Schulman, "Approximating KL Divergence", 2020 (joschu.net/blog/kl-approx.html), k3.
    """
    check_rows(valid, log_probs=log_probs, old_log_probs=old_log_probs)
    return _approximate_kl(_log_ratio(log_probs, old_log_probs, valid).detach(), valid)


def clip_fraction(
    log_probs: Tensor,
    old_log_probs: Tensor,
    *,
    clip_range: float | Tensor = 0.2,
    valid: Tensor | None = None,
    clip_range_high: float | Tensor | None = None,
) -> Tensor:
    r"""Return the share of rows whose ratio is outside the clip range.

    .. math:: \operatorname{mean}\bigl(
        [\,\rho < 1 - \varepsilon \;\text{or}\; \rho > 1 + \varepsilon^+\,]\bigr)

    Args:
        log_probs: log π(a_t|s_t) under the policy that learns, in nats.
        old_log_probs: The same under the policy that collected, in nats.
        clip_range: ε, a number or a tensor without axes.
        valid: Bool: the rows that count; None means all.
        clip_range_high: ε⁺, likewise; None for ε.

    Returns:
        The share in [0, 1], a tensor without axes and without gradient.

    Raises:
        ValueError, TypeError: As :func:`ppo_loss`.

    Example:
        >>> clip_fraction(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor(0.5000)

    Source:
        openai/baselines, ppo2, ``clipfrac``.
    """
    check_rows(valid, log_probs=log_probs, old_log_probs=old_log_probs)
    low, high = _clip_ranges(clip_range, clip_range_high)
    return _clip_fraction(_log_ratio(log_probs, old_log_probs, valid).detach(), low, high, valid)


def _log_ratio(log_probs: Tensor, old_log_probs: Tensor, valid: Tensor | None) -> Tensor:
    log_probs, old_log_probs = at_least_float32(log_probs, old_log_probs.detach())
    log_ratio = select(log_probs - old_log_probs, valid)
    # The gradient of the branch that min() drops is 0 * ratio: NaN if the ratio overflowed.
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clip_ranges(
    low: float | Tensor, high: float | Tensor | None
) -> tuple[float | Tensor, float | Tensor]:
    """Both ε, checked."""
    check_limit("clip_range", low)
    if high is None:
        return low, low
    check_limit("clip_range_high", high)
    return low, high


def _policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    dual_clip: float | None,
    valid: Tensor | None,
) -> Tensor:
    (advantages,) = at_least_float32(advantages.detach())
    ratio = log_ratio.exp()
    objective, clipped = ratio * advantages, _clamp(ratio, 1 - low, 1 + high) * advantages
    # Not by minimum(): of two that are equal it takes half the gradient of each, and that of a
    # clamp at its limits is another one since torch 2.14.
    objective = torch.where(objective <= clipped, objective, clipped)
    if dual_clip is not None:
        check_above_1("dual_clip", dual_clip)
        bound = dual_clip * advantages
        objective = torch.where((advantages < 0) & (objective < bound), bound, objective)
    return -masked_mean(objective, valid)


def _value_loss(
    values: Tensor,
    returns: Tensor,
    value_clip_range: float | Tensor | None,
    old_values: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    values, returns = at_least_float32(values, returns.detach())
    error = select(values - returns, valid).square()
    if value_clip_range is not None:
        check_limit("value_clip_range", value_clip_range)
        old_values = require("old_values", old_values, "value_clip_range").detach()
        clipped = old_values + _clamp(values - old_values, -value_clip_range, value_clip_range)
        other = select(clipped - returns, valid).square()
        error = torch.where(error >= other, error, other)  # as above
    return masked_mean(error, valid)


def _mean_entropy(entropy: Tensor, valid: Tensor | None) -> Tensor:
    (entropy,) = at_least_float32(entropy)
    return masked_mean(entropy, valid)


def _approximate_kl(log_ratio: Tensor, valid: Tensor | None) -> Tensor:
    return masked_mean(log_ratio.expm1() - log_ratio, valid)


def _clip_fraction(
    log_ratio: Tensor, low: float | Tensor, high: float | Tensor, valid: Tensor | None
) -> Tensor:
    change = log_ratio.expm1()
    outside = change.abs() > low if high is low else (change < -low) | (change > high)
    return masked_mean(outside.to(log_ratio.dtype), valid)


def _clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    if isinstance(low, Tensor) is isinstance(high, Tensor):
        return x.clamp(low, high)  # type: ignore[arg-type]
    return x.clamp(min=low).clamp(max=high)  # torch takes no number beside a tensor
