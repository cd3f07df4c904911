"""Which spaces are supported, and whether two sides mean the same."""

from __future__ import annotations

from typing import TypeVar

from gymnasium import spaces

from ppo.errors import SpaceError
from ppo.spaces.leaf import Space, sub_spaces
from ppo.trees import leaves_with_paths

__all__ = ["check_observation_space", "check_policy_spaces"]

SpaceT = TypeVar("SpaceT", bound=Space)

_OBSERVED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_observation_space(space: SpaceT) -> SpaceT:
    """Return the space if observations of it can be collected, else raise `SpaceError`."""
    named = list(leaves_with_paths(sub_spaces(space)))
    for path, leaf in named:
        if not isinstance(leaf, _OBSERVED):
            where = f" at {path!r}" if path else ""
            raise SpaceError(
                f"observation space {leaf}{where} is not supported: got {type(leaf).__name__}, "
                "wanted Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of them; "
                "wrap the environment, for example with "
                "gymnasium.wrappers.TransformObservation"
            )
    if not named:
        raise SpaceError(f"observation space {space} is empty; there is nothing to observe")
    return space


def check_policy_spaces(policy: object, observation_space: Space, action_space: Space) -> None:
    """Raise `SpaceError` for a policy that says it was built for other spaces."""
    for name, wanted in (
        ("observation_space", observation_space),
        ("action_space", action_space),
    ):
        built_for = getattr(policy, name, None)
        if built_for is not None and not _same(built_for, wanted):
            raise SpaceError(
                f"the policy was built for {name} {built_for}, but these environments have "
                f"{wanted}; build one for their spaces with make_policy, or wrap the environments"
            )


def _same(one: Space, other: Space) -> bool:
    """Equal, and with the leaves in one order: rows of a Dict lie in the order of its keys."""
    if one is other:
        return True
    paths = [[path for path, _ in leaves_with_paths(sub_spaces(space))] for space in (one, other)]
    return bool(one == other) and paths[0] == paths[1]
