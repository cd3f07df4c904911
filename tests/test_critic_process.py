"""A second process trains the critic: nothing about the results changes, and nothing is left."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from processes import children, is_alive, start_script, wait_until
from small_policies import (
    BOX,
    OwnPolicy,
    assert_bitwise_equal,
    build,
    improve,
    make_batch,
    make_learner,
    parts,
)
from torch import nn

from ppo import PolicyConfig, PPOAgent, PPOConfig
from ppo.errors import NonFiniteError
from ppo.learner import critic_process, learner

UPDATES = 5


@pytest.fixture(autouse=True)
def never_given_up(monkeypatch):
    """Updates this small are faster in one process; here that is no reason."""
    monkeypatch.setattr(learner, "_MOST_SLOWER", 10**9)


def trained(make, wanted, *, rows=(50,) * UPDATES, disturb=None, **options):
    """State and metrics of some updates, and the number of those that two processes took."""
    policy, taken, metrics = make(), 0, []
    learner = make_learner(policy, **options)
    with learner.helped(wanted):
        for number in range(UPDATES):
            batch = make_batch(policy, rows[number], seed=number)
            if disturb is not None:
                disturb(number, policy, learner, batch)
            metrics.append(improve(learner, batch, seed=number))
            taken += learner._helper is not None
    return parts(policy, learner), metrics, taken


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (build, {}),
        (lambda: build(BOX), {"normalize_advantages": "minibatch"}),
        (build, {"value_clip_range": 0.1, "dual_clip": 3.0, "weight_decay": 0.01}),
        (
            lambda: build(config=PolicyConfig(hidden_sizes=(13, 7), normalize_observations=False)),
            {},
        ),
        (build, {"max_grad_norm": 1e-3}),
    ],
    ids=["categorical", "gaussian", "clips and decay", "odd sizes", "clipped gradients"],
)
def test_two_processes_train_bit_for_bit_what_one_trains(make, options):
    alone, metrics, none = trained(make, False, **options)
    together, others, taken = trained(make, True, **options)
    assert (none, taken) == (0, UPDATES - 2)
    assert_bitwise_equal(alone, together)
    assert metrics == others


def test_a_whole_agent_is_the_same_and_leaves_no_process(monkeypatch):
    before, agents, used = children(), [], []
    helped = learner.Learner.helped
    start = critic_process.CriticProcess.__init__
    monkeypatch.setattr(
        critic_process.CriticProcess,
        "__init__",
        lambda self, *args: (used.append(1), start(self, *args))[1],
    )
    for wanted in (False, True):
        monkeypatch.setattr(learner.Learner, "helped", lambda self, _, on=wanted: helped(self, on))
        config = PPOConfig(num_envs=4, num_steps=32, num_epochs=3, minibatch_size=32)
        agents.append(PPOAgent(config=config, seed=1).learn("CartPole-v1", 5 * 128))
        agents[-1].learn("CartPole-v1", 4 * 128)
    assert len(used) == 2
    assert_bitwise_equal(*(parts(agent.policy, agent._learner) for agent in agents))
    assert wait_until(lambda: children() <= before)


def test_a_normaliser_that_moves_between_updates_moves_in_both():
    def disturb(number, policy, learner, batch):
        policy.update_normalizer(batch.obs)

    runs = [trained(build, wanted, disturb=disturb) for wanted in (False, True)]
    assert runs[1][2] == UPDATES - 2
    assert_bitwise_equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize(
    ("rows", "count"), [((48, 48, 48, 64, 80), 3), ((50, 50, 50, 40, 50), 1)], ids=str
)
def test_batches_of_another_size_bring_another_process_or_none(rows, count):
    """Another one for the same minibatches, none for minibatches that were never recorded."""
    runs = [trained(build, wanted, rows=rows) for wanted in (False, True)]
    assert runs[1][2] == count
    assert_bitwise_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_what_is_loaded_between_updates_is_trained_on_in_both():
    loaded = []

    def disturb(number, policy, learner, batch):
        if number == 1:
            loaded.append(learner.state_dict())
        if number == 4:
            learner.load_state_dict(loaded.pop())

    runs = [trained(build, wanted, disturb=disturb) for wanted in (False, True)]
    assert runs[1][2] == UPDATES - 2
    assert_bitwise_equal(runs[0][0], runs[1][0])


def test_counts_of_single_parameters_go_to_both():
    def disturb(number, policy, learner, batch):
        if number == 0:
            policy.critic_body.requires_grad_(False)
        if number == 1:
            policy.critic_body.requires_grad_(True)
        if number == 4:  # the other process runs, and has other spans
            state = learner.state_dict()
            assert state["critic.step"].tolist() == [27.0, 27.0, 36.0, 36.0]
            assert state["actor.step"].tolist() == 36.0
            learner.load_state_dict(state | {"critic.step": torch.tensor([2.0, 3.0, 3.0, 1.0])})

    runs = [
        trained(build, wanted, rows=(48,) * UPDATES, disturb=disturb) for wanted in (False, True)
    ]
    assert runs[1][2] >= 2
    assert runs[1][0]["optimizer.critic.step"].tolist() == [11.0, 12.0, 12.0, 10.0]
    assert_bitwise_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_a_buffer_without_numbers_is_shared_too():
    def make():
        policy = build()
        policy.register_buffer("notes", torch.zeros(0))
        return policy

    runs = [trained(make, wanted) for wanted in (False, True)]
    assert runs[1][2] == UPDATES - 2
    assert_bitwise_equal(runs[0][0], runs[1][0])


def test_a_layer_exchanged_between_updates_is_trained():
    def disturb(number, policy, learner, batch):
        if number == 3:
            torch.manual_seed(0)
            policy.value_head = nn.Linear(8, 1)

    runs = [trained(build, wanted, disturb=disturb) for wanted in (False, True)]
    assert_bitwise_equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_fails_is_done_without(signum, monkeypatch):
    monkeypatch.setattr(critic_process, "_PATIENCE", 0.3)

    replays = []

    def look_on(number, policy, learner, batch):
        if number == 4:
            replays.append(learner._gradient.replays)

    def disturb(number, policy, learner, batch):
        if number == 3:
            os.kill(learner._helper._process.pid, signum)
        look_on(number, policy, learner, batch)

    before = children()
    alone, metrics, _ = trained(build, False, disturb=look_on)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match="trained the critic failed"):
        together, others, taken = trained(build, True, disturb=disturb)
    assert time.monotonic() - start < 10.0
    assert taken == 1
    assert_bitwise_equal(alone, together)
    assert metrics == others
    assert replays[0] == replays[1]  # they decide when a recording is compared
    assert wait_until(lambda: children() <= before)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("returns", np.inf, "value_loss"),
        ("returns", 1e30, "value_loss"),  # and its gradient is clipped to nothing
        ("advantages", np.inf, "policy_loss"),
    ],
    ids=str,
)
def test_an_update_that_turns_infinite_is_undone_in_both(field, value, name):
    policy = build()
    learner = make_learner(policy)
    with learner.helped():
        for seed in range(3):
            improve(learner, make_batch(policy, seed=seed))
        assert learner._helper is not None
        before = parts(policy, learner)
        batch = make_batch(policy)
        getattr(batch, field)[5] = value
        with pytest.raises(NonFiniteError, match=f"{name}.* became non-finite"):
            improve(learner, batch)
        assert_bitwise_equal(before, parts(policy, learner))
        improve(learner, make_batch(policy))
    assert not torch.equal(before["policy.value_head.weight"], policy.value_head.weight)


def test_parameters_that_their_last_step_made_infinite_are_undone_in_both(monkeypatch):
    monkeypatch.setattr(critic_process, "_FEWEST_PARTS", 1)
    policy = build()
    learner = make_learner(policy, num_epochs=1, minibatch_size=48)
    with learner.helped():
        for seed in range(4):
            improve(learner, make_batch(policy, seed=seed))
        assert learner._helper is not None
        before = parts(policy, learner)
        with pytest.raises(NonFiniteError, match="parameters became non-finite"):
            improve(learner, make_batch(policy), learning_rate=1e39)
    assert_bitwise_equal(before, parts(policy, learner))


@pytest.mark.parametrize("part", ["actor_body", "critic_body"])
@pytest.mark.parametrize(("shows", "taken"), [(True, 2), (False, 1)])
def test_a_recording_that_does_not_hold_any_more_is_found(part, shows, taken, monkeypatch):
    """At once where it shows in the outputs, and another process then has another recording."""
    monkeypatch.setattr("ppo.learner.recorded._REPLAYS_PER_COMPARISON", 8)

    class Factor:
        value = 1.0

    class Scaled(nn.Module):
        def __init__(self, body, factor):
            super().__init__()
            self.body, self.factor, self.num_features = body, factor, body.num_features

        def forward(self, x):
            y, factor = self.body(x), self.factor.value
            return y * factor if shows else y * factor + (y * (1.0 - factor)).detach()

    results = []
    for wanted in (False, True):
        factor = Factor()

        def make(factor=factor):
            policy = build()
            setattr(policy, part, Scaled(getattr(policy, part), factor))
            return policy

        def disturb(number, policy, learner, batch, factor=factor):
            if number == 3:
                factor.value = 3.0
            if not shows:  # else a batch of another policy is compared at once
                with torch.no_grad():
                    new = policy.evaluate(batch.obs, batch.actions)
                batch.log_probs.copy_(new.log_probs)
                batch.values.copy_(new.values)

        results.append(trained(make, wanted, disturb=disturb))
    assert results[1][2] == taken
    assert_bitwise_equal(results[0][0], results[1][0])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: build(config=PolicyConfig(hidden_sizes=(8,), shared=True)), {}),
        (OwnPolicy, {}),
        (build, {"target_kl": 10.0}),
        (build, {"adaptive_kl": 0.01}),
        (build, {"optimizer": "SGD"}),
        (build, {"num_epochs": 1}),
    ],
    ids=["shared", "one group", "target_kl", "adaptive_kl", "another optimizer", "few steps"],
)
def test_where_it_cannot_be_the_same_or_does_not_pay_there_is_no_process(make, options):
    assert trained(make, True, **options)[2] == 0


def test_it_is_given_up_where_it_takes_longer(monkeypatch):
    monkeypatch.setattr(learner, "_MOST_SLOWER", 1)
    monkeypatch.setattr(learner.time, "perf_counter", iter(n * n for n in range(10**6)).__next__)
    alone, metrics, _ = trained(build, False)
    together, others, taken = trained(build, True)
    assert taken == 0
    assert_bitwise_equal(alone, together)
    assert metrics == others


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_parameters_are_shared_with_children_only_while_it_may_be_used():
    def changed_by_a_fork(policy):
        weight = policy.value_head.weight.detach()
        pid = os.fork()
        if pid == 0:
            weight.fill_(7.0)
            os._exit(0)
        os.waitpid(pid, 0)
        return bool((weight == 7.0).all())

    policy = build()
    learner = make_learner(policy)
    with learner.helped():
        assert changed_by_a_fork(policy)
    policy.value_head.weight.data.fill_(1.0)
    assert not changed_by_a_fork(policy)


HELPED = """
import multiprocessing
import signal
import time
from small_policies import build, improve, make_batch, make_learner
from ppo.learner import learner as module

