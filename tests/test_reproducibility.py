"""The same seed in another process: what surrounds the training changes none of its numbers."""

import copy
import os
import pickle

import gymnasium
import pytest
from processes import run_script
from small_policies import OwnPolicy, assert_bitwise_equal, parts, seeded

from ppo import PolicyConfig, PPOAgent, PPOConfig

TRAIN = """
import hashlib, logging, os, random, sys, tempfile
from pathlib import Path
import numpy as np
import torch
from ppo import PPOAgent, PPOConfig
from ppo.cli.runs import RunFolder

def main():
    noisy = sys.argv[1] == "noisy"
    config = PPOConfig(
        env="Pendulum-v1", steps=256, num_envs=4, num_steps=16, num_epochs=2, minibatch_size=32,
        num_workers=2 if noisy else 0, policy={"hidden_sizes": [8]},
    )
    reports = []
    if not noisy:
        agent = PPOAgent(config=config, seed=3, logger=reports.append)
        agent.learn(config.env, 256)
    else:
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
        with tempfile.TemporaryDirectory() as out, RunFolder.create(config, out=out) as run:
            def log(report):
                logging.info("%s", report)
                run.log(report)
                reports.append(report)

            def disturb(report):
                random.random(), np.random.rand(), torch.rand(3)
                agent.evaluate(config.env, 1, deterministic=False)
                agent.act(np.zeros(3, np.float32))
                run.save(agent)

            agent = PPOAgent(config=config, seed=3, logger=log)
            agent.learn(config.env, 256, callback=disturb, progress=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(agent.policy.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for report in reports:
        metrics = {k: repr(v) for k, v in report.metrics.items() if k != "steps_per_second"}
        digest.update(repr((report.steps, sorted(metrics.items()), report.episodes)).encode())
    print(len(reports), hash("a") % 2**32, digest.hexdigest())

if __name__ == "__main__":
    main()
"""


def trained(tmp_path, monkeypatch, how, hash_seed):
    monkeypatch.setitem(os.environ, "PYTHONHASHSEED", hash_seed)
    status, out, err = run_script(tmp_path / "script.py", TRAIN, how)
    assert status == 0, err
    count, hashed, digest = out.split()
    assert count == "4"
    return hashed, digest


def test_hash_seed_logging_callbacks_workers_and_the_users_generators_change_nothing(
    tmp_path, monkeypatch
):
    runs = [
        trained(tmp_path, monkeypatch, how, hash_seed)
        for how, hash_seed in [("plain", "0"), ("noisy", "12345")]
    ]
    assert len({hashed for hashed, _ in runs}) == 2  # the hashes of strings did differ
    assert len({digest for _, digest in runs}) == 1


# Copies


def pickled(agent):
    return pickle.loads(pickle.dumps(agent))


def cartpole():
    return gymnasium.make("CartPole-v1")


SHORT = PPOConfig(num_envs=2, num_steps=32, num_epochs=4, minibatch_size=16, num_workers=0)
AGENTS = {
    "default": lambda: PPOAgent(config=SHORT),
    "memory": lambda: PPOAgent(config=SHORT.replace(policy=PolicyConfig(memory="gru"))),
    "own": lambda: PPOAgent(seeded(lambda: OwnPolicy(4, 2)), config=SHORT),
    "two processes": lambda: PPOAgent(config=SHORT.replace(num_workers="auto")),
}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("env", ["CartPole-v1", cartpole])
@pytest.mark.parametrize("make", AGENTS.values(), ids=AGENTS)
def test_a_copied_agent_goes_on_bit_for_bit_as_the_original(make, env, duplicate):
    agent = make().learn(env, 4 * 64)
    copied = duplicate(agent)
    before = parts(copied.policy, copied._learner)
    agent.learn(env, 4 * 64)
    assert_bitwise_equal(before, parts(copied.policy, copied._learner))
    copied.learn(env, 4 * 64)
    assert_bitwise_equal(*(parts(one.policy, one._learner) for one in (agent, copied)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", AGENTS.values(), ids=AGENTS)
def test_parameters_of_a_copy_lie_in_memory_as_the_originals_do(make, duplicate):
    """Some processors round a product by where in memory its factors begin."""
    agent = make().learn("CartPole-v1", 64)
    copied = duplicate(agent)
    places = [
        [(p.storage_offset(), p.untyped_storage().nbytes()) for p in one.policy.parameters()]
        for one in (agent, copied)
    ]
    assert places[0] == places[1]
    assert len({place for place, _ in places[1]}) > 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", AGENTS.values(), ids=AGENTS)
def test_an_agent_that_was_copied_while_it_learned_goes_on_as_the_original(make, duplicate):
    agent, copies = make(), []

    def note(report):
        if report.updates in (2, 5):
            copies.append(duplicate(agent))

    agent.learn("CartPole-v1", 8 * 64, callback=note)
    for copied in copies:
        copied.learn("CartPole-v1", 8 * 64 - copied.steps)
        assert_bitwise_equal(*(parts(one.policy, one._learner) for one in (agent, copied)))
