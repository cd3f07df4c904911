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
from ppo.collector import open_columns
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.streams import NOISE, POLICY, stream
from ppo.envs import EnvLike, resolve_env
from ppo.policies.protocol import Policy, policy_device, takes_generator
from ppo.rollout import Episode
from ppo.spaces import (
    check_observation_space,
    check_policy_spaces,
    make_action_adapter,
    observation_dtype,
)

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
        seed: Seeds episodes and, when sampling, actions.
        env_kwargs: For an id, passed to `gymnasium.make`.
        autoreset_mode: For a vector environment whose metadata does not name its mode.

    Returns:
        An `EvaluationResult`, ordered by environment and then by time.

    Raises:
        ValueError: `episodes` is below 1.
        TypeError: `episodes` is no integer.
        PPOError: As for `RolloutCollector`.

    Example:
        >>> import gymnasium
        >>> from ppo import evaluate, make_policy
        >>> env = gymnasium.make("CartPole-v1")
        >>> result = evaluate(make_policy(env.observation_space, env.action_space), env, episodes=4)
        >>> len(result.episode_returns)
        4
    """
    check_positive_integer("episodes", episodes)
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    source = resolve_env(
        env, min(num_envs, episodes), env_kwargs=env_kwargs, autoreset_mode=autoreset_mode
    )
    columns = open_columns(source, root)
    with contextlib.closing(columns), _at_rest(policy):
        box = check_observation_space(columns.observation_space)
        check_policy_spaces(policy, columns.observation_space, columns.action_space)
        adapter = make_action_adapter(columns.action_space)
        count = columns.num_envs
        layout = Layout(
            1, count, box.shape, observation_dtype(box), adapter.shape, adapter.dtype, 0
        )
        buffers = Buffers(layout)
        columns.attach(buffers)
        columns.reset()
        quota = [episodes // count + (index < episodes % count) for index in range(count)]
        played: list[list[Episode]] = [[] for _ in range(count)]
        act = _actor(policy, root, count, deterministic)
        while any(len(done) < wanted for done, wanted in zip(played, quota, strict=True)):
            buffers.actions[0] = act(buffers.obs[0])
            columns.step(0)
            buffers.obs[0] = buffers.obs[1]
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


def _actor(policy: Policy, root: np.random.SeedSequence, count: int, deterministic: bool) -> Any:
    """A function from observations `[N, ...]` to raw actions `[N, ...]`, with its own streams."""
    device = policy_device(policy)  # type: ignore[arg-type]
    noises = [stream(root, NOISE, index) for index in range(count)]
    generator = torch.Generator().manual_seed(int(stream(root, POLICY, 0).integers(2**63 - 1)))
    draw = getattr(policy, "draw_noise", None)

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        arguments: dict[str, Any] = {"deterministic": deterministic}
        if not deterministic:
            if draw is None and takes_generator(policy):
                arguments["generator"] = generator
            elif draw is not None:
                noise = np.concatenate([draw(rng, 1) for rng in noises])
                arguments["noise"] = torch.from_numpy(noise).to(device)
        actions = policy.act(torch.from_numpy(obs.copy()).to(device), **arguments)
        return actions.cpu().numpy()

    return act
