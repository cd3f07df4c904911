"""Parallel multi-agent environments: a column of the rollout for every agent.

The interface is that of PettingZoo's parallel environments (Terry et al. 2021), by its methods
alone: agents act at the same time, and share one policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Final, Harvest, Part, draw_seed, give_up_row
from ppo.collector.env_columns import make_by
from ppo.collector.faults import Restarts, check_info, env_fault
from ppo.collector.replay import Bookmark, Place, kind_of, stream_at
from ppo.envs import EnvFactory
from ppo.errors import PPOError, SpaceError
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
        factories: One per environment, to make it anew.
        max_restarts: How many times an environment that raised is made anew, over all of them;
            after that, its error is raised.
    """

    def __init__(
        self,
        envs: Sequence[Any],
        seeds: Sequence[np.random.Generator],
        first: int = 0,
        borrowed: Any = None,
        factories: Sequence[EnvFactory] = (),
        max_restarts: int = 0,
    ) -> None:
        self._envs, self._seeds, self._borrowed = list(envs), list(seeds), borrowed
        self._factories, self._restarts = factories, Restarts(max_restarts)
        self._agents = list(self._envs[0].possible_agents)
        self.first = first * len(self._agents)
        self._first_env = first
        self.num_envs = len(self._envs) * len(self._agents)
        try:
            if not self._agents:
                raise SpaceError("possible_agents is empty; there is nobody to act")
            self.observation_space = self._envs[0].observation_space(self._agents[0])
            self.action_space = self._envs[0].action_space(self._agents[0])
            for env in self._envs:
                self._check(env)
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

    def _check(self, env: Any) -> None:
        """Raise `SpaceError` for one with other agents, or with agents of other spaces."""
        agents = list(getattr(env, "possible_agents", ()))
        if agents != self._agents:
            raise SpaceError(
                f"environments differ in their agents: {agents} against {self._agents}"
            )
        wanted = self.observation_space, self.action_space
        for agent in self._agents:
            spaces = env.observation_space(agent), env.action_space(agent)
            if spaces != wanted:
                raise SpaceError(
                    f"agent {agent!r} has other spaces than {self._agents[0]!r}: {spaces} "
                    f"against {wanted}; agents that share a policy must share their spaces"
                )

    def _columns(self, index: int) -> slice:
        """The columns of an environment."""
        width = len(self._agents)
        return slice(index * width, (index + 1) * width)

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
        self._valid = buffers.valid[:, mine]
        self._progress = buffers.progress[mine]
        self._started = buffers.started[mine]
        self._shown_seeds = buffers.episode_seeds[mine]
        self._adapter = make_action_adapter(self.action_space, squash=buffers.layout.squash)

    def bookmarks(self) -> list[Bookmark]:
        """The streams of seeds; agents come and go, and episodes cannot be gone on with."""
        return [
            Bookmark(kind_of(env), rng.bit_generator.state)
            for env, rng in zip(self._envs, self._seeds, strict=True)
            for _ in self._agents
        ]

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Take up the streams of seeds; says that no column is in an episode."""
        self._seeds = [stream_at(place.mark.seeds) for place in places[:: len(self._agents)]]
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
        mine = self._columns(index)
        while True:
            self._shown_seeds[mine] = seed = draw_seed(self._seeds[index])
            self._started[mine] = row + 1  # not before it is there
            try:
                self._begin_all(index, row, seed)
            except Exception as error:
                self._replace(index, row, self._fault("reset", index, row - 1, error))
            else:
                self._started[mine] = row
                return

    def _begin_all(self, index: int, row: int, seed: int) -> None:
        obs, infos = self._envs[index].reset(seed=seed)
        check_info(infos)
        live = list(self._envs[index].agents)
        if not live:
            raise ValueError("no agents after reset; nobody can act")
        if not self._masked and self._masks.size:
            self._masked = self._mask_in_obs or MASK_KEY in infos.get(live[0], {})
        for number, agent in enumerate(self._agents):
            column = index * len(self._agents) + number
            self._acting[index, number] = agent in live
            if agent in live:
                self._begin(column)
                self._write(row, column, agent, obs, infos)

    def _replace(self, index: int, row: int, fault: Exception) -> None:
        """Make an environment that failed anew, or raise what it failed with."""
        number, column = self._first_env + index, self.first + self._columns(index).start
        self._restarts.spend(row, column, fault)
        self._close(self._envs[index])
        while True:
            try:
                env = make_by(self._factories[index], number)
                break
            except PPOError as error:
                self._restarts.spend(row, column, error)
        self._envs[index] = env
        self._check(env)

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
            mine = self._columns(index)
            acting = zip(self._agents, actions[mine], self._acting[index], strict=True)
            chosen = {agent: action for agent, action, acts in acting if acts}
            kept = len(self._finals), len(self._episodes)
            try:
                over = self._step_env(index, t, chosen)
            except Exception as error:
                self._replace(index, t + 1, self._fault("step", index, t, error, chosen))
                del self._finals[kept[0] :], self._episodes[kept[1] :]
                for column in range(mine.start, mine.stop):
                    self._finals += give_up_row(self._buffers, t, self.first + column)
                over = True
            if over:
                self._reset(index, t + 1)
            self._progress[mine] = t + 1

    def _step_env(self, index: int, t: int, chosen: Mapping[str, Any]) -> bool:
        """Let the agents of an environment act; returns whether nobody is left."""
        obs, rewards, terminated, truncated, infos = self._envs[index].step(chosen)
        live = set(self._envs[index].agents)
        columns = dict(zip(self._agents, range(self.num_envs)[self._columns(index)], strict=True))
        for agent in chosen:
            ends = bool(terminated[agent]), bool(truncated[agent])
            self._end_of_step(t, columns[agent], agent, obs, rewards, *ends)
        for number, (agent, column) in enumerate(columns.items()):
            if agent not in live:
                self._acting[index, number] = False
                continue
            over = agent in chosen and (terminated[agent] or truncated[agent])
            if over or agent not in chosen:
                self._begin(column)  # it has come back
            self._acting[index, number] = True
            self._write(t + 1, column, agent, obs, infos)
        return not live

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
            raise ValueError(f"agent {agent!r}: {error!r}") from error

    def _fault(
        self, where: str, index: int, t: int, error: Exception, chosen: Any = None
    ) -> Exception:
        column = self._columns(index).start
        return env_fault(
            where,
            self._first_env + index,
            error,
            seed=int(self._shown_seeds[column]),
            episode_step=0 if chosen is None else t - int(self._started[column]),
            t=t,
            action=chosen,
        )

    def parts(self, size: int) -> list[Part]:
        """The columns, which step together."""
        return [Part(self.first, self.num_envs, self.step)]

    def harvest(self) -> Harvest:
        """Hand over the final observations and finished episodes since the last call."""
        # A row is given up a step after the one whose successor it holds.
        self._finals.sort(key=lambda final: (final.step, final.env_index))
        harvest = Harvest(self._finals, self._episodes, self._restarts.take())
        self._finals, self._episodes = [], []
        return harvest

    def close(self) -> None:
        """Close every environment but the caller's own; errors of one do not keep the others."""
        for env in self._envs:
            self._close(env)
        self._envs = []

    def _close(self, env: Any) -> None:
        if env is not self._borrowed:
            with contextlib.suppress(Exception):  # the environment is given up either way
                env.close()
