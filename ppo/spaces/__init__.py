"""Spaces: how observations are stored, what environments get as actions, masks, and JSON."""

from ppo.spaces.actions import ActionAdapter, make_action_adapter
from ppo.spaces.checks import check_observation_space, check_policy_spaces
from ppo.spaces.description import space_from_dict, space_to_dict
from ppo.spaces.leaf import Leaf, Space, sub_spaces
from ppo.spaces.masks import MASK_KEY, ActionMasks
from ppo.spaces.observations import ObservationLayout, is_image, observation_dtype

__all__ = [
    "MASK_KEY",
    "ActionAdapter",
    "ActionMasks",
    "Leaf",
    "ObservationLayout",
    "Space",
    "check_observation_space",
    "check_policy_spaces",
    "is_image",
    "make_action_adapter",
    "observation_dtype",
    "space_from_dict",
    "space_to_dict",
    "sub_spaces",
]
