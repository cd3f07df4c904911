"""What a configuration makes of the parts: a collector, and a batch to learn from."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo._checks import check_callable
from ppo.advantages import gae, normalize
from ppo.collector import RolloutCollector
from ppo.config import PPOConfig
from ppo.envs import EnvLike
from ppo.policies.protocol import Policy
from ppo.policies.snapshot import acts_in_workers
from ppo.rollout import Batch, Rollout
from ppo.spaces import is_image, sub_spaces
from ppo.statistics import RewardScaler
from ppo.trees import leaves

__all__ = [
    "batch_with_advantages",
    "check_arguments",
    "chooses_processes",
    "configured_collector",
    "configured_env",
]


def check_arguments(policy: object, config: object, seed: object, logger: object) -> None:
    """Raise for what no agent can be made of."""
    if policy is not None and not (isinstance(policy, nn.Module) and isinstance(policy, Policy)):
        raise TypeError(
            "policy must be an nn.Module with the methods act, evaluate and value, got "
            f"{type(policy).__name__}; settings go to config=, files to PPOAgent.load"
        )
    if not isinstance(config, PPOConfig):
        raise TypeError(
            f"config must be a PPOConfig, got {type(config).__name__}; PPOConfig.from_dict and "
            "PPOConfig.from_yaml make one"
        )
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    check_callable("logger", logger)


def configured_env(env: EnvLike, config: PPOConfig) -> EnvLike:
    """The configured environment where its id is given, with its arguments and wrappers."""
    return config.env_factory() if isinstance(env, str) and env == config.env else env


def _chosen_workers(env: EnvLike, config: PPOConfig, policy: Any) -> int | Literal["auto"]:
    """The configured number of workers; `"auto"` only where it may pay for the environment."""
    # What is stacked may be images, which is known when the environments are made.
    stacked = _is_default(policy) and config.policy.frame_stack > 1
    may = acts_in_workers(policy, config.policy) or stacked
    shared = chooses_processes(env, config) and may
    return 0 if config.num_workers == "auto" and not shared else config.num_workers


def _is_default(policy: object) -> bool:
    return policy is None or hasattr(policy, "action_head")


def chooses_processes(env: EnvLike, config: PPOConfig) -> bool:
    """True if the library may decide by itself to use other processes."""
    # Nobody misses an environment made from its id in this process; see docs/guide/workers.
    return isinstance(env, str) and config.num_workers == "auto"


def configured_collector(
    env: EnvLike,
    config: PPOConfig,
    policy: Any,
    *,
    seed: np.random.SeedSequence,
    device: torch.device,
) -> RolloutCollector:
    """Open a collector as a configuration says.

    Args:
        env: As for `RolloutCollector`; the id in the config brings its arguments and wrappers.
        config: How many environments and workers, and what to do about faults.
        policy: What will act; None for the default one, still to be built.
        seed: Seeds episodes and action noise.
        device: Of the rollouts.
    """
    open_with = functools.partial(
        RolloutCollector,
        configured_env(env, config),
        num_envs=config.num_envs,
        step_timeout=config.step_timeout,
        on_fault=config.on_fault,
        max_restarts=config.max_restarts,
        seed=seed,
        device=device,
    )
    workers = _chosen_workers(env, config, policy)
    collector = open_with(num_workers=workers)
    if workers == "auto" and not _pays_in_workers(collector, config, policy):
        collector.close()
        collector = open_with(num_workers=0)
    return collector


def _pays_in_workers(collector: RolloutCollector, config: PPOConfig, policy: Any) -> bool:
    """False where the default policy is surely asked at every step and steps may be light.

    It is known only here, as the workers have made the environments. Images take long to draw.
    """
    obs, actions = collector.observation_space, collector.action_space
    alone = isinstance(obs, spaces.Box) and isinstance(actions, spaces.Box | spaces.Discrete)
    seen = any(map(is_image, leaves(sub_spaces(obs))))
    return seen or not _is_default(policy) or (alone and config.policy.frame_stack == 1)


def scaled_rewards(
    scaler: RewardScaler | None, rollout: Rollout, config: PPOConfig
) -> tuple[RewardScaler | None, Tensor]:
    """Rewards `[T, N]` as the configuration wants them, and the scaler as it is behind them.

    A copy: what is not learned from leaves no trace.
    """
    rewards = rollout.rewards
    if config.normalize_rewards:
        scaler = scaler.copy() if scaler else RewardScaler(config.gamma, rewards.shape[1])
        if scaler.num_envs != rewards.shape[1]:  # other environments: their returns start anew
            scaler.reset(rewards.shape[1])
        if config.on_fault == "restart":  # an episode lost in the first row has left no end
            scaler.forget(~rollout.valid[0])
        rewards = scaler(rewards, rollout.terminated, rollout.truncated, rollout.valid)
    return scaler, rewards


def batch_with_advantages(
    rollout: Rollout, rewards: Tensor, config: PPOConfig
) -> tuple[Batch, Tensor]:
    """The rows of a rollout with advantages and returns, `[T, N]` -> `[B]`; and the returns."""
    advantages, returns = gae(
        rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    if config.normalize_advantages == "rollout":
        advantages = normalize(advantages, rollout.valid)
    return rollout.flatten(advantages=advantages, returns=returns), returns
