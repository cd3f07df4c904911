"""The columns of a rollout: environments stepped one after the other in this process.

Everything that touches an episode boundary is here: who resets, what the true successor was, what
an episode returned.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from ppo.collector.buffers import Buffers
from ppo.envs import Env, EnvFactory
from ppo.errors import EnvError, PPOError, SpaceError
from ppo.rollout import Episode
from ppo.spaces import make_action_adapter, observation_dtype

__all__ = ["Columns", "EnvColumns", "Final", "Harvest", "draw_seed"]


class Final(NamedTuple):
    """The successor observation of a truncated step, which no row of the rollout holds."""

    step: int
    env_index: int
    obs: np.ndarray


class Harvest(NamedTuple):
    """What a rollout leaves besides its rows."""

    finals: list[Final]
    episodes: list[tuple[int, Episode]]  # with the step they ended at


class Columns(Protocol):
    """Some columns `[first, first + num_envs)` of a rollout and the environments behind them."""

    first: int
    num_envs: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]

    def attach(self, buffers: Buffers) -> None:
        """Write into these arrays from now on."""

    def reset(self) -> None:
        """Start the first episodes; their observations go to `obs[0]`."""

    def step(self, t: int) -> None:
        """Take `actions[t]`; write row `t` and `obs[t + 1]`."""

    def harvest(self) -> Harvest:
        """Hand over what has gathered since the last call."""

    def close(self) -> None:
        """Close the environments that are ours."""


def draw_seed(rng: np.random.Generator) -> int:
    """A seed for `reset`, below 2**31 as some environments demand."""
    return int(rng.integers(2**31 - 1))


class EnvColumns:
    """Gymnasium environments, one per column, stepped one after the other.

    Every episode gets a seed of its own from its column's stream, so an episode depends on
    (seed, column, number of the episode) and can be replayed from its seed and actions.

    Args:
        factories: One per column; each is called once, here.
        seeds: One generator of episode seeds per column.
        first: Index of the first column.
        borrowed: The caller's own environment, used for column 0 and never closed.
    """

    def __init__(
        self,
        factories: Sequence[EnvFactory],
        seeds: Sequence[np.random.Generator],
        first: int = 0,
        borrowed: Env | None = None,
    ) -> None:
        self.first = first
        self.num_envs = len(factories)
        self._seeds = seeds
        self._borrowed = borrowed
        self._envs: list[Env] = []
        try:
            for index, factory in enumerate(factories):
                use_borrowed = borrowed is not None and first + index == 0
                self._envs.append(
                    borrowed if use_borrowed else self._make(factory, first + index)  # type: ignore[arg-type]
                )
        except BaseException:
            self.close()
            raise
        self.observation_space = self._envs[0].observation_space
        self.action_space = self._envs[0].action_space
        for index, env in enumerate(self._envs):
            if (env.observation_space, env.action_space) != (
                self.observation_space,
                self.action_space,
            ):
                self.close()
                raise SpaceError(
                    f"environment {first + index} has other spaces than environment {first}: "
                    f"{env.observation_space}, {env.action_space} against "
                    f"{self.observation_space}, {self.action_space}"
                )
        try:
            self._adapter = make_action_adapter(self.action_space)
        except SpaceError:
            self.close()
            raise
        self._obs_shape = self.observation_space.shape
        self._obs_dtype = observation_dtype(self.observation_space)  # type: ignore[arg-type]
        self._steps = [env.step for env in self._envs]
        self._episode_seeds = [0] * self.num_envs
        self._returns = [0.0] * self.num_envs
        self._lengths = [0] * self.num_envs
        self._finals: list[Final] = []
        self._episodes: list[tuple[int, Episode]] = []

    @staticmethod
    def _make(factory: EnvFactory, index: int) -> Env:
        try:
            env = factory()
        except PPOError:
            raise
        except Exception as error:
            raise EnvError(
                f"the factory of environment {index} raised {type(error).__name__}: {error}\n\n"
                f"{traceback.format_exc()}"
            ) from error
        if not isinstance(env, gymnasium.Env):
            raise TypeError(
                f"the factory of environment {index} must return a gymnasium.Env, "
                f"got {type(env).__name__}"
            )
        return env

    def attach(self, buffers: Buffers) -> None:
        """Write into these arrays from now on."""
        mine = slice(self.first, self.first + self.num_envs)
        self._obs = buffers.obs[:, mine]
        self._actions = buffers.actions[:, mine]
        self._rewards = buffers.rewards[:, mine]
        self._terminated = buffers.terminated[:, mine]
        self._truncated = buffers.truncated[:, mine]
        self._progress = buffers.progress[mine]
        buffers.valid[:, mine] = True

    def reset(self) -> None:
        """Start the first episodes."""
        for index in range(self.num_envs):
            self._obs[0, index] = self._reset(index, None)

    def _reset(self, index: int, t: int | None) -> Any:
        seed = draw_seed(self._seeds[index])
        self._episode_seeds[index], self._returns[index], self._lengths[index] = seed, 0.0, 0
        try:
            obs, _ = self._envs[index].reset(seed=seed)
            if np.shape(obs) != self._obs_shape:
                raise ValueError(self._wrong_shape("reset", obs))
        except Exception as error:
            raise self._fault("reset", index, t, error) from error
        return obs

    def step(self, t: int) -> None:
        """Take `actions[t]`; where an episode ends, keep its last observation and start anew."""
        actions = self._adapter(self._actions[t])
        obs_rows = self._obs[t + 1]
        rewards, terminations, truncations = [], [], []
        index = 0
        try:
            for index, step in enumerate(self._steps):
                obs, reward, terminated, truncated, _ = step(actions[index])
                # Most are arrays, whose own shape is at hand.
                shape = getattr(obs, "shape", None)
                if shape != self._obs_shape and np.shape(obs) != self._obs_shape:
                    raise ValueError(self._wrong_shape("step", obs))
                rewards.append(float(reward))
                terminations.append(bool(terminated))
                truncations.append(bool(truncated))
                self._returns[index] += rewards[-1]
                self._lengths[index] += 1
                if terminated or truncated:
                    if not terminated:
                        # A copy: the environment may reuse its buffer in reset.
                        last = np.array(obs, self._obs_dtype)
                        self._finals.append(Final(t, self.first + index, last))
                    self._finish(index, t)
                    obs = self._reset(index, t)
                obs_rows[index] = obs
                self._progress[index] = t + 1
        except EnvError:
            raise
        except Exception as error:
            raise self._fault("step", index, t, error, actions[index]) from error
        self._rewards[t] = rewards
        self._terminated[t] = terminations
        self._truncated[t] = truncations

    def _finish(self, index: int, t: int) -> None:
        episode = Episode(self._returns[index], self._lengths[index], self.first + index)
        self._episodes.append((t, episode))

    def harvest(self) -> Harvest:
        """Hand over the final observations and finished episodes since the last call."""
        harvest = Harvest(self._finals, self._episodes)
        self._finals, self._episodes = [], []
        return harvest

    def close(self) -> None:
        """Close every environment but the caller's own; errors of one do not keep the others."""
        for env in self._envs:
            if env is not self._borrowed:
                try:
                    env.close()
                except Exception:  # the environment is given up either way
                    continue
        self._envs = []

    def _fault(
        self, where: str, index: int, t: int | None, error: Exception, action: Any = None
    ) -> EnvError:
        step = "" if t is None else f", rollout step {t}"
        taken = "" if action is None else f", action {action!r}"
        return EnvError(
            f"environment {self.first + index} raised {type(error).__name__} in {where}: {error} "
            f"(episode seed {self._episode_seeds[index]}, episode step {self._lengths[index]}"
            f"{step}{taken})\n\n{''.join(traceback.format_exception(error))}"
        )

    def _wrong_shape(self, where: str, obs: Any) -> str:
        return (
            f"{where} returned an observation of shape {np.shape(obs)}, but observation_space has "
            f"shape {self._obs_shape}"
        )
