"""The minibatch loop never waits for a GPU: proven on the CPU by what torch is asked for."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from ppo import Batch, PolicyConfig, make_policy
from ppo.learner import Learner, LearnerSettings
from ppo.learner.eager import EagerGradient

WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), bool(), float()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU has to be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = func in INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        moves = func == torch.ops.aten._to_copy.default and kwargs.get("device") is not None
        self.count += func in WAITS or masks or moves
        return func(*args, **kwargs)


def make_learner(config, space, action_space, **options):
    """A learner as it is on a GPU: by autograd, and with an optimizer that reads nothing back."""
    policy = make_policy(space, action_space, config)
    settings = {
        "num_epochs": 2,
        "value_coef": 0.5,
        "max_grad_norm": 0.5,
        "target_kl": 1e9,
        "adam_eps": 1e-5,
        "normalize_advantages": "none",
        "value_clip_range": None,
    }
    learner = Learner(policy, LearnerSettings(**settings | options))
    learner._gradient = EagerGradient(policy, learner._optimizer)
    learner._optimizer._on_cpu = False
    return policy, learner


VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
CASES = {
    "discrete": (VECTOR, spaces.Discrete(3), PolicyConfig(hidden_sizes=(4,))),
    "box": (VECTOR, spaces.Box(-1.0, 1.0, (2,), np.float32), PolicyConfig(hidden_sizes=(4,))),
    "normalised": (VECTOR, spaces.Discrete(2), PolicyConfig(normalize_observations=True)),
    "images": (IMAGE, spaces.Discrete(2), PolicyConfig(shared=True, cnn_features=8)),
}


def count_waits(case, minibatch_size, options):
    """How often an update of 64 rows waits."""
    space, action_space, config = case
    policy, learner = make_learner(
        config, space, action_space, minibatch_size=minibatch_size, **options
    )
    generator = torch.Generator().manual_seed(0)
    space.seed(0)
    obs = torch.stack([torch.as_tensor(space.sample()) for _ in range(64)])
    actions = policy.act(obs, generator=generator)
    with torch.no_grad():
        new = policy.evaluate(obs, actions)
    numbers = torch.randn(64, generator=generator)
    batch = Batch(
        obs=obs,
        actions=actions,
        log_probs=new.log_probs,
        values=new.values,
        advantages=numbers,
        returns=numbers,
    )
    own = dict.fromkeys(options.get("learning_rates", ()), 1e-2)
    with Waits() as waits:
        learner.improve(
            batch,
            generator,
            learning_rate=1e-3,
            clip_range=0.2,
            entropy_coef=0.01,
            clip_range_high=0.3,
            learning_rates=own,
        )
    return waits.count


@pytest.mark.parametrize("value_clip_range", [None, 0.2])
@pytest.mark.parametrize("normalize_advantages", ["none", "minibatch"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_more_minibatches_wait_for_the_device_no_more_often(
    case, normalize_advantages, value_clip_range
):
    options = {"normalize_advantages": normalize_advantages, "value_clip_range": value_clip_range}
    counts = [count_waits(case, minibatch_size, options) for minibatch_size in (64, 8, 4)]
    assert counts[0] == counts[1] == counts[2]
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
    counts = [
        count_waits(CASES["box"], minibatch_size, {"learning_rates": ["critic"]} | options)
        for minibatch_size in (64, 8, 4)
    ]
    assert counts[0] == counts[1] == counts[2] > 0


def test_the_count_sees_what_it_has_to_see():
    x = torch.arange(4.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x[0] > 1),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.to("meta"),
        lambda: torch.equal(x, x),
    ):
        with Waits() as waits:
            wait()
        assert waits.count == 1
