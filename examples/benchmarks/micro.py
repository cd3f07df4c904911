"""The parts by themselves: gradient step, acting, advantages, collecting, start.

    python examples/benchmarks/micro.py --out micro.json
    python examples/benchmarks/micro.py --tables update,gae

Each table relates this library's numbers to something that is not this library: plain PyTorch, a
copy of as many bytes, the environments without a policy, `import torch`.
"""

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from peers import plain_torch
from peers.ppo_agent import make_config
from results import Row, markdown, save
from workloads import STEADY

from ppo import (
    Batch,
    PolicyConfig,
    PPOAgent,
    PPOConfig,
    RolloutCollector,
    gae,
    make_policy,
    normalize,
)
from ppo.learner import Learner, LearnerSettings
from ppo.learner.eager import EagerGradient, LossSettings
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.learner import parameter_groups
from ppo.learner.recorded import RecordedGradient

HERE = Path(__file__).parent
TASKS = {"categorical": STEADY["cartpole"], "Gaussian": STEADY["halfcheetah-8"]}
GAE_SHAPES = ((2048, 1), (128, 8), (128, 4096), (2048, 256))
COLLECTED = ("CartPole-v1", "LunarLander-v3", "HalfCheetah-v5")
ROLLOUTS = (128, 256)  # steps per environment
SIZES = "1,2,4,8,16,64,256,1024"
MINIBATCHES = "64,256,1024,4096,16384,65536"
MOST_IMAGES = {"cpu": 256, "cuda": 4096}  # in a minibatch; more take seconds, or too much memory
SETTLED = 3  # updates; from the third on the critic may have a process of its own
# A policy that learns from one minibatch for ever clips all of it in the end. Its gradient is then
# 0, and Adam's moments fade into denormal numbers, with which processors are slow.
STILL = 0.0  # learning rate
COPIED = 1 << 27  # bytes, more than any cache holds
NUM_ENVS = 8
PROCESSES = 2


def time_calls(calls, args):
    """Microseconds per call of each function, one value per repetition, interleaved."""
    counts = {}
    for name, call in calls.items():
        call()
        count, elapsed = 1, 0.0
        while elapsed < args.seconds / 4:
            count *= 2
            elapsed = time_one(call, count)
        counts[name] = max(1, round(count * args.seconds / elapsed))
    values = {name: [] for name in calls}
    for _ in range(args.repetitions):
        for name, call in calls.items():
            values[name].append(1e6 * time_one(call, counts[name]) / counts[name])
    return values


def time_one(call, count):
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def add_rows(table, prefix, values, reference):
    """Rows in microseconds, each related to one of them."""
    rows = []
    for name, numbers in values.items():
        rows.append(Row(table, f"{prefix}, {name}", "µs", higher=False, values=numbers))
        rows[-1].relate(values[reference], reference)
    return rows


def make_spaces(env_id):
    env = gymnasium.make(env_id)
    env.close()
    return env.observation_space, env.action_space


def make_workload_policy(workload):
    return make_policy(*make_spaces(workload.env), make_config(workload).policy, seed=0)


def random_batch(policy, num_rows):
    """Made-up rows as the policy would act on them; the arithmetic does not care."""
    rng, device = np.random.default_rng(0), policy.value_head.weight.device
    shape = (num_rows, *policy.observation_space.shape)
    bytes_ = policy.observation_space.dtype == np.uint8
    obs = torch.randint(256, shape, dtype=torch.uint8) if bytes_ else torch.randn(shape)
    obs, noise = obs.to(device), torch.from_numpy(policy.draw_noise(rng, num_rows)).to(device)
    actions = policy.act(obs, noise=noise)
    with torch.no_grad():
        evaluation = policy.evaluate(obs, actions)
    return Batch(
        obs=obs,
        actions=actions,
        log_probs=evaluation.log_probs + 0.1 * torch.randn(num_rows).to(device),
        values=evaluation.values,
        advantages=normalize(torch.randn(num_rows)).to(device),
        returns=torch.randn(num_rows).to(device),
    )


def update_table(args):
    """Gradient, clip and optimizer step on one minibatch that lies ready."""
    rows = []
    for family, workload in TASKS.items():
        for num_rows in (64, 256):
            torch.manual_seed(0)
            policies = {name: make_workload_policy(workload) for name in GRADIENTS}
            batch = random_batch(policies["eager"], num_rows)
            calls = {"plain torch": plain_step(workload, batch)}
            calls |= {name: own_step(name, policy, batch) for name, policy in policies.items()}
            values = time_calls(calls, args)
            rows += add_rows("update", f"{family}, {num_rows} rows", values, "plain torch")
    return rows


GRADIENTS = {
    "eager": EagerGradient,
    "recorded": RecordedGradient,
}


