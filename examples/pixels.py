"""Learn from pixels: catch a falling ball with a paddle, seen as a 36 x 36 picture.

A uint8 box with bounds 0 and 255 is an image: it stays uint8 until the policy's convolutional
encoder. One picture shows all there is to know, so no frames are stacked. A ball that is caught
pays 1, one that is missed -1.
"""

import argparse

import gymnasium
import numpy as np
from gymnasium import spaces

from ppo import PolicyConfig, PPOAgent, PPOConfig

SIZE, PIXELS = 9, 4


class Catch(gymnasium.Env):
    observation_space = spaces.Box(0, 255, (SIZE * PIXELS, SIZE * PIXELS), np.uint8)
    action_space = spaces.Discrete(3, start=-1)  # left, stay, right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.height, self.ball, self.paddle = 0, int(self.np_random.integers(SIZE)), SIZE // 2
        return self._observe(), {}

    def step(self, action):
        self.height += 1
        self.paddle = min(max(self.paddle + int(action), 0), SIZE - 1)
        over = self.height == SIZE - 1
        reward = 0.0 if not over else 1.0 if self.ball == self.paddle else -1.0
        return self._observe(), reward, over, False, {}

    def _observe(self):
        grid = np.zeros((SIZE, SIZE), np.uint8)
        grid[-1, self.paddle] = 128
        grid[self.height, self.ball] = 255
        return grid.repeat(PIXELS, 0).repeat(PIXELS, 1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40_000)
parser.add_argument("--episodes", type=int, default=100)
args = parser.parse_args()

config = PPOConfig(
    num_steps=128,
    num_epochs=4,
    minibatch_size=256,
    learning_rate={"linear": [1e-3, 0]},
    entropy_coef=0.01,
    policy=PolicyConfig(shared=True, hidden_sizes=(), cnn_features=128),
)
agent = PPOAgent(config=config, seed=0).learn(Catch, steps=args.steps)
print("evaluation, of at most 1:", agent.evaluate(Catch, episodes=args.episodes))
