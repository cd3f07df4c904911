"""The columns of a rollout: environments stepped one after the other in this process.

Everything that touches an episode boundary is here: who resets, what the true successor was, what
an episode returned.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from ppo.collector.buffers import Buffers
from ppo.envs import Env, EnvFactory
from ppo.errors import EnvError, PPOError, SpaceError
from ppo.rollout import Episode
from ppo.spaces import (
    MASK_KEY,
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    make_action_adapter,
)
from ppo.trees import map_tree

__all__ = ["Columns", "EnvColumns", "Final", "Harvest", "draw_seed"]


MaskSource = Callable[[Any, dict[str, Any]], Any]
"""From what an environment returned, observation and info, to a mask."""


class Final(NamedTuple):
    """The successor observation of a truncated step, which no row of the rollout holds."""

    step: int
    env_index: int
    obs: Any


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

    def reset(self) -> list[bool]:
        """Start the first episodes; their observations go to `obs[0]`, their masks to `masks[0]`.

        Returns for every column whether its environment gives action masks.
        """

    def step(self, t: int) -> None:
        """Take `actions[t]`; write row `t`, `obs[t + 1]` and `masks[t + 1]`."""

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
            make_action_adapter(self.action_space)
            self._layout = ObservationLayout(check_observation_space(self.observation_space))
        except SpaceError:
            self.close()
            raise
        self._masks = ActionMasks(self.action_space)
        self._mask_sources: list[MaskSource | None] = [None] * self.num_envs
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
        self._obs, self._actions = (
            map_tree(lambda array: array[:, mine], tree) for tree in (buffers.obs, buffers.actions)
        )
        self._mask_rows = buffers.masks[:, mine]
        self._rewards = buffers.rewards[:, mine]
        self._terminated = buffers.terminated[:, mine]
        self._truncated = buffers.truncated[:, mine]
        self._progress = buffers.progress[mine]
        buffers.valid[:, mine] = True
        self._adapter = make_action_adapter(self.action_space, squash=buffers.layout.squash)

    def reset(self) -> list[bool]:
        """Start the first episodes; says which columns give masks."""
        for index in range(self.num_envs):
            self._reset(index, None)
        return [source is not None for source in self._mask_sources]

    def _reset(self, index: int, t: int | None) -> None:
        """Begin an episode, whose first observation goes to row `t + 1`."""
        seed = draw_seed(self._seeds[index])
        self._episode_seeds[index], self._returns[index], self._lengths[index] = seed, 0.0, 0
        try:
            obs, info = self._envs[index].reset(seed=seed)
            if t is None:
                self._mask_sources[index] = self._mask_source(self._envs[index], info)
            self._write(index, 0 if t is None else t + 1, obs, info)
        except Exception as error:
            raise self._fault("reset", index, t, error) from error

    def _write(self, index: int, row: int, obs: Any, info: dict[str, Any]) -> None:
        """Write down what the next action will be taken on."""
        self._layout.write(self._obs, (row, index), obs)
        self._write_mask(index, row, obs, info)

    def _write_mask(self, index: int, row: int, obs: Any, info: dict[str, Any]) -> None:
        source = self._mask_sources[index]
        if source is not None:
            self._mask_rows[row, index] = self._masks.read(source(obs, info))

    def _mask_source(self, env: Env, info: dict[str, Any]) -> MaskSource | None:
        """Where an environment says which actions are legal; None if nowhere."""
        if not self._masks.size:
            return None
        if MASK_KEY in info:
            return _mask_of_info
        if env.has_wrapper_attr("action_masks"):
            method = env.get_wrapper_attr("action_masks")
            return lambda obs, info: method()
        if self._masks.lie_in(self.observation_space):
            return lambda obs, info: obs[MASK_KEY]
        return None

    def step(self, t: int) -> None:
        """Take `actions[t]`; where an episode ends, keep its last observation and start anew."""
        raw = map_tree(lambda array: array[t], self._actions)
        actions = self._adapter.rows(self._adapter(raw))
        obs_rows = map_tree(lambda array: array[t + 1], self._obs)
        write, sources = self._layout.write, self._mask_sources
        rewards, terminations, truncations = [], [], []
        index = 0
        try:
            for index, step in enumerate(self._steps):
                obs, reward, terminated, truncated, info = step(actions[index])
                reward = float(reward)
                rewards.append(reward)
                terminations.append(bool(terminated))
                truncations.append(bool(truncated))
                self._returns[index] += reward
                self._lengths[index] += 1
                if terminated or truncated:
                    # A copy: the environment may reuse its buffer in reset.
                    last = self._layout.copy(obs)
                    if not terminated:
                        self._finals.append(Final(t, self.first + index, last))
                    self._finish(index, t)
                    self._reset(index, t)
                else:
                    write(obs_rows, index, obs)
                    if sources[index] is not None:
                        self._write_mask(index, t + 1, obs, info)
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


def _mask_of_info(obs: Any, info: dict[str, Any]) -> Any:
    if MASK_KEY not in info:
        raise ValueError(f"info has no {MASK_KEY!r}, but it had one before; give one in each step")
    return info[MASK_KEY]
