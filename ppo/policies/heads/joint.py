"""Heads for nested action spaces, and the choice of a head for any space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo.distributions import Joint
from ppo.errors import SpaceError
from ppo.policies.heads.action_head import ActionHead
from ppo.policies.heads.box import BetaHead, GaussianHead, GSDEHead, SquashedGaussianHead
from ppo.policies.heads.discrete import BernoulliHead, CategoricalHead, MultiCategoricalHead
from ppo.policies.options import PolicyConfig
from ppo.trees import leaves_with_paths, rebuild

__all__ = ["JointHead", "make_action_head"]

Space = gymnasium.Space[Any]

_DISCRETE: dict[type[Space], Callable[..., ActionHead]] = {
    spaces.Discrete: CategoricalHead,
    spaces.MultiDiscrete: MultiCategoricalHead,
    spaces.MultiBinary: BernoulliHead,
}
_BOX: dict[str, Callable[..., ActionHead]] = {
    "gaussian": GaussianHead,
    "squashed": SquashedGaussianHead,
    "beta": BetaHead,
    "gsde": GSDEHead,
}


class JointHead(ActionHead):
    """One head per leaf of a nested space (Dict and Tuple), all from the same features.

    Noise and masks of the leaves lie behind each other, in the order of the leaves.
    """

    def __init__(
        self,
        space: Space,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self._structure = _tree(space)
        heads = [
            _leaf_head(path, leaf, num_features, config, generator)
            for path, leaf in leaves_with_paths(self._structure)
        ]
        if not heads:
            raise SpaceError(f"action space {space} has no leaves; there is nothing to choose")
        self.heads = nn.ModuleList(heads)
        self._noise_sizes = [head.noise_size for head in heads]
        self._mask_sizes = [head.mask_size for head in heads]
        self.noise_size, self.mask_size = sum(self._noise_sizes), sum(self._mask_sizes)
        self.squashed = any(head.squashed for head in heads)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Joint:
        """Joint distribution over a tree of raw actions."""
        masks = [None] * len(self.heads) if mask is None else mask.split(self._mask_sizes, -1)
        parts = [head(features, own) for head, own in zip(self.heads, masks, strict=True)]
        return Joint(rebuild(self._structure, parts))

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Noise `[num_steps, noise_size]`, step after step, so that in pieces it is the same.

        What several steps share comes first.
        """
        noise = np.empty((num_steps, self.noise_size), np.float32)
        columns = np.split(noise, np.cumsum(self._noise_sizes)[:-1], axis=1)  # views
        per_step = []
        for head, own in zip(self.heads, columns, strict=True):
            if isinstance(head, GSDEHead):
                own[:] = head.draw_noise(rng, num_steps)
            else:
                per_step.append((head, own))
        for step in range(num_steps):
            for head, own in per_step:
                own[step] = head.draw_noise(rng, 1)  # type: ignore[operator]
        return noise


def make_action_head(
    space: Space,
    num_features: int,
    config: PolicyConfig,
    generator: torch.Generator | None,
) -> ActionHead:
    """Head for an action space: Discrete, MultiDiscrete, MultiBinary, Box, Dict or Tuple of these.

    Args:
        space: The action space.
        num_features: Width `F` of the features.
        config: Family for Box leaves and its options.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.

    Raises:
        SpaceError: There is no distribution for a leaf, or the chosen one does not fit its bounds.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return JointHead(space, num_features, config, generator)
    return _leaf_head("", space, num_features, config, generator)


def _leaf_head(path: str, space: Space, *arguments: Any) -> ActionHead:
    for kind, head in _DISCRETE.items():
        if isinstance(space, kind):
            return head(space, *arguments)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        _, config, _ = arguments
        return _BOX[config.distribution](space, *arguments)
    where = f" (leaf {path!r})" if path else ""
    raise SpaceError(
        f"action space {space}{where} is not supported: got {type(space).__name__}, wanted "
        "Discrete, MultiDiscrete, MultiBinary, a Box of floating type, or a Dict or Tuple of "
        "these; wrap the environment so that it takes one of these"
    )


def _tree(space: Space) -> Any:
    """The space as a tree of its leaves."""
    if isinstance(space, spaces.Dict):
        return {key: _tree(item) for key, item in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_tree(item) for item in space.spaces)
    return space
