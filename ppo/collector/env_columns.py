"""Gymnasium environments as the columns of a rollout, stepped one after the other."""

from __future__ import annotations

import contextlib
import functools
import itertools
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Final, Harvest, Part, draw_seed, give_up_row
from ppo.collector.faults import Restarts, check_info, env_fault
from ppo.collector.replay import Bookmark, Place, kind_of, return_to, snapshot_of, stream_at
from ppo.envs import AnyEnv, Env, EnvFactory, is_parallel
from ppo.errors import EnvError, PPOError, SpaceError
from ppo.rollout import Episode
from ppo.spaces import (
    MASK_KEY,
    ActionMasks,
    ObservationLayout,
    Space,
    check_observation_space,
    make_action_adapter,
)
from ppo.trees import map_tree

__all__ = ["EnvColumns", "make_by", "mask_source"]

MaskSource = Callable[[Any, dict[str, Any]], Any]
"""From what an environment returned, observation and info, to a mask."""
_EnvStep = Callable[[Any], Any]
_Rows = Callable[[int], Any]
"""Rows of a tree by their number."""
_Share = tuple[int, list[_EnvStep], _Rows]
"""Some columns: the first of them, how each is stepped, and their raw actions."""


class EnvColumns:
    """Gymnasium environments, one per column, stepped one after the other.

    Every episode gets a seed of its own from its column's stream, so an episode depends on
    (seed, column, number of the episode) and can be replayed from its seed and actions.

    Args:
        factories: One per column; each is called once, here, unless its environment is made.
        seeds: One generator of episode seeds per column.
        made: Environments of the first columns that are made already.
        first: Index of the first column.
        borrowed: The caller's own environment, used for column 0 and never closed.
        max_restarts: How many times an environment that raised is made anew, over all columns;
            after that, its error is raised.
    """

    def __init__(
        self,
        factories: Sequence[EnvFactory],
        seeds: Sequence[np.random.Generator],
        made: Sequence[Any] = (),
        first: int = 0,
        borrowed: Any = None,
        max_restarts: int = 0,
    ) -> None:
        self.first = first
        self.num_envs = len(factories)
        self._factories = factories
        self._seeds = list(seeds)
        self._borrowed = borrowed
        self._restarts = Restarts(max_restarts)
        self._in_rows = max_restarts > 0  # what a lost worker leaves is gone on with at one row
        self._envs: list[Env] = list(made)
        try:
            for index in range(len(made), self.num_envs):
                self._envs.append(_make_one(factories[index], first + index))
            self.observation_space, self.action_space = _spaces_of(self._envs[0], first)
            for index, env in enumerate(self._envs, first):
                self._check_spaces(index, env, f"has other spaces than environment {first}")
            make_action_adapter(self.action_space)
            self._layout = ObservationLayout(check_observation_space(self.observation_space))
        except BaseException:
            self.close()
            raise
        self._masks = ActionMasks(self.action_space)
        self._mask_sources: list[MaskSource | None] = [None] * self.num_envs
        self._new = set(range(self.num_envs))  # environments never reset so far
        self._steps: list[_EnvStep] = [env.step for env in self._envs]
        self._episode_seeds: list[int | None] = [None] * self.num_envs
        self._returns = [0.0] * self.num_envs
        self._lengths = [0] * self.num_envs
        self._finals: list[Final] = []
        self._episodes: list[tuple[int, Episode]] = []

    def _check_spaces(self, index: int, env: Env, fault: str) -> None:
        spaces, wanted = _spaces_of(env, index), (self.observation_space, self.action_space)
        if spaces != wanted:
            raise SpaceError(
                f"environment {index} {fault}: {spaces[0]}, {spaces[1]} against "
                f"{wanted[0]}, {wanted[1]}"
            )

    def attach(self, buffers: Buffers) -> None:
        """Write into these arrays from now on."""
        self._buffers = buffers
        mine = slice(self.first, self.first + self.num_envs)
        self._obs, self._actions = (
            map_tree(lambda array: array[:, mine], tree) for tree in (buffers.obs, buffers.actions)
        )
        self._mask_rows = buffers.masks[:, mine]
        self._rewards = buffers.rewards[:, mine]
        self._terminated = buffers.terminated[:, mine]
        self._truncated = buffers.truncated[:, mine]
        self._progress = buffers.progress[mine]
        self._started = buffers.started[mine]
        self._shown_seeds = buffers.episode_seeds[mine]
        for index, seed in enumerate(self._episode_seeds):
            if seed is not None:
                self._shown_seeds[index], self._started[index] = seed, -self._lengths[index]
        self._adapter = make_action_adapter(self.action_space, squash=buffers.layout.squash)
        self._obs_of = _rows_of(self._obs)
        self._all = self._share(0, self._steps)

    def bookmarks(self) -> list[Bookmark]:
        """The place of every column in its episode."""
        return [
            Bookmark(
                kind_of(env),
                self._seeds[index].bit_generator.state,
                self._episode_seeds[index],
                self._returns[index],
                self._lengths[index],
                None if self._episode_seeds[index] is None else snapshot_of(env),
            )
            for index, env in enumerate(self._envs)
        ]

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Go to these places; says which columns got there."""
        adapter = make_action_adapter(self.action_space, squash=squash)
        for index, place in enumerate(places):
            mark = place.mark
            self._seeds[index] = stream_at(mark.seeds)
            env, layout = self._envs[index], self._layout
            info = return_to(env, place, adapter, layout)
            if info is not None:
                self._mask_sources[index] = mask_source(env, info)
                self._new.discard(index)
                self._episode_seeds[index] = mark.seed
                self._returns[index] = mark.episode_return
                self._lengths[index] = mark.episode_length
        return [seed is not None for seed in self._episode_seeds]

    def reset(self, row: int = 0) -> list[bool]:
        """Start the first episodes with this row; says which columns give masks."""
        for index, seed in enumerate(self._episode_seeds):
            if seed is None:
                self._reset(index, row)
        return [source is not None for source in self._mask_sources]

    def _reset(self, index: int, row: int) -> None:
        """Begin an episode, whose first observation goes to this row."""
        while True:
            self._shown_seeds[index] = seed = draw_seed(self._seeds[index])
            self._episode_seeds[index] = seed
            self._returns[index], self._lengths[index] = 0.0, 0
            self._started[index] = row + 1  # not before it is there
            try:
                obs, info = self._envs[index].reset(seed=seed)
                check_info(info)
                if index in self._new:
                    self._mask_sources[index] = mask_source(self._envs[index], info)
                    self._new.discard(index)
                self._write(index, row, obs, info)
            except Exception as error:
                self._replace(index, row, self._fault("reset", index, row - 1, error))
            else:
                self._started[index] = row
                return

    def _replace(self, index: int, row: int, fault: Exception) -> None:
        """Make an environment that failed anew, or raise what it failed with."""
        self._restarts.spend(row, self.first + index, fault)
        self._close(self._envs[index])
        while True:
            try:
                env = _make_one(self._factories[index], self.first + index)
                break
            except PPOError as error:
                self._restarts.spend(row, self.first + index, error)
        try:
            self._check_spaces(self.first + index, env, "was made anew with other spaces")
        except SpaceError:
            self._close(env)
            raise
        self._envs[index], self._steps[index] = env, env.step
        self._new.add(index)

    def _write(self, index: int, row: int, obs: Any, info: dict[str, Any]) -> None:
        """Write down what the next action will be taken on."""
        self._layout.write(self._obs, (row, index), obs)
        self._write_mask(index, row, obs, info)

    def _write_mask(self, index: int, row: int, obs: Any, info: dict[str, Any]) -> None:
        source = self._mask_sources[index]
        if source is not None:
            self._mask_rows[row, index] = self._masks.read(source(obs, info))

    def step(self, t: int) -> None:
        """Take `actions[t]`; where an episode ends, keep its last observation and start anew."""
        self._step(self._all, t)

    def parts(self, size: int) -> list[Part]:
        """The columns, cut at multiples of `size`; all in one if a lost worker may be replaced."""
        if self._in_rows:
            return [Part(self.first, self.num_envs, self.step)]
        bounds = [0, *range(size - self.first % size, self.num_envs, size), self.num_envs]
        parts = []
        for start, stop in itertools.pairwise(bounds):
            step = functools.partial(self._step, self._share(start, self._steps[start:stop]))
            parts.append(Part(self.first + start, stop - start, step))
        return parts

    def _share(self, start: int, steps: list[_EnvStep]) -> _Share:
        own = slice(start, start + len(steps))
        return start, steps, _rows_of(map_tree(lambda array: array[:, own], self._actions))

    def _step(self, share: _Share, t: int) -> None:
        start, steps, actions_of = share
        actions = self._adapter.rows(self._adapter(actions_of(t)))
        obs_rows, rewards = self._obs_of(t + 1), self._rewards[t]
        returns, lengths, progress = self._returns, self._lengths, self._progress
        write, mask_sources = self._layout.write, self._mask_sources
        columns = enumerate(steps, start)
        index, last = start - 1, start + len(steps) - 1
        while index < last:
            try:
                for index, step in columns:
                    obs, reward, terminated, truncated, info = step(actions[index - start])
                    rewards[index] = reward = float(reward)
                    returns[index] += reward
                    lengths[index] += 1
                    if terminated or truncated:
                        self._end_episode(index, t, obs, bool(terminated), bool(truncated))
                    else:
                        write(obs_rows, index, obs)
                        if mask_sources[index] is not None:
                            self._write_mask(index, t + 1, obs, info)
                    progress[index] = t + 1
            except EnvError:
                raise
            except Exception as error:
                fault = self._fault("step", index, t, error, actions[index - start])
                self._replace(index, t + 1, fault)
                self._finals += give_up_row(self._buffers, t, self.first + index)
                self._reset(index, t + 1)
                progress[index] = t + 1

    def _end_episode(self, index: int, t: int, obs: Any, terminated: bool, truncated: bool) -> None:
        """Keep what the episode leaves, and begin the next one."""
        self._terminated[t, index], self._truncated[t, index] = terminated, truncated
        if not terminated:
            # A copy: the environment may reuse its buffer in reset.
            last = self._layout.copy(obs)
            self._finals.append(Final(t, self.first + index, last))
        self._finish(index, t)
        self._reset(index, t + 1)

    def _finish(self, index: int, t: int) -> None:
        episode = Episode(self._returns[index], self._lengths[index], self.first + index)
        self._episodes.append((t, episode))

    def harvest(self) -> Harvest:
        """Hand over the final observations and finished episodes since the last call."""
        # In order: a row is given up a step after the one whose successor it holds, and one part
        # is through with a rollout before the next one begins it.
        harvest = Harvest.joined([Harvest(self._finals, self._episodes, self._restarts.take())])
        self._finals, self._episodes = [], []
        return harvest

    def close(self) -> None:
        """Close every environment but the caller's own; errors of one do not keep the others."""
        for env in self._envs:
            self._close(env)
        self._envs = []

    def _close(self, env: Env) -> None:
        if env is not self._borrowed:
            with contextlib.suppress(Exception):  # the environment is given up either way
                env.close()

    def _fault(
        self, where: str, index: int, t: int, error: Exception, action: Any = None
    ) -> EnvError:
        fault = env_fault(
            where,
            self.first + index,
            error,
            seed=self._episode_seeds[index],
            episode_step=0 if action is None else t - int(self._started[index]),
            t=t,
            action=action,
        )
        return fault