signal.signal(signal.SIGINT, signal.default_int_handler)
module._MOST_SLOWER = 10**9
policy = build()
learner = make_learner(policy)
with learner.helped():
    for seed in range(4):
        improve(learner, make_batch(policy, seed=seed))
    fork = multiprocessing.get_context("fork")
    sibling = fork.Process(target=time.sleep, args=(60,), daemon=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the sibling
    sibling.start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print(learner._helper._process.pid, sibling.pid, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        improve(learner, make_batch(policy, seed=seed))
        print("went on", learner._helper._process.pid, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    """A program that trains with a second process and then sleeps, and that process."""
    script = start_script(tmp_path / "script.py", HELPED, start_new_session=True)
    pids = []
    try:
        pids += map(int, script.stdout.readline().split())
        assert len(pids) == 2
        yield script, pids[0]
    finally:
        script.kill()
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)
        script.communicate()


def test_ctrl_c_reaches_the_parent_alone(script):
    """A terminal sends SIGINT to the whole group."""
    script, helper = script
    os.killpg(script.pid, signal.SIGINT)
    out, err = script.communicate(timeout=60)
    assert (script.returncode, out, err) == (0, f"went on {helper}\n", "")
    assert not is_alive(helper)


def test_it_does_not_outlive_a_parent_that_is_killed(script):
    """Even if another child of the parent holds open what it listens to."""
    script, helper = script
    assert is_alive(helper)
    script.kill()
    assert wait_until(lambda: not is_alive(helper))
