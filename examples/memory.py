"""Memory: balance, swing up and climb without being told any velocity.

A position alone does not say where things are going; what the policy remembers of the steps before
does. `memory="lstm"` puts a recurrent core behind each body; nothing else changes.

    python examples/memory.py --env Pendulum-v1 --seed 1
"""

import argparse
import dataclasses
import functools

import gymnasium
import numpy as np
from gymnasium import spaces

from ppo import PolicyConfig, PPOAgent, PPOConfig

# What of the observation is a position; steps to train for; settings.
TASKS = {
    "CartPole-v1": (
        [0, 2],
        200_000,
        PPOConfig(
            num_envs=16,
            minibatch_size=256,
            learning_rate={"linear": [1e-3, 0]},
            normalize_advantages="none",
        ),
    ),
    "Pendulum-v1": (
        [0, 1],
        400_000,
        PPOConfig(
            num_envs=16,
            num_steps=128,
            minibatch_size=256,
            learning_rate={"linear": [1e-3, 0]},
            gamma=0.9,
            policy=PolicyConfig(memory_steps=32),
        ),
    ),
    "MountainCarContinuous-v0": (
        [0],
        400_000,
        PPOConfig(minibatch_size=256, learning_rate={"linear": [1e-3, 0]}, gamma=0.999),
    ),
}


class PositionsOnly(gymnasium.ObservationWrapper):
    """Shows the chosen entries of a vector."""

    def __init__(self, env, kept):
        super().__init__(env)
        self.kept = kept
        space = env.observation_space
        self.observation_space = spaces.Box(space.low[kept], space.high[kept], dtype=np.float32)

    def observation(self, observation):
        return observation[self.kept]


def make(env_id, kept):
    return PositionsOnly(gymnasium.make(env_id), kept)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--env", choices=TASKS, default="CartPole-v1")
parser.add_argument("--steps", type=int, default=None, help="default: what the task needs")
parser.add_argument("--episodes", type=int, default=100)
parser.add_argument("--memory", choices=["lstm", "gru", "none"], default="lstm")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

kept, steps, config = TASKS[args.env]
log_std = 1.0 if args.env.startswith("Mountain") else 0.0
memory = None if args.memory == "none" else args.memory
policy = dataclasses.replace(config.policy, memory=memory, log_std_init=log_std)
config = config.replace(policy=policy)
env = functools.partial(make, args.env, kept)
agent = PPOAgent(config=config, seed=args.seed).learn(env, args.steps or steps)
print(f"{args.env} without velocities:", agent.evaluate(env, args.episodes))

# The memory is the caller's to keep: None begins an episode.
single, state, total, over = env(), None, 0.0, False
obs, _ = single.reset(seed=0)
while not over:
    action, state = agent.act(obs, state=state) if memory else (agent.act(obs), None)
    obs, reward, terminated, truncated, _ = single.step(action)
    total, over = total + reward, terminated or truncated
print(f"one more episode, step by step: {total:.1f}")
