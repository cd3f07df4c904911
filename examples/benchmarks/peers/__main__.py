"""One run of one peer in an interpreter of its own: `python -m peers PEER WORKLOAD --out FILE`."""

import argparse
import importlib
import json
import time
from pathlib import Path

import gymnasium
from workloads import WORKLOADS

from peers import PEERS, UnsupportedError


def mean_return(act, env_id, episodes):
    """Mean undiscounted return of some episodes played with `act`."""
    env = gymnasium.make(env_id)
    total = 0.0
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        over = False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0])
            total += float(reward)
            over = terminated or truncated
    env.close()
    return total / episodes


def run(peer, workload, num_updates, seed, episodes):
    """Train once; times are seconds since the epoch, so that the parent can subtract its own."""
    module, variant = PEERS[peer]
    ticks = []
    try:
        train = importlib.import_module(module).train
        act = train(
            workload, num_updates, seed, lambda: ticks.append(time.perf_counter()), **variant
        )
    except ModuleNotFoundError as error:
        return {"skipped": f"not installed ({error})"}
    except UnsupportedError as reason:
        return {"skipped": str(reason)}
    epoch = time.time() - time.perf_counter()
    result = {"trained": time.time(), "updates": [epoch + tick for tick in ticks]}
    if episodes:
        result["mean_return"] = mean_return(act, workload.env, episodes)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=0, help="played after training, untimed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = run(args.peer, WORKLOADS[args.workload], args.updates, args.seed, args.episodes)
    args.out.write_text(json.dumps(result), encoding="utf-8")
