"""Where the time of a workload goes, with one process and one thread.

    python examples/benchmarks/profiles.py cartpole
    py-spy record -r 400 -f raw -o stacks.txt -- \\
        python examples/benchmarks/profiles.py cartpole --bare
    python examples/benchmarks/profiles.py --stacks stacks.txt

The first command asks `torch.profiler` for the operations of torch, the other two are about all of
Python: they count in which part of the library the samples of `py-spy` lie.
"""

import argparse
import collections
import contextlib
import time
from pathlib import Path

import torch
from peers.ppo_agent import make_config
from torch.profiler import ProfilerActivity, profile
from workloads import STEADY

from ppo import PPOAgent

# The part of a sample: the first row with a word that stands in its stack.
PARTS = {
    "start": ("<frozen importlib", "torch/__init__.py", "make_config"),
    "environments": ("gymnasium/",),
    "log-probabilities and values of the rollout": ("evaluate_rollout",),
    "actor": ("numpy_actor.py", "snapshot.py"),
    "forward and backward pass": ("forward (ppo/", "finish (ppo/", "recording/"),
    "loss": ("numpy_loss.py", "_policy_loss", "_value_loss"),
    "clip and optimizer": ("flat_adam.py", "flat_optimizer.py"),
    "minibatches": ("minibatches", "rollout.py"),
    "advantages": ("advantages.py", "_scan.py"),
    "collector": ("ppo/collector/",),
    "update": ("update (ppo/", "improve"),
}


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="?", choices=STEADY, default="cartpole")
    parser.add_argument("--updates", type=int, help="default: those of the benchmark")
    parser.add_argument("--bare", action="store_true", help="without torch.profiler")
    parser.add_argument("--stacks", type=Path, help="count the samples of py-spy in this file")
    return parser.parse_args()


def part_of(stack):
    """The part that a sample lies in; outside of any function a process starts or ends."""
    if not stack:
        return "start"
    for part, words in PARTS.items():
        if any(word in stack for word in words):
            return part
    return "the rest"


def count_samples(text):
    """Samples per part, of lines `frame;frame;frame count`."""
    counts = collections.Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        counts[part_of(stack)] += int(count)
    return counts


def train(workload, updates, bare):
    """Train; once the first half of the updates is done, torch's operations are recorded."""
    agent = PPOAgent(config=make_config(workload, num_workers=0), seed=0)
    agent.learn(workload.env, workload.rollout_size * updates, progress=False)
    recorder = contextlib.nullcontext() if bare else profile(activities=[ProfilerActivity.CPU])
    with recorder as found:
        start = time.process_time()
        agent.learn(workload.env, workload.rollout_size * updates, progress=False)
        seconds = time.process_time() - start
    print(f"{1e3 * seconds / updates:.1f} ms of processor time for a rollout and its update")
    return [] if bare else [(e.key, e.self_cpu_time_total, e.count) for e in found.key_averages()]


def main():
    args = parse_arguments()
    if args.stacks:
        counts = count_samples(args.stacks.read_text(encoding="utf-8"))
        total = counts.total() - counts.pop("start", 0)
        for part, count in counts.most_common():
            print(f"{part:45} {100 * count / total:5.1f} %")
        return
    torch.set_num_threads(1)
    workload = STEADY[args.workload]
    updates = args.updates or workload.updates
    for name, microseconds, calls in sorted(
        train(workload, updates, args.bare), key=lambda row: row[1], reverse=True
    )[:15]:
        print(f"{name:45} {microseconds / updates / 1e3:7.2f} ms, {calls / updates:7.1f} calls")


if __name__ == "__main__":
    main()
