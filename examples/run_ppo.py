"""What `ppo train` does, without a run folder: load a YAML file, learn, evaluate, play.

python examples/run_ppo.py ppo/configs/cartpole.yaml steps=50_000 num_workers=2 --play
"""

import argparse

from ppo import PPOAgent, PPOConfig

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("config", help="a YAML file")
parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--episodes", type=int, default=100)
parser.add_argument("--play", action="store_true", help="show one episode in a window")
args = parser.parse_args()

config = PPOConfig.from_yaml(args.config, args.overrides)
agent = PPOAgent(config=config, seed=args.seed).learn(config.env, config.steps)
print("evaluation:", agent.evaluate(config.env, episodes=args.episodes))
agent.save("agent.safetensors")

if args.play:
    window = config.replace(env_kwargs={**config.env_kwargs, "render_mode": "human"})
    print("played:", agent.evaluate(window.env_factory(), episodes=1))
