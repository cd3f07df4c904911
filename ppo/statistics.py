"""Running statistics: what the normalisers of observations and rewards know.

All sums are float64 and live where the data live. There is no prior count, empty batches change
nothing, and merging is independent of order up to rounding, so that ranks can be reduced.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ppo._checks import (
    at_least_float32,
    check_flags,
    check_floating,
    check_positive_integer,
    check_same_shape,
    check_tensor,
    check_time_axis,
    check_unit_interval,
)
from ppo._scan import reverse_scan_

__all__ = ["RewardScaler", "RunningMoments"]

# The float64 rounding of a constant stays far below this share of it, a signal far above.
_NOISE = 1e-12
_MIN_STD = 1e-8


class RunningMoments:
    r"""Mean and variance of a stream, exact to rounding in whatever pieces it comes.

    Two sets with counts n, means μ and sums of squared deviations M merge into

    .. math::

        \mu = \mu_a + \delta\,\frac{n_b}{n}, \qquad
        M = M_a + M_b + \delta^2\,\frac{n_a n_b}{n}, \qquad
        \delta = \mu_b - \mu_a,\; n = n_a + n_b

    Args:
        shape: Shape of one sample; its entries are treated one by one.

    Attributes:
        count: Number of samples, float64 without axes.
        mean: Mean of the samples, float64 ``[*shape]``; 0 before the first.

    Example:
        >>> moments = RunningMoments()
        >>> moments.update(torch.tensor([1.0, 2.0]))
        >>> moments.update(torch.tensor([6.0]))
        >>> moments.mean.item(), round(moments.var.item(), 4)
        (3.0, 4.6667)

    Source:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", 1979.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = tuple(shape)
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(self.shape, dtype=torch.float64)
        self._m2 = torch.zeros(self.shape, dtype=torch.float64)

    @classmethod
    def from_moments(cls, count: Tensor, mean: Tensor, var: Tensor) -> "RunningMoments":
        """Return moments that continue from ``count`` samples of known mean and variance."""
        moments = cls(tuple(mean.shape))
        moments.load_state_dict({"count": count, "mean": mean, "m2": var * count})
        return moments

    @property
    def var(self) -> Tensor:
        """Population variance, float64 ``[*shape]``; 0 before the second sample."""
        return self._m2 / self.count.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, float64 ``[*shape]``."""
        return self.var.sqrt()

    @torch.no_grad()
    def update(self, batch: Tensor, valid: Tensor | None = None) -> None:
        """Take in a batch of samples.

        Args:
            batch: ``[..., *shape]``: any leading axes.
            valid: Bool, of the leading axes: the samples that count. None means all.

        Raises:
            ValueError: For a batch whose last axes are not ``shape``, or a ``valid`` of other
                leading axes.
            TypeError: For arguments that are no tensors, or a ``valid`` that is not boolean.
        """
        check_tensor("batch", batch)
        leading = batch.ndim - len(self.shape)
        if leading < 0 or tuple(batch.shape[leading:]) != self.shape:
            raise ValueError(
                f"batch has shape {list(batch.shape)}, wanted [..., *{list(self.shape)}]; "
                f"make RunningMoments with the shape of one sample"
            )
        samples = batch.to(torch.float64).reshape(batch.shape[:leading].numel(), *self.shape)
        if valid is None:
            count = torch.full_like(self.count, len(samples), device=batch.device)
        else:
            check_tensor("valid", valid)
            check_flags("valid", valid)
            if valid.shape != batch.shape[:leading]:
                raise ValueError(
                    f"valid has shape {list(valid.shape)}, wanted {list(batch.shape[:leading])}, "
                    f"the leading axes of batch; give one flag per sample"
                )
            counted = valid.reshape(-1, *[1] * len(self.shape))
            samples = torch.where(counted, samples, 0.0)
            count = valid.sum(dtype=torch.float64)
        mean = samples.sum(0) / count.clamp(min=1)
        deviations = samples - mean
        if valid is not None:
            deviations = torch.where(counted, deviations, 0.0)
        self._merge(count, mean, deviations.square().sum(0))

    def merge(self, other: "RunningMoments") -> None:
        """Take in all samples that ``other`` has seen.

        Raises:
            ValueError: For moments of another shape.
        """
        if other.shape != self.shape:
            raise ValueError(
                f"other has shape {list(other.shape)}, wanted {list(self.shape)}; "
                f"merge moments of the same quantity"
            )
        self._merge(other.count, other.mean, other._m2)

    def state_dict(self) -> dict[str, Tensor]:
        """Return count, mean and sum of squared deviations as tensors of their own."""
        return {"count": self.count.clone(), "mean": self.mean.clone(), "m2": self._m2.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: For missing or unknown keys, or tensors of another shape.
        """
        shapes = {"count": (), "mean": self.shape, "m2": self.shape}
        self.count, self.mean, self._m2 = _entries(state, shapes)

    def _merge(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        seen, ours, spread = (x.to(mean.device) for x in (self.count, self.mean, self._m2))
        total = seen + count
        share = count / total.clamp(min=1)
        delta = mean - ours
        self.count = total
        self.mean = ours + delta * share
        self._m2 = spread + m2 + delta.square() * (seen * share)


class RewardScaler:
    r"""Divide rewards by the running standard deviation of the discounted return.

    Per environment, over the valid steps,

    .. math:: G_t = \gamma\,[\text{episode goes on}]\,G_{t-1} + r_t

    Every G enters the moments, that of an episode's last step included, and only then does the
    sum start anew. The rewards keep their sign and their zero: nothing is subtracted. Before the
    returns vary, rewards pass unchanged.

    Args:
        gamma: Discount γ per step, in [0, 1].
        num_envs: N, the number of environments.

    Attributes:
        moments: The :class:`RunningMoments` of G.

    Raises:
        ValueError: For γ outside [0, 1] or ``num_envs`` below 1.
        TypeError: For a γ that is no number or a ``num_envs`` that is no integer.

    Example:
        >>> scaler = RewardScaler(gamma=0.5, num_envs=1)
        >>> never = torch.zeros(2, 1, dtype=torch.bool)
        >>> scaler(torch.tensor([[2.0], [0.0]]), never).squeeze(1)
        tensor([4., 0.])

    Source:
        Engstrom et al., "Implementation Matters in Deep Policy Gradients", 2020, section 3
        (reward scaling). Unlike openai/baselines, the sum is cut after the last step of an
        episode, so that its reward counts and nothing leaks into the next.
    """

    def __init__(self, gamma: float, num_envs: int) -> None:
        check_unit_interval("gamma", gamma)
        check_positive_integer("num_envs", num_envs)
        self.gamma = gamma
        self.num_envs = num_envs
        self.moments = RunningMoments()
        self._returns = torch.zeros(num_envs, dtype=torch.float64)

    @torch.no_grad()
    def __call__(
        self,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Take in the rewards of a rollout and return them scaled.

        Args:
            rewards: r_t, ``[T, N]``.
            terminated: ``[T, N]``, bool.
            truncated: ``[T, N]``, bool; None means that no step was truncated.
            valid: ``[T, N]``, bool: the rows that are transitions; None means all. The others
                count nowhere.

        Returns:
            Rewards over the standard deviation of G, ``[T, N]``; this rollout's G are included.

        Raises:
            ValueError: For unequal shapes or another number of environments.
            TypeError: For arguments that are no tensors or of the wrong dtype.
        """
        check_tensor("rewards", rewards)
        check_floating("rewards", rewards)
        check_time_axis("rewards", rewards)
        if rewards.shape[1:] != (self.num_envs,):
            raise ValueError(
                f"rewards has shape {list(rewards.shape)}, wanted [T, {self.num_envs}]; "
                f"call reset(num_envs=...) if the number of environments changed"
            )
        flags = {"terminated": terminated, "truncated": truncated, "valid": valid}
        for name, flag in flags.items():
            if flag is not None:
                check_tensor(name, flag)
                check_flags(name, flag)
                check_same_shape(name, flag, "rewards", rewards)
        ended = terminated if truncated is None else terminated | truncated

        self.moments.update(self._discounted(rewards, ended, valid), valid)
        std = self.moments.std
        signal = std > _NOISE * self.moments.mean.abs()
        (rewards,) = at_least_float32(rewards)
        return rewards / torch.where(signal, std.clamp(min=_MIN_STD), 1.0).to(rewards.dtype)

    def reset(self, num_envs: int | None = None) -> None:
        """Start every environment's sum anew, as their episodes do; the moments stay.

        Args:
            num_envs: N from now on; None keeps it.

        Raises:
            ValueError: For ``num_envs`` below 1.
            TypeError: For a ``num_envs`` that is no integer.
        """
        if num_envs is not None:
            check_positive_integer("num_envs", num_envs)
            self.num_envs = num_envs
        self._returns = self._returns.new_zeros(self.num_envs)

    def copy(self) -> "RewardScaler":
        """Return a scaler that goes on from here by itself."""
        twin = copy.copy(self)  # it may hold the same tensors: none is ever changed in place
        twin.moments = copy.copy(self.moments)
        return twin

    def forget(self, environments: Tensor) -> None:
        """Begin new sums in these environments, bool ``[N]``, whose episodes broke off unseen."""
        self._returns = torch.where(environments.to(self._returns.device), 0.0, self._returns)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums ``[N]`` and the moments as tensors of their own."""
        return {"returns": self._returns.clone(), **self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: For missing or unknown keys, or tensors of another shape.
        """
        shapes = {"returns": (self.num_envs,), "count": (), "mean": (), "m2": ()}
        returns, count, mean, m2 = _entries(state, shapes)
        self.moments.load_state_dict({"count": count, "mean": mean, "m2": m2})
        self._returns = returns

    def _discounted(self, rewards: Tensor, ended: Tensor, valid: Tensor | None) -> Tensor:
        """Return G ``[T, N]`` and keep what goes on into the next rollout."""
        paid = rewards.to(torch.float64, copy=True)
        decay = torch.full_like(paid, self.gamma)
        if valid is not None:
            # A row that is no transition hands the sum on as it got it.
            paid = torch.where(valid, paid, 0.0)
            decay = torch.where(valid, decay, 1.0)
            ended = ended & valid
        paid[0] += decay[0] * self._returns.to(paid.device)
        decay[1:].masked_fill_(ended[:-1], 0.0)
        returns = reverse_scan_(paid.flip(0), decay.flip(0)).flip(0)
        self._returns = torch.where(ended[-1], 0.0, returns[-1])
        return returns


def _entries(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Return float64 copies of the entries of ``state`` in the order of ``shapes``."""
    if set(state) != set(shapes):
        raise ValueError(
            f"state has the keys {sorted(state)}, wanted {sorted(shapes)}; "
            f"pass what state_dict() of the same class returned"
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"state[{name!r}] has shape {list(state[name].shape)}, wanted {list(shape)}; "
                f"make the object with the same arguments as the one that was saved"
            )
    return [state[name].detach().to(torch.float64, copy=True) for name in shapes]
