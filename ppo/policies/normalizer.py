"""Observation normalisation as a part of the policy: saved, moved and applied with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import gymnasium
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo.policies.encoders import encoder_kind
from ppo.policies.options import PolicyConfig
from ppo.spaces import sub_spaces
from ppo.statistics import RunningMoments
from ppo.trees import leaves_with_paths, rebuild

__all__ = ["ObservationNormalizer", "TreeNormalizer", "make_normalizer"]


class ObservationNormalizer(nn.Module):
    r"""Shift and scale observations by their running moments, then clip.

    .. math:: \hat s = \mathrm{clip}\bigl((s - \mu) / \sqrt{\sigma^2 + 10^{-8}},\, -c,\, c\bigr)

    The moments are float64 buffers and change only in `update`, which the agent calls between
    rollouts: collecting and learning see the same statistics, so the first ratio is 1. Before the
    first update it is the identity up to the clip.

    Args:
        shape: Shape of one observation.
        clip: Bound `c` on the result, in standard deviations.
        frame_stack: Number of frames that observations `[B, frame_stack, *shape]` consist of; 1 for
            observations `[B, *shape]`. The moments are those of a single frame.
    """

    count: Tensor
    mean: Tensor
    var: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0, frame_stack: int = 1) -> None:
        super().__init__()
        self.clip = clip
        self._stacked = frame_stack > 1
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape), persistent=False)
        self.register_buffer("scale", torch.ones(shape), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Normalise observations `[B, *shape]`, or `[B, frame_stack, *shape]`; float32."""
        return ((obs - self.shift) * self.scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, obs: Tensor) -> None:
        """Fold observations into the moments.

        Args:
            obs: `[B, *shape]`, or `[B, frame_stack, *shape]`, of which the newest frame counts: the
                others were the newest in other rows.
        """
        if len(obs) == 0:
            return
        if self._stacked and obs.ndim == self.mean.ndim + 2:
            obs = obs[:, -1]
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


class TreeNormalizer(nn.Module):
    """Normalises some of the leaves of a nested observation, each by its own moments.

    Args:
        normalizers: `ObservationNormalizer` by the path of its leaf.

    Attributes:
        paths: Paths of the leaves that are normalised.
        normalizers: Their normalisers, in the same order.

    Example:
        >>> normalizer = TreeNormalizer({"speed": ObservationNormalizer((1,), clip=2.0)})
        >>> normalizer({"speed": torch.tensor([[7.0]]), "at": torch.tensor([3])})
        {'speed': tensor([[2.]]), 'at': tensor([3])}
    """

    def __init__(self, normalizers: Mapping[str, ObservationNormalizer]) -> None:
        super().__init__()
        self.paths = tuple(normalizers)
        self.normalizers = nn.ModuleList(normalizers.values())

    def forward(self, obs: Any) -> Any:
        """The tree of leaves `[B, ...]`, some normalised; the others are the very same tensors."""
        found = dict(leaves_with_paths(obs))
        for path, normalizer in zip(self.paths, self.normalizers, strict=True):
            found[path] = normalizer(found[path])
        return rebuild(obs, list(found.values()))

    def update(self, obs: Any) -> None:
        """Fold a tree of leaves `[B, ...]` into the moments."""
        found = dict(leaves_with_paths(obs))
        for path, normalizer in zip(self.paths, self.normalizers, strict=True):
            normalizer.update(found[path])  # type: ignore[operator]


def make_normalizer(
    space: gymnasium.Space[Any], config: PolicyConfig, *, skip: Collection[str] = ()
) -> nn.Module:
    """Build the normaliser of observations: of every Box that no image encoder is to see.

    Args:
        space: Of one observation, nested or not.
        config: Its `normalize_observations`, `observation_clip`, `encoders` and `frame_stack`.
        skip: Paths of leaves that nothing is to see.

    Returns:
        A `TreeNormalizer` for nested observations, an `ObservationNormalizer` for a single Box,
        `nn.Identity` where nothing is to be normalised.
    """
    tree = sub_spaces(space)
    normalizers = {
        path: ObservationNormalizer(leaf.shape, config.observation_clip, config.frame_stack)
        for path, leaf in leaves_with_paths(tree)
        if config.normalize_observations
        and path not in skip
        and isinstance(leaf, spaces.Box)
        and encoder_kind(path, leaf, config.encoder(path)) != "cnn"
    }
    if not normalizers:
        return nn.Identity()
    return TreeNormalizer(normalizers) if isinstance(tree, dict | tuple) else normalizers[""]
