"""What of an agent goes into a file, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppo import checkpoint
from ppo.collector import CollectorState
from ppo.config import PPOConfig
from ppo.packing import pack, unpack
from ppo.policies.actor_critic import blank_policy
from ppo.policies.protocol import freeze_exactly, frozen_parameters
from ppo.spaces import space_from_dict, space_to_dict

__all__ = ["read_agent", "write_agent"]


def write_agent(path: str | Path, agent: Any, episodes: CollectorState | None) -> None:
    """Write an agent to a file.

    Args:
        path: The file; its folder must exist.
        agent: A `PPOAgent` with a policy.
        episodes: Where the episodes of a `learn` are that is to be gone on with.

    Raises:
        CheckpointError: The file cannot be written, or a parameter is not finite.
    """
    scaler = agent._reward_scaler
    groups = {
        "policy": agent.policy.state_dict(),
        "optimizer": agent._learner.state_dict(),
        "reward_scaler": scaler.state_dict() if scaler else {},
        "generators": {
            "minibatches": agent._generator.get_state(),
            "acting": agent._act_generator.get_state(),
        },
    }
    document = {
        "config": agent.config.to_dict(),
        "observation_space": space_to_dict(agent.observation_space),
        "action_space": space_to_dict(agent.action_space),
        "seed": agent.seed,
        "steps": agent.steps,
        "updates": agent.updates,
        "goal": agent.goal,
        "learn_calls": agent._learn_calls,
        "recent_episodes": [list(episode) for episode in agent._recent],
        "frozen": frozen_parameters(agent.policy),
        # Since the latest update others may have been frozen, of which it has no notion yet.
        "frozen_in_optimizer": agent._frozen,
        **checkpoint.fingerprint(),
    }
    order = agent._learner.parameter_order()
    if order is not None:
        document["optimizer_order"] = order
    if episodes is not None:
        document["episodes"], arrays = pack(episodes.to_plain())
        groups["episodes"] = {name: torch.tensor(array) for name, array in arrays.items()}
    checkpoint.write_checkpoint(path, groups, document)


def read_agent(path: str | Path, policy: nn.Module | None, make_agent: Callable[..., Any]) -> Any:
    """Read back what `write_agent` wrote.

    Args:
        path: The file.
        policy: The caller's policy, which is filled; None builds the default one.
        make_agent: Makes a `PPOAgent` of a policy, a config and a seed.

    Returns:
        The agent.

    Raises:
        CheckpointError: The file is missing, damaged, of another version, or does not fit.
    """
    groups, document = checkpoint.read_checkpoint(path)
    checkpoint.warn_of_differences(path, document)
    with checkpoint.all_or_nothing(path, policy):
        config = PPOConfig.from_dict(document["config"])
        spaces = (
            space_from_dict(document["observation_space"]),
            space_from_dict(document["action_space"]),
        )
        if policy is None:
            policy = blank_policy(*spaces, config.policy, groups["policy"])
        frozen = document.get("frozen", frozen_parameters(policy))
        freeze_exactly(policy, document.get("frozen_in_optimizer", frozen))
        (seed,) = checkpoint.read_counts(document, "seed")
        agent = make_agent(policy, config=config, seed=seed)
        agent._build(*spaces)
        checkpoint.fill(agent.policy, groups["policy"])
        moments = groups.get("optimizer", {})
        if "optimizer_order" in document:
            moments = agent._learner.in_order(moments, document["optimizer_order"])
        checkpoint.check_moments(moments, agent._learner.state_dict())
        agent._learner.load_state_dict(moments)
        freeze_exactly(policy, frozen)
        if "reward_scaler" in groups:
            scaler = checkpoint.read_reward_scaler(groups["reward_scaler"], config.gamma)
            agent._reward_scaler = scaler
        agent._generator.set_state(groups["generators"]["minibatches"])
        agent._act_generator.set_state(groups["generators"]["acting"])
        counts = checkpoint.read_counts(document, "steps", "updates", "goal", "learn_calls")
        agent.steps, agent.updates, agent.goal, agent._learn_calls = counts
        agent._recent.extend(checkpoint.read_episodes(document))
        agent.left_off = _read_episodes(document, groups.get("episodes", {}))
    return agent


def _read_episodes(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> CollectorState | None:
    if "episodes" not in document:
        return None
    arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return CollectorState.from_plain(unpack(document["episodes"], arrays))
