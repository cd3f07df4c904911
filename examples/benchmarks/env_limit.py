"""How fast environments step when nobody asks what to do: `python env_limit.py ENV NUM SECONDS`.

Actions are drawn beforehand. Prints `ready`, waits for a line, steps for so many seconds, and
prints the steps per second: of several of these, told to go at once, the sum is what as many
processes can do.
"""

import sys
import time

import gymnasium


def main():
    env_id, num_envs, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    envs = [gymnasium.make(env_id, disable_env_checker=True) for _ in range(num_envs)]
    for index, env in enumerate(envs):
        env.reset(seed=index)
        env.action_space.seed(index)
    actions = [[env.action_space.sample() for env in envs] for _ in range(100)]
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    steps = 0
    while time.perf_counter() - start < seconds:
        for row in actions:
            for env, action in zip(envs, row, strict=True):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
        steps += len(actions) * num_envs
    print(steps / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
