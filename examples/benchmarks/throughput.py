"""Steps per second with learning, and time to a trained agent: this library beside others.

    python examples/benchmarks/throughput.py --peers sb3,skrl,plain-torch --out throughput.json
    python examples/benchmarks/throughput.py --wall --out wall.json
    python examples/benchmarks/throughput.py --workloads breakout --peers sb3 --out pixels.json

Every run has an interpreter of its own. Repetitions are interleaved, A B C A B C, so that a machine
that slows down slows down for all, and each ratio is taken within one repetition.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import FOR_PIXELS, FOR_VECTORS, OTHERS, OURS
from results import Row, markdown, save
from workloads import PIXELS, STEADY, WHOLE, WORKLOADS

HERE = Path(__file__).parent
REFERENCE = "sb3"
USUAL = ["sb3", "skrl", "plain-torch", "plain-torch-compiled"]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(choices):
        def read(text):
            chosen = [name for name in text.split(",") if name]
            unknown = set(chosen) - set(choices)
            if unknown:
                known = ", ".join(choices)
                raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}; known are {known}")
            return chosen

        return read

    parser.add_argument(
        "--peers",
        type=names(OTHERS),
        default=USUAL,
        help=f"of {', '.join(OTHERS)} (default: {','.join(USUAL)})",
    )
    parser.add_argument(
        "--ours",
        type=names(OURS),
        default=list(OURS),
        help=f"of {', '.join(OURS)} (default: all)",
    )
    parser.add_argument(
        "--workloads", type=names(WORKLOADS), help="a,b,... (default: all of the mode)"
    )
    parser.add_argument("--wall", action="store_true", help="whole process, to a trained agent")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--updates", type=int, help="updates to measure")
    parser.add_argument("--skip", type=int, help="updates before the steady state")
    parser.add_argument("--episodes", type=int, default=20, help="with --wall, to score the agents")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0: each one's default")
    parser.add_argument("--quick", action="store_true", help="1 repetition, few updates")
    parser.add_argument("--out", type=Path, help="JSON file; the tables go to .md beside it")
    args = parser.parse_args()
    if args.quick:
        args.repetitions, args.episodes = 1, 1
        args.updates = args.updates or 2
        args.skip = 1 if args.skip is None else args.skip
    available = WHOLE if args.wall else STEADY | PIXELS
    args.workloads = args.workloads or list(WHOLE if args.wall else STEADY)
    if not set(args.workloads) <= set(available):
        parser.error(f"this mode has the workloads {', '.join(available)}")
    return args


def run_peer(peer, workload, updates, seed, episodes, threads):
    """Train in a process of its own; adds `started`, or says why there is no result."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    if threads:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[variable] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "peers", peer, workload, "--out", str(out)]
        command += ["--updates", str(updates), "--seed", str(seed), "--episodes", str(episodes)]
        started = time.time()
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode != 0:
            last = (process.stderr.strip() or "no message").splitlines()[-1]
            return {"skipped": f"failed: {last}"}
        return {"started": started, **json.loads(out.read_text(encoding="utf-8"))}


def steady_rate(result, workload, skip):
    """Steps per second from the end of update `skip` on, or from the start of the process."""
    times = [result["started"], *result["updates"]]
    return (len(times) - 1 - skip) * workload.rollout_size / (times[-1] - times[skip])


def measure(name, peers, args):
    """The rows of one workload, and whether this library failed in one of them."""
    workload = WORKLOADS[name]
    able = FOR_PIXELS if workload.pixels else FOR_VECTORS
    peers = [peer for peer in peers if peer in able]
    skip = 0 if args.wall else workload.skip if args.skip is None else args.skip
    updates = skip + (args.updates or workload.updates)
    episodes = args.episodes if args.wall else 0
    unit = "s" if args.wall else "steps/s"
    rows = {peer: Row(name, peer, unit, higher=not args.wall) for peer in peers}
    extra = {peer: [] for peer in peers}
    failed = False
    for repetition in range(args.repetitions):
        for peer, row in rows.items():
            if row.skipped:
                continue
            print(f"{name} {repetition + 1}/{args.repetitions}: {peer}", file=sys.stderr)
            threads = 0 if workload.pixels else args.threads
            result = run_peer(peer, name, updates, repetition, episodes, threads)
            if "skipped" in result:
                row.skipped, row.values = result["skipped"], []
                failed |= peer in OURS
            elif args.wall:
                row.values.append(result["trained"] - result["started"])
                extra[peer].append(result["mean_return"])
            else:
                row.values.append(steady_rate(result, workload, skip))
                extra[peer].append(result["updates"][0] - result["started"])
    for peer, row in rows.items():
        if row.values:
            title = "mean return" if args.wall else "first update after (s)"
            row.more[title] = statistics.median(extra[peer])
        if REFERENCE in rows:
            row.relate(rows[REFERENCE].values, REFERENCE)
    return list(rows.values()), failed


def main():
    args = parse_arguments()
    settings = {"repetitions": args.repetitions, "threads": args.threads, "quick": args.quick}
    rows, failed = [], False
    for name in args.workloads:
        own_rows, own_failed = measure(name, [*args.ours, *args.peers], args)
        print(markdown(own_rows))
        rows, failed = rows + own_rows, failed or own_failed
        # After each workload: an interruption keeps what has been measured.
        save("wall" if args.wall else "throughput", settings, rows, args.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
