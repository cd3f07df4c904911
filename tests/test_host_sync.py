"""What passes between the host and a device, and when the host waits: proven without a GPU.

The tensors say that they are on another device (see `elsewhere`), so all that is mixed or read
back shows.
"""

import functools
import math

import pytest
import torch
from device_cases import ALL_CASES, CASES, config_of, env_of
from elsewhere import DEVICE, elsewhere

from ppo import RolloutCollector, make_policy
from ppo.frames import FrameStack
from ppo.learner import Learner, LearnerSettings
from ppo.learner.torch_optimizer import optimizer_names
from ppo.trees import leaves

T, N = 4, 4


def make(case):
    """A policy that is elsewhere."""
    return make_policy(*case[:2], config_of(case)).to(DEVICE)


def collect(case, policy):
    """A rollout of it."""
    with RolloutCollector(env_of(case), num_envs=N, seed=0, device=DEVICE) as collector:
        return collector.collect(policy, T)


def count_waits(case, minibatch_size, options):
    """How often an update of 16 rows waits."""
    settings = {
        "num_epochs": 2,
        "minibatch_size": minibatch_size,
        "value_coef": 0.5,
        "max_grad_norm": 0.5,
        "target_kl": 1e9,
        "adam_eps": 1e-5,
        "normalize_advantages": "none",
        "value_clip_range": None,
    }
    with elsewhere() as traffic:
        policy = make(case)
        rollout = collect(case, policy)
        learner = Learner(policy, LearnerSettings(**settings | options))
        numbers = torch.randn(T, N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        batch = rollout.flatten(advantages=numbers, returns=numbers)
        before = len(traffic.waits)
        learner.improve(
            batch,
            torch.Generator().manual_seed(0),
            learning_rate=1e-3,
            clip_range=0.2,
            entropy_coef=0.01,
            clip_range_high=0.3,
            learning_rates=dict.fromkeys(options.get("learning_rates", ()), 1e-2),
        )
    return len(traffic.waits) - before


@ALL_CASES
def test_more_minibatches_wait_for_the_device_no_more_often(case):
    options = {"normalize_advantages": "minibatch", "value_clip_range": 0.2}
    counts = [count_waits(case, minibatch_size, options) for minibatch_size in (8, 4)]
    assert counts[0] == counts[1]
    assert counts[0] > 0  # metrics do come to the host, once per epoch


@pytest.mark.parametrize(
    "options",
    [
        {"dual_clip": 3.0, "adaptive_kl": 0.01, "weight_decay": 0.1},
        {"optimizer": "SGD", "optimizer_kwargs": {"momentum": 0.9}},
        {"optimizer": "RMSprop", "adaptive_kl": 0.01},
    ],
)
def test_no_option_waits_for_the_device_within_an_epoch(options):
    options = {"learning_rates": ["critic"], **options}
    counts = [count_waits(CASES["box"], minibatch_size, options) for minibatch_size in (8, 4)]
    assert counts[0] == counts[1] > 0


def test_optimizers_that_read_numbers_back_are_known():
    """As docs/guide/options says; Rprop fills by a mask, of which a GPU makes no reading."""
    names = set(optimizer_names()) - {"Muon"}  # it takes matrices only
    waiting = set()
    for name in names:
        options = {"optimizer": name}
        few, many = (count_waits(CASES["discrete"], size, options) for size in (8, 4))
        if few != many:
            waiting.add(name)
    assert waiting == {"ASGD", "Adafactor", "Rprop"}


def collected_parts(rollout):
    """Every tensor of a rollout that the policy did not compute, each once."""
    told = rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid
    finals = rollout.finals
    tree = (rollout.obs, rollout.actions, *told, *finals)
    if rollout.sequences is not None:
        tree += rollout.sequences.states, rollout.order
    found = [leaf for leaf in (*leaves(tree), rollout.action_masks) if leaf is not None]
    parts = [[x.frames, x.index] if isinstance(x, FrameStack) else [x] for x in found]
    return list({id(tensor): tensor for part in parts for tensor in part}.values())


@ALL_CASES
def test_a_rollout_moves_once(case):
    marks = {}

    def noted(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            marks.setdefault(method.__name__, []).append(len(traffic.sent))
            return method(*args, **kwargs)

        return call

    with elsewhere() as traffic:
        policy = make(case)
        marks["act"] = [len(traffic.sent)]
        policy.act, policy.evaluate = noted(policy.act), noted(policy.evaluate)
        parts = collected_parts(collect(case, policy))
    # What it acts on, where it acts there, is sent before; what it needs to evaluate, behind.
    sent = traffic.sent[marks["act"][-1] : marks["evaluate"][0]]
    assert sorted(map(math.prod, sent)) == sorted(part.numel() for part in parts)


def test_traffic_sees_what_it_has_to_see():
    with elsewhere() as traffic:
        x = torch.arange(4.0).to(DEVICE)
        assert traffic.sent == [(4,)]
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(x[0] > 1),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x[torch.tensor([1, 2])],
            lambda: x.cpu(),
            lambda: torch.zeros(4).copy_(x),
            lambda: x.copy_(torch.zeros(4)),
            lambda: torch.equal(x, x),
        ):
            before = len(traffic.waits)
            wait()
            assert len(traffic.waits) == before + 1
        assert traffic.sent == [(4,), (2,), (4,)]


def test_what_is_elsewhere_mixes_with_nothing_of_the_cpu():
    with elsewhere() as traffic:
        x = torch.ones(4, device=DEVICE)
        assert (2.0 * x + torch.tensor(1.0)).tolist() == [3.0] * 4
        for mix in (
            lambda: x + torch.ones(4),
            lambda: torch.stack([x[0], torch.tensor(1.0)]),
            lambda: x.index_select(0, torch.tensor([1])),
            lambda: x.multinomial(1, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="CPU"):
                mix()
        x.multinomial(1, generator=torch.Generator(DEVICE))
        with pytest.raises(RuntimeError, match="not supported"):
            x.numpy()
    assert traffic.sent == []
