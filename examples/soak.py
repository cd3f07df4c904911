"""Hours of training while environments raise, die and hang: memory flat, score reached.

    python examples/soak.py --minutes 120

Every few seconds one of the environments raises, ends its process, is killed, crashes, or hangs.
`on_fault="restart"` replaces it. Each line tells what a leak or a lost score would show in.
"""

import argparse
import ctypes
import os
import random
import signal
import time
import warnings
from pathlib import Path

import gymnasium

from ppo import PPOAgent, PPOConfig

FAULTS = ("raise", "exit", "kill", "segfault", "hang", "hang in C")


class Unreliable(gymnasium.Wrapper):
    """Fails at random, on average every `seconds` seconds of its life."""

    def __init__(self, env, seconds):
        super().__init__(env)
        self.seconds = seconds
        self.random = random.Random(os.urandom(8))
        self.plan()

    def plan(self):
        self.due = time.monotonic() + self.random.expovariate(1.0 / self.seconds)

    def step(self, action):
        if time.monotonic() > self.due:
            self.plan()
            fail(self.random.choice(FAULTS))
        return super().step(action)


def fail(fault):
    if fault == "raise":
        raise RuntimeError("a fault on purpose")
    if fault == "exit":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "hang":
        time.sleep(3600)
    sum(range(10**12))


def of_this_process():
    """Resident MB, open files, and children, where the system shows them."""
    proc = Path("/proc/self")
    if not proc.exists():
        return "memory unknown here"
    pages = int((proc / "statm").read_text().split()[1])
    children = (proc / "task" / str(os.getpid()) / "children").read_text().split()
    return (
        f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**20:7.1f} MB, "
        f"{len(os.listdir(proc / 'fd')):3d} files, {len(children)} children"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=20, help="of the evaluation at the end")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    num_envs = 8
    config = PPOConfig.tuned("CartPole-v1").replace(
        num_envs=num_envs,
        num_workers=arguments.num_workers,
        learning_rate=3e-4,
        on_fault="restart",
        max_restarts=10**6,
        step_timeout=2.0,
    )
    warnings.filterwarnings("ignore", "restarted:", RuntimeWarning)
    begin = time.monotonic()
    next_line = 0.0

    def tell(report):
        nonlocal next_line
        seconds = time.monotonic() - begin
        if seconds >= next_line:
            next_line = seconds + 15.0
            print(
                f"{seconds:7.0f} s  {report.steps:9d} steps  "
                f"return {report.metrics['episode_return']:6.1f}  "
                f"{report.metrics['restarts']:5.0f} restarts  {of_this_process()}",
                flush=True,
            )
        return seconds < 60.0 * arguments.minutes

    agent = PPOAgent(config=config, seed=arguments.seed)
    agent.learn(
        lambda: Unreliable(gymnasium.make("CartPole-v1"), num_envs * arguments.every),
        steps=10**12,
        callback=tell,
        progress=False,
    )
    score = agent.evaluate("CartPole-v1", episodes=arguments.episodes)
    print(f"return {score.mean_return:.1f} of 500 over {arguments.episodes} episodes")


if __name__ == "__main__":
    main()
