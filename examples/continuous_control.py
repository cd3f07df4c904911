"""Continuous control, keeping the best policy as well as the last one.

Pendulum needs nothing but the library. The default settings are meant for MuJoCo:

    pip install -c constraints.txt '.[mujoco]'
    python examples/continuous_control.py --env HalfCheetah-v5 --steps 1_000_000 --workers 2
"""

import argparse

from ppo import PPOAgent, PPOConfig

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--env", default="Pendulum-v1")
parser.add_argument("--steps", type=int, default=200_000)
parser.add_argument("--episodes", type=int, default=100)
parser.add_argument("--workers", type=int, default=0, help="changes speed, never results")
args = parser.parse_args()

config = PPOConfig.tuned(args.env) if args.env == "Pendulum-v1" else PPOConfig()
agent = PPOAgent(config=config.replace(num_workers=args.workers), seed=0)
best_return = float("-inf")


def keep_best(report):
    global best_return
    # The mean of the last 100 episodes; NaN, which is never greater, before the first has ended.
    if report.metrics["episode_return"] > best_return:
        best_return = report.metrics["episode_return"]
        agent.save("best.safetensors")


agent.learn(args.env, args.steps, callback=keep_best)
print("the last policy:", agent.evaluate(args.env, episodes=args.episodes))
best = PPOAgent.load("best.safetensors")
print(f"after {best.steps:,} steps:", best.evaluate(args.env, episodes=args.episodes))
