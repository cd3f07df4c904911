"""Parallel multi-agent environments: a column of the rollout for every agent.

The interface is that of PettingZoo's parallel environments (Terry et al. 2021), by its methods
alone: agents act at the same time, and share one policy.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Final, Harvest, draw_seed
from ppo.collector.replay import Bookmark, kind_of, stream_at
from ppo.errors import EnvError, SpaceError
from ppo.rollout import Episode
from ppo.spaces import (
    MASK_KEY,
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    make_action_adapter,
)
from ppo.trees import leaves, map_tree

__all__ = ["AgentColumns"]


class AgentColumns:
    """The agents of parallel environments, one per column, environment after environment.

    An agent that has ended leaves rows that are no transitions (`valid=False`) until its
    environment starts anew, or until it returns; each life of an agent is an episode. An
    environment is reset when none of its agents is left.

    Args:
        envs: Parallel environments whose agents share their spaces.
        seeds: One generator of episode seeds per environment.
        first: Index of the first environment.
        borrowed: The caller's own environment among them, never closed.
    """

    def __init__(
        self,
        envs: Sequence[Any],
        seeds: Sequence[np.random.Generator],
        first: int = 0,
        borrowed: Any = None,
    ) -> None:
        self._envs, self._seeds, self._borrowed = list(envs), list(seeds), borrowed
        self._agents = list(self._envs[0].possible_agents)
        self.first = first * len(self._agents)
        self._first_env = first
        self.num_envs = len(self._envs) * len(self._agents)
        try:
            self.observation_space, self.action_space = self._shared_spaces()
            make_action_adapter(self.action_space)
            self._layout = ObservationLayout(check_observation_space(self.observation_space))
        except SpaceError:
            self.close()
            raise
        self._masks = ActionMasks(self.action_space)
        self._mask_in_obs = self._masks.lie_in(self.observation_space)
        self._masked = False
        # Who acts in the next step, [environments, agents].
        self._acting = np.zeros((len(self._envs), len(self._agents)), np.bool_)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._finals: list[Final] = []
        self._episodes: list[tuple[int, Episode]] = []

    def _shared_spaces(self) -> tuple[Any, Any]:
        found: tuple[Any, Any] | None = None
        for env in self._envs:
            if list(env.possible_agents) != self._agents:
                raise SpaceError(
                    f"environments differ in their agents: {list(env.possible_agents)} against "
                    f"{self._agents}"
                )
            for agent in self._agents:
                spaces = env.observation_space(agent), env.action_space(agent)
                found = found or spaces
                if spaces != found:
                    raise SpaceError(
                        f"agent {agent!r} has other spaces than {self._agents[0]!r}: {spaces} "
                        f"against {found}; agents that share a policy must share their spaces"
                    )
        if found is None:
            raise SpaceError("possible_agents is empty; there is nobody to act")
        return found

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
        self._valid = buffers.valid[:, mine]
        self._progress = buffers.progress[mine]
        self._adapter = make_action_adapter(self.action_space, squash=buffers.layout.squash)

    def bookmarks(self) -> list[Bookmark]:
        """The streams of seeds; agents come and go, and episodes cannot be gone on with."""
        return [
            Bookmark(kind_of(env), rng.bit_generator.state)
            for env, rng in zip(self._envs, self._seeds, strict=True)
            for _ in self._agents
        ]

    def restore(
        self,
        marks: Sequence[Bookmark],
        actions: Sequence[Any],
        digests: Sequence[str],
        squash: bool,
    ) -> list[bool]:
        """Take up the streams of seeds; says that no column is in an episode."""
        self._seeds = [stream_at(mark.seeds) for mark in marks[:: len(self._agents)]]
        return [False] * self.num_envs

    def reset(self, row: int = 0) -> list[bool]:
        """Start the first episodes with this row; says which columns give masks."""
        for array in leaves(self._obs):
            array[row] = 0  # of whoever is not there from the first
        for index in range(len(self._envs)):
            self._reset(index, row)
        return [self._masked] * self.num_envs

    def _reset(self, index: int, row: int) -> None:
        """Begin an episode of an environment; what its agents see goes to this row."""
        obs, infos = self._call(index, "reset", seed=draw_seed(self._seeds[index]))
        live = list(self._envs[index].agents)
        if not live:
            index += self._first_env
            raise EnvError(f"environment {index} has no agents after reset; nobody can act")
        if not self._masked and self._masks.size:
            self._masked = self._mask_in_obs or MASK_KEY in infos.get(live[0], {})
        for number, agent in enumerate(self._agents):
            column = index * len(self._agents) + number
            self._acting[index, number] = agent in live
            if agent in live:
                self._begin(column)
                self._write(row, column, agent, obs, infos)

    def step(self, t: int) -> None:
        """Let the agents that are there act; where nobody is left, start anew."""
        actions = self._adapter.rows(self._adapter(map_tree(lambda rows: rows[t], self._actions)))
        self._rewards[t], self._terminated[t], self._truncated[t] = 0.0, False, False
        self._valid[t] = self._acting.reshape(-1)
        for array in leaves(self._obs):
            array[t + 1] = array[t]  # of whoever is not there
        if self._masked:
            self._mask_rows[t + 1] = True
        for index in range(len(self._envs)):
            self._step_env(index, t, actions)
        self._progress[:] = t + 1

    def _step_env(self, index: int, t: int, actions: Sequence[Any]) -> None:
        width = len(self._agents)
        first = index * width
        acting = {
            agent: first + number
            for number, agent in enumerate(self._agents)
            if self._acting[index, number]
        }
        chosen = {agent: actions[column] for agent, column in acting.items()}
        obs, rewards, terminated, truncated, infos = self._call(index, "step", chosen)
        live = set(self._envs[index].agents)
        for agent, column in acting.items():
            self._end_of_step(
                t, column, agent, obs, rewards, bool(terminated[agent]), bool(truncated[agent])
            )
        for number, agent in enumerate(self._agents):
            column = first + number
            if agent not in live:
                self._acting[index, number] = False
                continue
            over = agent in acting and (terminated[agent] or truncated[agent])
            if over or agent not in acting:
                self._begin(column)  # it has come back
            self._acting[index, number] = True
            self._write(t + 1, column, agent, obs, infos)
        if not live:
            self._reset(index, t + 1)

    def _end_of_step(
        self,
        t: int,
        column: int,
        agent: str,
        obs: Any,
        rewards: Any,
        terminated: bool,
        truncated: bool,
    ) -> None:
        reward = float(rewards[agent])
        self._rewards[t, column] = reward
        self._terminated[t, column] = terminated
        self._truncated[t, column] = truncated
        self._returns[column] += reward
        self._lengths[column] += 1
        if terminated or truncated:
            if not terminated:
                last = self._layout.copy(obs[agent])
                self._finals.append(Final(t, self.first + column, last))
            episode = Episode(
                float(self._returns[column]), int(self._lengths[column]), self.first + column
            )
            self._episodes.append((t, episode))

    def _begin(self, column: int) -> None:
        self._returns[column], self._lengths[column] = 0.0, 0

    def _write(self, row: int, column: int, agent: str, obs: Any, infos: Any) -> None:
        """Write down what an agent's next action will be taken on."""
        try:
            self._layout.write(self._obs, (row, column), obs[agent])
            if self._masked:
                given = obs[agent] if self._mask_in_obs else infos.get(agent, {})
                self._mask_rows[row, column] = self._masks.read(given[MASK_KEY])
        except (KeyError, TypeError, ValueError) as error:
            index = self._first_env + column // len(self._agents)
            raise EnvError(f"agent {agent!r} of environment {index}: {error!r}") from error

    def _call(self, index: int, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self._envs[index], method)(*args, **kwargs)
        except Exception as error:
            raise EnvError(
                f"environment {self._first_env + index} raised {type(error).__name__} in "
                f"{method}: {error}\n\n{traceback.format_exc()}"
            ) from error

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
