"""An environment of one's own, from the first line to a trained policy.

A drone has one motor. It shall hover at a height that is drawn anew in each episode, in gusty air.
Leaving the corridor around that height is an end (`terminated`); the time limit is not
(`truncated`), and `TimeLimit` takes care of it.
"""

import argparse

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from ppo import PPOAgent, PPOConfig


class Hover(gymnasium.Env):
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)  # distance, velocity
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)  # thrust above or below hovering

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.distance, self.velocity = self.np_random.uniform(-1.0, 1.0), 0.0
        return self._observe(), {}

    def step(self, action):
        gust = 0.3 * self.np_random.normal()
        self.velocity += 0.1 * (float(action[0]) + gust)
        self.distance += 0.1 * self.velocity
        reward = 1.0 - abs(self.distance)
        terminated = abs(self.distance) > 2.0
        return self._observe(), reward, terminated, False, {}

    def _observe(self):
        return np.array([self.distance, self.velocity], np.float32)


def make_hover():
    return TimeLimit(Hover(), max_episode_steps=200)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60_000)
parser.add_argument("--episodes", type=int, default=100)
parser.add_argument("--workers", type=int, default=0, help="changes speed, never results")
args = parser.parse_args()

config = PPOConfig(num_workers=args.workers)
agent = PPOAgent(config=config, seed=0).learn(make_hover, steps=args.steps)
print("evaluation, of at most 200:", agent.evaluate(make_hover, episodes=args.episodes))
