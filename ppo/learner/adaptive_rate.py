"""A learning rate that keeps the policy's steps at a desired size."""

__all__ = ["MAX_SCALE", "MIN_SCALE", "adapted_scale"]

# With a rate of 1e-3, the usual one, these are the 1e-5 and 1e-2 of rsl_rl.
MIN_SCALE, MAX_SCALE = 0.01, 10.0
_FACTOR = 1.5


def adapted_scale(scale: float, kl: float, desired_kl: float) -> float:
    """Return the scale of the learning rate for the next update.

    Divided by 1.5 if the KL is above twice the desired one, times 1.5 if it is below half of it,
    within [`MIN_SCALE`, `MAX_SCALE`].

    Args:
        scale: Of the update that was.
        kl: KL(old policy, new policy) of that update, in nats.
        desired_kl: What it should be, in nats.

    Example:
        >>> adapted_scale(1.0, kl=0.03, desired_kl=0.01), adapted_scale(1.0, 0.001, 0.01)
        (0.6666666666666666, 1.5)

    Source:
        rsl_rl, `PPO.update` with `schedule="adaptive"`; the rule is that of the penalty in Schulman
        et al. 2017, section 4.
    """
    if kl > 2.0 * desired_kl:
        return max(scale / _FACTOR, MIN_SCALE)
    if kl < 0.5 * desired_kl:
        return min(scale * _FACTOR, MAX_SCALE)
    return scale
