"""A `gymnasium.vector.VectorEnv` as the columns of a rollout, in all three autoreset modes."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Final, Harvest, Part, draw_seed
from ppo.collector.replay import Bookmark, Place, stream_at
from ppo.errors import EnvError
from ppo.rollout import Episode
from ppo.spaces import (
    MASK_KEY,
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    make_action_adapter,
)
from ppo.trees import map_tree

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
        make_action_adapter(self.action_space)
        self._layout = ObservationLayout(check_observation_space(self.observation_space))
        self._masks = ActionMasks(self.action_space)
        self._mask_source: str | None = None
        self._resetting = np.zeros(self.num_envs, np.bool_)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._finals: list[Final] = []
        self._episodes: list[tuple[int, Episode]] = []

    def attach(self, buffers: Buffers) -> None:
        """Write into these arrays from now on."""
        self._buffers = buffers
        self._adapter = make_action_adapter(self.action_space, squash=buffers.layout.squash)

    def bookmarks(self) -> list[Bookmark]:
        """The stream of seeds; its episodes have none of their own and cannot be gone on with."""
        mark = Bookmark(type(self._env).__qualname__, self._seeds.bit_generator.state)
        return [mark] * self.num_envs

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Take up the stream of seeds; says that no column is in an episode."""
        self._seeds = stream_at(places[0].mark.seeds)
        return [False] * self.num_envs

    def reset(self) -> list[bool]:
        """Start the first episodes; says which columns give masks."""
        self._resetting[:] = False
        self._returns[:] = 0.0
        self._lengths[:] = 0
        obs, infos = self._call("reset", seed=draw_seed(self._seeds))
        self._mask_source = self._find_mask_source(infos)
        self._write(0, obs, infos)
        return [self._mask_source is not None] * self.num_envs

    def _find_mask_source(self, infos: dict[str, Any]) -> str | None:
        """Where masks are: in infos, in a method of the environments, in observations, nowhere."""
        if not self._masks.size:
            return None
        if MASK_KEY in infos:
            return "info"
        if _has_method(self._env, "action_masks"):
            return "method"
        return "obs" if self._masks.lie_in(self.observation_space) else None

    def _write(
        self, row: int, obs: Any, infos: dict[str, Any], ended: np.ndarray | None = None
    ) -> None:
        """Write down what the next actions will be taken on."""
        with self._declared():
            self._layout.write_batch(self._buffers.obs, row, obs)
        if self._mask_source is None:
            return
        if self._mask_source == "info":
            given = infos.get(MASK_KEY)
        elif self._mask_source == "method":
            given = self._env.call("action_masks")  # type: ignore[attr-defined]
        else:
            given = obs[MASK_KEY]
        for index in range(self.num_envs):
            if ended is not None and ended[index] and self._mode is AutoresetMode.NEXT_STEP:
                self._buffers.masks[row, index] = True  # the next action will be ignored
                continue
            try:
                self._buffers.masks[row, index] = self._masks.read(_mask_at(given, index))
            except (KeyError, TypeError, ValueError) as error:
                raise EnvError(f"environment {index}: {error}") from error

    def step(self, t: int) -> None:
        """Take `actions[t]` in every environment."""
        buffers = self._buffers
        actions = self._adapter(map_tree(lambda array: array[t], buffers.actions))
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
            obs, infos = self._end_episodes(t, ended, obs, infos)
        self._write(t + 1, obs, infos, ended)
        buffers.progress[:] = t + 1
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resetting = ended

    def _end_episodes(
        self, t: int, ended: np.ndarray, obs: Any, infos: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Record the ended episodes; returns what the next actions see, and its infos."""
        for index in np.flatnonzero(ended):
            column = int(index)
            if not self._buffers.terminated[t, column]:
                with self._declared(f" for environment {column}"):
                    last = self._layout.copy(self._final_obs(column, obs, infos))
                self._finals.append(Final(t, column, last))
            episode = Episode(float(self._returns[column]), int(self._lengths[column]), column)
            self._episodes.append((t, episode))
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        if self._mode is AutoresetMode.DISABLED:
            # A fresh dict each time: Gymnasium empties it.
            reset_obs, reset_infos = self._call("reset", options={"reset_mask": ended.copy()})
            obs = self._layout.choose(ended, reset_obs, obs)
            if self._mask_source == "info":
                sources = [reset_infos if over else infos for over in ended]
                masks = [_mask_at(info.get(MASK_KEY), k) for k, info in enumerate(sources)]
                infos = {MASK_KEY: masks}
        return obs, infos

    def _final_obs(self, column: int, obs: Any, infos: dict[str, Any]) -> Any:
        if self._mode is not AutoresetMode.SAME_STEP:
            return self._layout.row(obs, column)
        if "final_obs" not in infos or infos["final_obs"][column] is None:
            raise EnvError(
                f"{self._env} ended environment {column} in autoreset mode SAME_STEP without "
                "infos['final_obs']; without the last observation a truncated step has no value"
            )
        return infos["final_obs"][column]

    @contextlib.contextmanager
    def _declared(self, where: str = "") -> Iterator[None]:
        """Raise `EnvError` for an observation that is not of the space."""
        try:
            yield
        except ValueError as error:
            raise EnvError(
                f"{self._env} does not return what it declares{where}: {error}"
            ) from error

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._env, method)(*args, **kwargs)
        except Exception as error:
            raise EnvError(
                f"the vector environment raised {type(error).__name__} in {method}: {error}\n\n"
                f"{traceback.format_exc()}"
            ) from error

    def parts(self, size: int) -> list[Part]:
        """The columns, which step together."""
        return [Part(self.first, self.num_envs, self.step)]

    def harvest(self) -> Harvest:
        """Hand over the final observations and finished episodes since the last call."""
        harvest = Harvest(self._finals, self._episodes)
        self._finals, self._episodes = [], []
        return harvest

    def close(self) -> None:
        """Leave the environment to the caller."""


def _mask_at(given: Any, index: int) -> Any:
    """The mask of one environment, from what a vector environment made of them all."""
    if isinstance(given, dict):  # with flags, which say who has given something, as `_key`
        return {key: _mask_at(part, index) for key, part in given.items() if f"_{key}" in given}
    if given is None:
        raise KeyError(f"infos have no {MASK_KEY!r}, but they had one before; give one each time")
    return given[index]


def _has_method(env: VectorEnv[Any, Any, Any], name: str) -> bool:
    """Whether the environments inside a vector environment have a method."""
    if not hasattr(env, "call"):
        return False
    # Asked by a method that every environment has: a failed call would end an AsyncVectorEnv.
    return all(env.call("has_wrapper_attr", name))
