"""Train CartPole with the default settings, measure the policy, save it, and use it."""

import argparse

import gymnasium

from ppo import PPOAgent

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100_000)
parser.add_argument("--episodes", type=int, default=100)
args = parser.parse_args()

agent = PPOAgent(seed=0).learn("CartPole-v1", steps=args.steps)
print("evaluation:", agent.evaluate("CartPole-v1", episodes=args.episodes))
agent.save("cartpole.safetensors")

agent = PPOAgent.load("cartpole.safetensors")
env = gymnasium.make("CartPole-v1")
obs, _ = env.reset(seed=0)
length, over = 0, False
while not over:
    obs, _, terminated, truncated, _ = env.step(agent.act(obs))
    length, over = length + 1, terminated or truncated
print("the loaded agent balanced the pole for", length, "steps")
env.close()
