"""A `gymnasium.vector.VectorEnv` as the columns of a rollout, in all three autoreset modes."""

from __future__ import annotations

import traceback
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Final, Harvest, draw_seed
from ppo.errors import EnvError
from ppo.rollout import Episode
from ppo.spaces import make_action_adapter, observation_dtype

__all__ = ["VectorColumns"]


class VectorColumns:
    """All columns from one vector environment, which the caller owns and closes.

    - NEXT_STEP: the step after an end ignores its action and returns the first observation of
      the next episode. That row is no transition and gets `valid=False`.
    - SAME_STEP: the last observation is in `infos["final_obs"]`.
    - DISABLED: the ended environments are reset here, with a `reset_mask`.

    Args:
        env: The vector environment.
        mode: Its autoreset mode.
        seeds: Generator of the seed for the first reset.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        mode: AutoresetMode,
        seeds: np.random.Generator,
    ) -> None:
        self.first = 0
        self.num_envs = env.num_envs
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self._env = env
        self._mode = mode
        self._seeds = seeds
        self._adapter = make_action_adapter(self.action_space)
        self._obs_dtype = observation_dtype(self.observation_space)  # type: ignore[arg-type]
        self._resetting = np.zeros(self.num_envs, np.bool_)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._finals: list[Final] = []
        self._episodes: list[tuple[int, Episode]] = []

    def attach(self, buffers: Buffers) -> None:
        """Write into these arrays from now on."""
        self._buffers = buffers

    def reset(self) -> None:
        """Start the first episodes."""
        self._resetting[:] = False
        self._returns[:] = 0.0
        self._lengths[:] = 0
        obs, _ = self._call("reset", seed=draw_seed(self._seeds))
        self._buffers.obs[0] = obs

    def step(self, t: int) -> None:
        """Take `actions[t]` in every environment."""
        buffers = self._buffers
        actions = self._adapter(buffers.actions[t])
        obs, rewards, terminated, truncated, infos = self._call("step", actions)
        valid = ~self._resetting
        buffers.valid[t] = valid
        buffers.rewards[t] = np.where(valid, rewards, 0.0)
        buffers.terminated[t] = np.asarray(terminated, np.bool_) & valid
        buffers.truncated[t] = np.asarray(truncated, np.bool_) & valid
        self._returns[valid] += np.asarray(rewards)[valid]
        self._lengths[valid] += 1
        ended = buffers.terminated[t] | buffers.truncated[t]
        if ended.any():
            obs = self._end_episodes(t, ended, obs, infos)
        buffers.obs[t + 1] = obs
        buffers.progress[:] = t + 1
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resetting = ended

    def _end_episodes(self, t: int, ended: np.ndarray, obs: Any, infos: dict[str, Any]) -> Any:
        """Record the ended episodes; returns the observations that the next actions see."""
        for index in np.flatnonzero(ended):
            column = int(index)
            if not self._buffers.terminated[t, column]:
                last = np.array(self._final_obs(column, obs, infos), self._obs_dtype)
                self._finals.append(Final(t, column, last))
            episode = Episode(float(self._returns[column]), int(self._lengths[column]), column)
            self._episodes.append((t, episode))
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        if self._mode is AutoresetMode.DISABLED:
            # A fresh dict each time: Gymnasium empties it.
            reset_obs, _ = self._call("reset", options={"reset_mask": ended.copy()})
            rows = ended.reshape(-1, *(1 for _ in self.observation_space.shape or ()))
            return np.where(rows, reset_obs, obs)
        return obs

    def _final_obs(self, column: int, obs: Any, infos: dict[str, Any]) -> Any:
        if self._mode is not AutoresetMode.SAME_STEP:
            return obs[column]
        if "final_obs" not in infos or infos["final_obs"][column] is None:
            raise EnvError(
                f"{self._env} ended environment {column} in autoreset mode SAME_STEP without "
                "infos['final_obs']; without the last observation a truncated step has no value"
            )
        return infos["final_obs"][column]

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._env, method)(*args, **kwargs)
        except Exception as error:
            raise EnvError(
                f"the vector environment raised {type(error).__name__} in {method}: {error}\n\n"
                f"{traceback.format_exc()}"
            ) from error

    def harvest(self) -> Harvest:
        """Hand over the final observations and finished episodes since the last call."""
        harvest = Harvest(self._finals, self._episodes)
        self._finals, self._episodes = [], []
        return harvest

    def close(self) -> None:
        """Leave the environment to the caller."""
