"""Environments of several agents, by the methods of PettingZoo's parallel environments."""

import numpy as np
from gymnasium import spaces


class CountingAgents:
    """Every agent counts its own steps; its observation is [count, tag], its reward count + tag.

    Args:
        lengths: Steps of each agent's life in an episode; an agent beyond it is gone.
        endings: "terminated" or "truncated" for each agent.
        returning: Steps after which an agent that is gone comes back; None for never.
        masks: Tell in infos that action 0 is illegal while the count is odd.
    """

    metadata = {"name": "counting"}  # noqa: RUF012

    def __init__(
        self, lengths=(3, 5), endings=("terminated", "truncated"), returning=None, masks=False
    ):
        self.possible_agents = [f"agent_{index}" for index in range(len(lengths))]
        self.lengths = dict(zip(self.possible_agents, lengths, strict=True))
        self.endings = dict(zip(self.possible_agents, endings, strict=True))
        self.returning, self.masks = returning, masks
        self.agents, self.closed = [], 0

    def observation_space(self, agent):
        return spaces.Box(-1e6, 1e6, (2,), np.float32)

    def action_space(self, agent):
        return spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        rng = np.random.default_rng(seed)
        self.tags = {agent: float(rng.integers(1, 1000)) for agent in self.possible_agents}
        self.counts = dict.fromkeys(self.possible_agents, 0)
        self.absences = dict.fromkeys(self.possible_agents, 0)
        self.agents = list(self.possible_agents)
        return self.told(self.agents)

    def told(self, agents):
        obs = {a: np.array([self.counts[a], self.tags[a]], np.float32) for a in agents}
        infos = {}
        for agent in agents:
            legal = np.array([self.counts[agent] % 2 == 0, True])
            infos[agent] = {"action_mask": legal} if self.masks else {}
        return obs, infos

    def step(self, actions):
        assert set(actions) == set(self.agents), "an action for whoever is there, and nobody else"
        rewards, terminated, truncated = {}, {}, {}
        for agent, action in actions.items():
            assert self.action_space(agent).contains(action)
            assert not (self.masks and self.counts[agent] % 2 and action == 0), "illegal"
            self.counts[agent] += 1
            over = self.counts[agent] >= self.lengths[agent]
            rewards[agent] = self.counts[agent] + self.tags[agent]
            terminated[agent] = over and self.endings[agent] == "terminated"
            truncated[agent] = over and self.endings[agent] == "truncated"
        gone = [a for a in actions if terminated[a] or truncated[a]]
        self.agents = [agent for agent in self.agents if agent not in gone]
        for agent in self.possible_agents:
            if agent in actions or self.returning is None:
                continue
            self.absences[agent] += 1
            if self.absences[agent] == self.returning and self.agents:
                self.counts[agent], self.absences[agent] = 0, 0
                self.tags[agent] += 1000.0
                self.agents.append(agent)
        obs, infos = self.told({*actions, *self.agents})
        return obs, rewards, terminated, truncated, infos

    def close(self):
        self.closed += 1


class FaultyAgents(CountingAgents):
    """Does something terrible in the n-th step, or in the n-th reset, of its life."""

    def __init__(self, fault, *args, step=0, reset=0, **options):
        super().__init__(*args, **options)
        self.fault, self.at_step, self.at_reset = fault, step, reset
        self.steps = self.resets = 0

    def reset(self, seed=None, options=None):
        self.resets += 1
        if self.resets == self.at_reset:
            self.fault(self)
        return super().reset(seed, options)

    def step(self, actions):
        self.steps += 1
        if self.steps == self.at_step:
            self.fault(self)
        return super().step(actions)
