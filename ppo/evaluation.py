"""`evaluate`: how good a policy is, exactly per episode and without touching its training."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ppo._checks import check_positive_integer
from ppo._modes import ordinary_mode
from ppo.collector import open_columns
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.policy_calls import PolicyCalls
from ppo.collector.streams import EVALUATION, NOISE, POLICY, stream
from ppo.envs import EnvLike, resolve_env
from ppo.policies.protocol import Policy, check_methods, policy_device
from ppo.rollout import Episode
from ppo.spaces import (
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    check_policy_spaces,
    make_action_adapter,
)
from ppo.trees import leaves, map_tree

__all__ = ["EvaluationResult", "evaluate"]


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Returns and lengths of the evaluation episodes, each counted once.

    Attributes:
        episode_returns: Undiscounted return of each episode.
        episode_lengths: Transitions of each episode.
    """

    episode_returns: tuple[float, ...]
    episode_lengths: tuple[int, ...]

    @property
    def mean_return(self) -> float:
        """Mean over episodes."""
        return statistics.fmean(self.episode_returns)

    @property
    def std_return(self) -> float:
        """Population standard deviation over episodes."""
        return statistics.pstdev(self.episode_returns)

    def __str__(self) -> str:
        return (
            f"{self.mean_return:.1f} ± {self.std_return:.1f} "
            f"over {len(self.episode_returns)} episodes"
        )


def evaluate(
    policy: Policy,
    env: EnvLike,
    episodes: int = 100,
    *,
    deterministic: bool = True,
    num_envs: int = 8,
    seed: int | np.random.SeedSequence | None = 0,
    env_kwargs: dict[str, Any] | None = None,
    autoreset_mode: str | None = None,
) -> EvaluationResult:
    """Play whole episodes and return what they paid.

    Each environment plays a share of the episodes fixed in advance, so that short episodes are
    not counted more often than long ones. No normaliser, generator or counter of the policy moves.

    Args:
        policy: Acts; any module that meets the protocol, e.g. `agent.policy`.
        env: As for `RolloutCollector`.
        episodes: Number of episodes, at least 1.
        deterministic: Take the mode of the distribution instead of sampling.
        num_envs: Environments stepped side by side.
        seed: Seeds episodes and, when sampling, actions; other ones than a collector's.
        env_kwargs: For an id, passed to `gymnasium.make`.
        autoreset_mode: For a vector environment whose metadata does not name its mode.

    Returns:
        An `EvaluationResult`, ordered by environment and then by time.

    Raises:
        ValueError: `episodes` is below 1.
        TypeError: `episodes` is no integer, or the policy does not act.
        PPOError: As for `RolloutCollector`.

    Example:
        >>> import gymnasium
        >>> from ppo import evaluate, make_policy
        >>> env = gymnasium.make("CartPole-v1")
        >>> result = evaluate(make_policy(env.observation_space, env.action_space), env, episodes=4)
        >>> len(result.episode_returns)
        4
    """
    check_methods(policy, "act")
    check_positive_integer("episodes", episodes)
    if not isinstance(seed, np.random.SeedSequence):
        seed = np.random.SeedSequence(seed, spawn_key=(EVALUATION,))
    source = resolve_env(
        env, min(num_envs, episodes), env_kwargs=env_kwargs, autoreset_mode=autoreset_mode
    )
    columns = open_columns(source, seed)
    with contextlib.closing(columns), _at_rest(policy), ordinary_mode():
        space = check_observation_space(columns.observation_space)
        check_policy_spaces(policy, space, columns.action_space)
        count = columns.num_envs
        generator = torch.Generator().manual_seed(int(stream(seed, POLICY, 0).integers(2**63 - 1)))
        actions = make_action_adapter(columns.action_space).leaves
        device = policy_device(policy)
        calls = PolicyCalls(policy, device, generator, count, actions, deterministic=deterministic)
        masks = ActionMasks(columns.action_space)
        layout = Layout(
            1,
            count,
            ObservationLayout(space).leaves,
            actions,
            mask_size=masks.size,
            squash=bool(getattr(policy, "squashed", False)),
        )
        buffers = Buffers(layout)
        columns.attach(buffers)
        masked = np.array(columns.reset())
        if masked.any():
            calls.check_masks(masks.lie_in(space))
            buffers.masks[:, ~masked] = True
        noises = [stream(seed, NOISE, index) for index in range(count)]
        quota = [episodes // count + (index < episodes % count) for index in range(count)]
        played: list[list[Episode]] = [[] for _ in range(count)]
        while any(len(done) < wanted for done, wanted in zip(played, quota, strict=True)):
            noise = None
            if calls.takes_noise:
                noise = np.concatenate([policy.draw_noise(rng, 1) for rng in noises])  # type: ignore[attr-defined]
            obs = map_tree(lambda rows: rows[0].copy(), buffers.obs)
            with torch.no_grad():
                chosen = calls.act(obs, noise, buffers.masks[0] if masked.any() else None)
            for rows, action in zip(leaves(buffers.actions), leaves(chosen), strict=True):
                rows[0] = action
            buffers.begin()  # the rows are those of the last step
            columns.step(0)
            calls.ended(buffers.ended(0))
            buffers.masks[0] = buffers.masks[1]
            for rows in leaves(buffers.obs):
                rows[0] = rows[1]
            for _, episode in columns.harvest().episodes:
                if len(played[episode.env_index]) < quota[episode.env_index]:
                    played[episode.env_index].append(episode)
    flat = [episode for done in played for episode in done]
    return EvaluationResult(
        tuple(episode.episode_return for episode in flat),
        tuple(episode.episode_length for episode in flat),
    )


@contextlib.contextmanager
def _at_rest(policy: Policy) -> Iterator[None]:
    """Layers with running statistics stay as they are, and afterwards each in its own mode."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
