"""Several agents, one policy: walkers on a ring that must reach their doors without collisions.

The interface is that of PettingZoo's parallel environments; nothing of it is needed here. Every
agent is a column of the rollout, and whoever has gone through its door makes no transitions until
all begin anew. An environment of PettingZoo's goes the same way: `learn(lambda: parallel_env())`.
"""

import argparse

import numpy as np
from gymnasium import spaces

from ppo import PolicyConfig, PPOAgent, PPOConfig

SIZE = 12
MOVES = (-1, 0, 1)


class Ring:
    """Three walkers on a ring of twelve places."""

    possible_agents = ("red", "green", "blue")

    def observation_space(self, agent):
        # Way to the door, and ways to the two others: 0 for those that are gone.
        return spaces.Box(-1.0, 1.0, (3,), np.float32)

    def action_space(self, agent):
        return spaces.Discrete(len(MOVES))

    def reset(self, seed=None, options=None):
        rng = np.random.default_rng(seed)
        self.agents, self.steps = list(self.possible_agents), 0
        self.places = dict(zip(self.agents, rng.choice(SIZE, 3, replace=False), strict=True))
        self.doors = dict(zip(self.agents, rng.choice(SIZE, 3, replace=False), strict=True))
        return {a: self.look(a) for a in self.agents}, {a: {} for a in self.agents}

    def look(self, agent):
        def way(to):
            return ((to - self.places[agent] + SIZE // 2) % SIZE - SIZE // 2) / (SIZE // 2)

        others = [other for other in self.possible_agents if other != agent]
        ways = [way(self.places[other]) if other in self.agents else 0.0 for other in others]
        return np.array([way(self.doors[agent]), *ways], np.float32)

    def step(self, actions):
        self.steps += 1
        for agent, action in actions.items():
            self.places[agent] = (self.places[agent] + MOVES[action]) % SIZE
        taken = list(actions)
        crowd = [self.places[agent] for agent in taken]
        home = {agent: self.places[agent] == self.doors[agent] for agent in taken}
        rewards = {
            agent: float(home[agent]) - 0.05 - 0.5 * (crowd.count(self.places[agent]) > 1)
            for agent in taken
        }
        late = self.steps == 30
        self.agents = [agent for agent in self.agents if not home[agent] and not late]
        return (
            {agent: self.look(agent) for agent in taken},
            rewards,
            home,
            {agent: late for agent in taken},
            {agent: {} for agent in taken},
        )

    def close(self):
        pass


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100_000)
parser.add_argument("--episodes", type=int, default=300)
parser.add_argument("--workers", type=int, default=0, help="changes speed, never results")
args = parser.parse_args()

config = PPOConfig(
    num_envs=8,
    num_workers=args.workers,
    num_steps=64,
    minibatch_size=256,
    learning_rate={"linear": [1e-3, 0]},
    policy=PolicyConfig(hidden_sizes=(64, 64)),
)
agent = PPOAgent(config=config, seed=0).learn(Ring, steps=args.steps)
# The way to a door is 3 steps on average: 1 - 3 * 0.05, if nobody stands in it.
print("one walker's return, of at most 0.85 or so:", agent.evaluate(Ring, episodes=args.episodes))