def own_step(name, policy, batch):
    """What the learner does with a minibatch once its advantages are normalised."""
    optimizer = FlatAdam(parameter_groups(policy), eps=1e-5)
    gradient = GRADIENTS[name](policy, optimizer)
    weights = LossSettings(0.2, 0.0, 0.5, None, False)
    (mini,) = batch.minibatches(len(batch), arrays=gradient.takes_arrays)
    gradient.begin()
    gradient(mini, weights)

    def step():
        gradient(mini, weights)
        optimizer.step(STILL, 0.5)

    return step


def plain_step(workload, batch):
    spaces = make_spaces(workload.env)
    network = plain_torch.ActorCritic(spaces[0].shape[0], workload.hidden_size, spaces[1])
    still = dataclasses.replace(workload, learning_rate=STILL)
    learner = plain_torch.Learner(network, still)
    fields = (batch.obs, batch.actions, batch.log_probs, batch.advantages, batch.returns)
    return lambda: learner.step(*fields)


def gpu_table(args):
    """Rows per second of whole updates, four minibatches each, on the CPU and on a GPU."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return [Row("gpu", args.device, "rows/s", True, skipped="there is no GPU")]
    images = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)
    networks = {
        "MLP": (*make_spaces("CartPole-v1"), PolicyConfig()),
        "NatureCNN": (*images, PolicyConfig(hidden_sizes=(), shared=True)),
    }
    rows = []
    for network, parts in networks.items():
        for size in args.minibatches:
            devices = [d for d in ("cpu", device) if network == "MLP" or size <= most_images(d)]
            calls = {str(d): update_on(d, make_policy(*parts), size) for d in devices}
            times = time_calls(calls, args)
            for name, own in times.items():
                rates = [4 * size * 1e6 / time for time in own]
                rows.append(Row("gpu", f"{network}, {size} rows, {name}", "rows/s", True, rates))
                if "cpu" in times:
                    rows[-1].relate([4 * size * 1e6 / time for time in times["cpu"]], "cpu")
    return rows


def most_images(device):
    return MOST_IMAGES.get(torch.device(device).type, 0)


def update_on(device, policy, size):
    """An update of four minibatches of rows that lie on the device, until the last one is done."""
    settings = LearnerSettings(
        num_epochs=1,
        minibatch_size=size,
        value_coef=0.5,
        value_clip_range=None,
        max_grad_norm=0.5,
        target_kl=None,
        normalize_advantages="minibatch",
        adam_eps=1e-5,
    )
    batch = random_batch(policy.to(device), 4 * size)
    learner, generator = Learner(policy, settings), torch.Generator().manual_seed(0)

    def update():
        learner.improve(batch, generator, learning_rate=3e-4, clip_range=0.2, entropy_coef=0.0)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    return update


def acting_table(args):
    """One call that chooses actions for eight observations.

    Plain torch also computes log-probabilities and values, as its loop has to in every step.
    """
    rows = []
    for family, workload in TASKS.items():
        policy = make_workload_policy(workload)
        observation_space, action_space = make_spaces(workload.env)
        size = observation_space.shape[0]
        network = plain_torch.ActorCritic(size, workload.hidden_size, action_space)
        obs = torch.randn(NUM_ENVS, size)
        noise = torch.from_numpy(policy.draw_noise(np.random.default_rng(0), NUM_ENVS))
        act = policy.snapshot().for_rollout(noise[None].numpy())

        calls = {
            "plain torch": torch.no_grad()(functools.partial(network, obs)),
            "policy.act": functools.partial(policy.act, obs, noise=noise),
            "snapshot": functools.partial(act, obs.numpy(), 0),
        }
        rows += add_rows("acting", family, time_calls(calls, args), "plain torch")
    return rows


def gae_table(args):
    """Against the bytes that have to be read and written, over the bandwidth of the memory."""
    rows = []
    block = np.ones(COPIED, np.uint8)
    copy = functools.partial(np.copyto, np.ones_like(block), block)
    for shape in GAE_SHAPES:
        generator = torch.Generator().manual_seed(0)
        numbers = [torch.randn(shape, generator=generator) for _ in range(3)]
        flags = [torch.rand(shape, generator=generator) < 0.01 for _ in range(2)]
        moved = sum(tensor.nbytes for tensor in (*numbers, *flags)) + 2 * numbers[0].nbytes
        calls = {"floor": copy, "gae": functools.partial(gae, *numbers, *flags)}
        values = time_calls(calls, args)
        values["floor"] = [time * moved / (2 * COPIED) for time in values["floor"]]
        rows += add_rows("gae", f"T={shape[0]} N={shape[1]}", values, "floor")
    return rows


def collecting_table(args):
    """Steps per second of a collector against environments that are only stepped."""
    rows = []
    for env_id in args.envs:
        try:
            make_spaces(env_id)
        except gymnasium.error.DependencyNotInstalled as error:
            rows.append(Row("collecting", env_id, "steps/s", True, skipped=str(error)))
            continue
        limit = f"{PROCESSES} processes without a policy"
        ways = {
            f"{num_workers} workers, {num_steps} steps": (num_workers, num_steps)
            for num_workers in (0, PROCESSES)
            for num_steps in ROLLOUTS
        }
        values = {name: [] for name in (limit, *ways)}
        for _ in range(args.repetitions):
            values[limit].append(env_limit(env_id, args))
            for name, way in ways.items():
                values[name].append(collecting_rate(env_id, *way, args))
        for name, numbers in values.items():
            row = Row("collecting", f"{env_id}, {name}", "steps/s", True, numbers)
            row.relate(values[limit], limit)
            rows.append(row)
    return rows


def env_limit(env_id, args):
    share = str(NUM_ENVS // PROCESSES)
    command = [sys.executable, str(HERE / "env_limit.py"), env_id, share, str(4 * args.seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(PROCESSES)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes)


def collecting_rate(env_id, num_workers, num_steps, args):
    with RolloutCollector(env_id, num_envs=NUM_ENVS, num_workers=num_workers, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space, seed=0)
        collector.collect(policy, num_steps)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < 4 * args.seconds:
            steps += collector.collect(policy, num_steps).num_transitions
        return steps / (time.perf_counter() - start)


def scaling_table(args):
    """Steps per second of `learn` on CartPole, for more and more environments."""
    values = {}
    for num_envs in args.sizes:
        values[f"{num_envs} environments"] = []
    for _ in range(args.repetitions):
        for num_envs, own in zip(args.sizes, values.values(), strict=True):
            own.append(learning_rate(num_envs, args))
    rows = [Row("scaling", name, "steps/s", True, numbers) for name, numbers in values.items()]
    for row, before in zip(rows[1:], values, strict=False):
        row.relate(values[before], before)
    return rows


def learning_rate(num_envs, args):
    """Steps per second with four epochs of four minibatches, once all processes are at work."""
    config = PPOConfig(
        num_envs=num_envs, num_steps=128, num_epochs=4, minibatch_size=num_envs * 128 // 4
    )
    ticks = []

    def tick(report):
        if report.updates < SETTLED:
            return True
        ticks.append((time.perf_counter(), report.steps))
        return ticks[-1][0] < ticks[0][0] + 4 * args.seconds or len(ticks) < 2

    agent = PPOAgent(config=config)
    agent.learn("CartPole-v1", 10**9, callback=tick, progress=False)
    (start, first), (end, last) = ticks[0], ticks[-1]
    return (last - first) / (end - start)


IMPORT = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

FIRST_UPDATE = """
import time
from ppo import PPOAgent, PPOConfig
agent = PPOAgent(config=PPOConfig(num_workers={num_workers}))
start = time.perf_counter()
agent.learn("CartPole-v1", 1, progress=False)
print(time.perf_counter() - start)
"""


def start_table(args):
    """Seconds until a new interpreter has imported, and until `learn` has done one update."""
    scripts = {f"import {module}": IMPORT.format(module=module) for module in ("torch", "ppo")}
    for count in (0, 2):
        scripts[f"first update, {count} workers"] = FIRST_UPDATE.format(num_workers=count)
    values = {name: [] for name in scripts}
    for _ in range(args.repetitions):
        for name, script in scripts.items():
            done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
            values[name].append(float(done.stdout))
    rows = [Row("start", name, "s", higher=False, values=own) for name, own in values.items()]
    for row in rows[:2]:
        row.relate(values["import torch"], "import torch")
    return rows


TABLES = {
    "update": update_table,
    "acting": acting_table,
    "gae": gae_table,
    "collecting": collecting_table,
    "scaling": scaling_table,
    "start": start_table,
    "gpu": gpu_table,
}


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="a,b,... (default: all)")
    parser.add_argument("--envs", default=",".join(COLLECTED), help="for collecting: a,b,...")
    parser.add_argument("--sizes", default=SIZES, help="for scaling: a,b,... environments")
    parser.add_argument("--device", default="cuda", help="for gpu: what is set beside the CPU")
    parser.add_argument("--minibatches", default=MINIBATCHES, help="for gpu: a,b,... rows")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0: its default")
    parser.add_argument("--quick", action="store_true", help="1 short repetition")
    parser.add_argument("--out", type=Path, help="JSON file; the tables go to .md beside it")
    args = parser.parse_args()
    if args.quick:
        args.repetitions, args.seconds = 1, 0.01
    args.tables, args.envs = args.tables.split(","), args.envs.split(",")
    args.sizes = [int(size) for size in args.sizes.split(",")]
    args.minibatches = [int(size) for size in args.minibatches.split(",")]
    if not set(args.tables) <= set(TABLES):
        parser.error(f"--tables must be of {', '.join(TABLES)}")
    return args


def main():
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the processes started here
    settings = {"repetitions": args.repetitions, "threads": args.threads, "quick": args.quick}
    rows = []
    for table in args.tables:
        own_rows = TABLES[table](args)
        print(markdown(own_rows))
        rows += own_rows
        save("micro", settings, rows, args.out)


if __name__ == "__main__":
    main()