def _rows_of(tree: Any) -> _Rows:
    """Rows by their number; plain for a plain array, which is the hot path."""
    if isinstance(tree, np.ndarray):
        return tree.__getitem__
    return lambda t: map_tree(lambda array: array[t], tree)


def make_by(factory: EnvFactory, index: int) -> AnyEnv:
    """Call a factory; what it raises and what it returns otherwise is said with its index."""
    try:
        env = factory()
    except PPOError:
        raise
    except Exception as error:
        raise EnvError(
            f"the factory of environment {index} raised {type(error).__name__}: {error}\n\n"
            f"{traceback.format_exc()}"
        ) from error
    if not isinstance(env, gymnasium.Env) and not is_parallel(env):
        raise TypeError(
            f"the factory of environment {index} must return a gymnasium.Env, "
            f"got {type(env).__name__}"
        )
    return env


def _make_one(factory: EnvFactory, index: int) -> Env:
    env: Env = make_by(factory, index)
    if is_parallel(env):
        raise TypeError(
            f"environment {index} has several agents, but the first one has a single one; collect "
            "them one kind at a time"
        )
    return env


def _spaces_of(env: Env, index: int) -> tuple[Space, Space]:
    """What an environment shows and what it takes; says which of them it does not declare."""
    for name in ("observation_space", "action_space"):
        if not hasattr(env, name):
            raise SpaceError(
                f"environment {index} ({type(env.unwrapped).__name__}) has no {name}; set "
                f"self.{name} in its __init__ to one of gymnasium.spaces"
            )
    return env.observation_space, env.action_space


def mask_source(env: Env, info: dict[str, Any]) -> MaskSource | None:
    """Where an environment says which actions are legal, as of its first info; None if nowhere."""
    masks = ActionMasks(env.action_space)
    if not masks.size:
        return None
    if MASK_KEY in info:
        return _mask_of_info
    if env.has_wrapper_attr("action_masks"):
        method = env.get_wrapper_attr("action_masks")
        return lambda obs, info: method()
    if masks.lie_in(env.observation_space):
        return lambda obs, info: obs[MASK_KEY]
    return None


def _mask_of_info(obs: Any, info: dict[str, Any]) -> Any:
    if MASK_KEY not in info:
        raise ValueError(f"info has no {MASK_KEY!r}, but it had one before; give one in each step")
    return info[MASK_KEY]
