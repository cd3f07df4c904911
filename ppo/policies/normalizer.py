"""Observation normalisation as a part of the policy: saved, moved and applied with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppo.statistics import RunningMoments

__all__ = ["ObservationNormalizer"]


class ObservationNormalizer(nn.Module):
    r"""Shift and scale observations by their running moments, then clip.

    .. math:: \hat s = \mathrm{clip}\bigl((s - \mu) / \sqrt{\sigma^2 + 10^{-8}},\, -c,\, c\bigr)

    The moments are float64 buffers and change only in `update`, which the agent calls between
    rollouts: collecting and learning see the same statistics, so the first ratio is 1. Before the
    first update it is the identity up to the clip.

    Args:
        shape: Shape of one observation.
        clip: Bound `c` on the result, in standard deviations.
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape), persistent=False)
        self.register_buffer("scale", torch.ones(shape), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Normalise observations `[B, *shape]`, float32."""
        return ((obs - self.shift) * self.scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, obs: Tensor) -> None:
        """Fold observations `[B, *shape]` into the moments."""
        if len(obs) == 0:
            return
        moments = RunningMoments.from_moments(self.count, self.mean, self.var)
        moments.update(obs)
        self.count.copy_(moments.count)
        self.mean.copy_(moments.mean)
        self.var.copy_(moments.var)
        self._refresh()

    def _refresh(self) -> None:
        self.shift.copy_(self.mean)
        self.scale.copy_(torch.rsqrt(self.var + 1e-8))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()
