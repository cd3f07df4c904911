"""A policy outside of rollouts: from one observation, or a batch, to actions to take."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ppo._modes import ordinary_mode
from ppo.errors import SpaceError
from ppo.policies.protocol import Policy, generator_on, policy_device, takes
from ppo.policies.state import PolicyState, frame_stack_of
from ppo.spaces import MASK_KEY, ActionMasks, ObservationLayout, Space, make_action_adapter
from ppo.trees import leaves, map_tree

__all__ = ["act"]


def act(
    policy: Policy,
    obs: Any,
    observation_space: Space,
    action_space: Space,
    *,
    generator: torch.Generator,
    deterministic: bool,
    action_mask: Any = None,
    state: PolicyState | None = None,
) -> Any:
    """What `PPOAgent.act` does; see there."""
    batch, single = ObservationLayout(observation_space).as_batch(obs)
    count = len(leaves(batch)[0])
    state = PolicyState.begin(policy, count) if state is None else state.copy()
    if len(state) != count:
        raise ValueError(f"state is of {len(state)} rows, obs of {count}; pass state=None")
    device = policy_device(policy)

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    arguments: dict[str, Any] = {"deterministic": deterministic}
    if takes(policy.act, "generator"):
        # Noise is drawn on the CPU, whatever the device.
        noisy = hasattr(policy, "draw_noise")
        arguments["generator"] = generator if noisy else generator_on(device, generator)
    reader = ActionMasks(action_space)
    mask = _flat_masks(reader, observation_space, batch, action_mask, single)
    if mask is not None and takes(policy.act, "action_mask"):
        arguments["action_mask"] = to_device(mask)
    elif action_mask is not None and not reader.lie_in(observation_space):
        raise SpaceError(
            f"act of {type(policy).__name__} takes no action_mask, and would ignore the one given"
        )
    remembers = state.memory.shape[1] > 0
    if remembers:
        arguments["state"] = to_device(state.memory)
    seen = state.see(batch, frame_stack_of(policy))
    with ordinary_mode(), torch.no_grad():
        raw = policy.act(map_tree(to_device, seen), **arguments)
    if remembers:
        raw, memory = raw
        state.memory = memory.cpu().numpy()
    state.after(np.zeros(count, np.bool_))
    adapter = make_action_adapter(action_space, squash=getattr(policy, "squashed", False))
    actions = adapter(map_tree(lambda tensor: tensor.cpu().numpy(), raw))
    chosen = adapter.rows(actions)[0] if single else actions
    return (chosen, state) if remembers or state.frames is not None else chosen


def _flat_masks(
    reader: ActionMasks, observation_space: Space, batch: Any, given: Any, single: bool
) -> np.ndarray | None:
    """Masks `[B, M]`, from what was given or from the observations; None if there are none."""
    if given is None and reader.lie_in(observation_space):
        given, single = batch[MASK_KEY], False
    if given is None:
        return None
    if single:
        given = [given]
    elif isinstance(given, Mapping):  # arrays of rows, as vector environments give them
        count = len(leaves(batch)[0])
        given = [map_tree(operator.itemgetter(index), given) for index in range(count)]
    return np.stack([reader.read(mask) for mask in given])
