"""Recordings against autograd.

A new recording is compared with autograd on its first two minibatches, and what autograd says is
taken where they differ. So every law here is about the third minibatch and those that follow, and
first makes sure that a recording is in use.
"""

import copy
import functools
import math
import os

import numpy as np
import pytest
import torch
from gradient_study import GradientStudy
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import (
    BOX,
    DISCRETE,
    KINDS,
    Drawn,
    FromFeatures,
    OwnPolicy,
    Tied,
    assert_bitwise_equal,
    build,
    improve,
    look_on,
    make_batch,
    make_learner,
    parts,
    seeded,
)
from strategies import seeds
from torch import nn
from torch.nn import functional

from ppo import Batch, Evaluation, PolicyConfig
from ppo.learner.eager import EagerGradient, LossSettings
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.learner import parameter_groups
from ppo.learner.numpy_loss import normalized
from ppo.learner.recorded import _MOST_RECORDINGS
from ppo.losses import MAX_LOG_RATIO

LOSS = LossSettings(0.2, 0.01, 0.5, None, False)


@pytest.fixture(autouse=True)
def _overflow_is_no_warning():
    """As in `Learner.improve`."""
    with np.errstate(all="ignore"):
        yield


class Study(GradientStudy):
    def nudge(self, generator):
        for vector in self.optimizer.parameters:
            vector.add_(0.05 * torch.randn(vector.shape, generator=generator, dtype=vector.dtype))

    def check(self, batch, loss):
        metrics, ours = self.gradient(self.recorded, batch, loss)
        wanted_metrics, theirs = self.gradient(self.eager, batch, loss)
        # A log-probability of size L is known to about L * 1e-7, a ratio is its exponential.
        size = 1.0 + batch.log_probs.abs().max().item()
        true_metrics, exact = in_double_precision(self.policy, batch, loss)
        spreads = functools.lru_cache(functools.partial(spread, self.policy, batch, loss))
        for index, truth in enumerate(true_metrics):
            error, own = abs(metrics[index] - truth), abs(wanted_metrics[index] - truth)
            rounding = 1e-6 * (10.0 + size) * (1.0 + abs(truth))
            if not error <= rounding + 10.0 * own:
                assert error <= rounding + 10.0 * max(own, spreads()[0][index])
        for index, truth in enumerate(exact):
            error, own = (ours[index] - truth).norm(), (theirs[index] - truth).norm()
            # Where rows cancel, or a Gaussian is narrow, autograd itself is off by more than 1e-5.
            rounding = 1e-5 * truth.norm() + 2e-6 * size
            if not error <= rounding + 50.0 * own:
                assert error <= rounding + 50.0 * max(own, spreads()[1][index])


def check_replays(policy, batches, loss=LOSS):
    """The laws of a recording, on all minibatches but those it is compared with autograd on."""
    study, generator = Study(policy), torch.Generator().manual_seed(0)
    for number, batch in enumerate(batches, 1):
        if number <= 2:
            study.recorded(batch(), loss)
        else:
            study.check(batch(), loss)
        assert study.replays() == [number]
        study.nudge(generator)


def in_double_precision(policy, batch, loss, shuffle=None):
    reference = Float64(policy)
    if shuffle is not None:  # the last bit of the weights
        with torch.no_grad():
            for parameter in reference.parameters():
                noise = torch.rand(parameter.shape, generator=shuffle, dtype=torch.float64)
                parameter.mul_(1.0 + 2.0**-24 * (2.0 * noise - 1.0))
    optimizer = FlatAdam(parameter_groups(reference), 1e-5)
    doubled = {n: t.double() if t.is_floating_point() else t for n, t in batch.fields.items()}
    metrics = EagerGradient(reference, optimizer)(Batch(**doubled), loss)
    return [metric.item() for metric in metrics], optimizer.gradients


def spread(policy, batch, loss):
    """By how much metrics and gradients change with the last bit of the weights.

    A narrow Gaussian multiplies the rounding of its mean. Autograd's own error shows that, but for
    a few rows it may be tiny by chance, and then bounds nothing.
    """
    metrics, exact = in_double_precision(policy, batch, loss)
    exact = [vector.clone() for vector in exact]
    most = [0.0] * len(metrics), [0.0] * len(exact)
    for seed in range(8):
        shuffle = torch.Generator().manual_seed(seed)
        others, gradients = in_double_precision(policy, batch, loss, shuffle)
        for found, one, two in zip(most, (metrics, exact), (others, gradients), strict=True):
            for index, (x, y) in enumerate(zip(one, two, strict=True)):
                found[index] = max(found[index], float(torch.as_tensor(x - y).norm()))
    return most


class Float64(nn.Module):
    """A policy in double precision."""

    def __init__(self, policy):
        super().__init__()
        self.inner = copy.deepcopy(policy).double()

    def evaluate(self, obs, actions):
        policy = self.inner
        if not hasattr(policy, "action_head"):
            return policy.evaluate(obs, actions)
        # The default policy takes observations to float32.
        features = policy.normalizer(obs) if hasattr(policy.normalizer, "shift") else obs
        distribution = policy.action_head(policy.actor_body(features))
        flat = actions.reshape(len(actions), -1) if actions.is_floating_point() else actions
        values = policy.value_head(policy.critic_body(features)).squeeze(-1)
        return Evaluation(distribution.log_prob(flat), distribution.entropy(), values)

    def parameter_groups(self):
        return parameter_groups(self.inner)


# Policies that can be repeated

losses = st.builds(
    LossSettings,
    clip_range=st.sampled_from([0.0, 0.1, 0.2, 0.9]),
    entropy_coef=st.sampled_from([0.0, 0.01, 1.0]),
    value_coef=st.sampled_from([0.0, 0.5, 2.0]),
    value_clip_range=st.sampled_from([None, 0.1, 1.0]),
    normalize_advantages=st.booleans(),
    clip_range_high=st.sampled_from([None, 0.28]),
    dual_clip=st.sampled_from([None, 1.5]),
)


@st.composite
def log_ratios(draw, loss):
    rows = draw(st.sampled_from([1, 2, 3, 17, 31, 64]))
    scale = draw(st.sampled_from([0.01, 0.3, 3.0, 30.0]))
    ratios = scale * torch.as_tensor(np.random.default_rng(draw(seeds)).normal(size=rows)).float()
    # On an edge of the loss, rounding decides which side a row is on.
    edges = [math.log1p(-loss.clip_range), math.log1p(loss.clip_range), math.log1p(0.28)]
    for edge in (*edges, math.log(1.5), MAX_LOG_RATIO, -MAX_LOG_RATIO):
        ratios[(ratios - edge).abs() < 1e-3] = edge + 2e-3
    return ratios


def batches_for(policy, ratios, seed, num_inputs=4, count=5):
    """Functions, since the log-ratio is that of the policy as it is when it is needed."""

    def make(number):
        return make_batch(policy, len(ratios), seed + number, ratios.roll(number), num_inputs)

    return [lambda number=number: make(number) for number in range(count)]


@st.composite
def default_policies(draw):
    num_inputs = draw(st.integers(1, 6))
    config = PolicyConfig(
        hidden_sizes=tuple(draw(st.lists(st.integers(1, 16), max_size=3))),
        activation=draw(st.sampled_from(["tanh", "relu", "gelu", "silu"])),
        normalize_observations=draw(st.booleans()),
        shared=draw(st.booleans()),
    )
    size = draw(st.integers(1, 4))
    action_space = draw(
        st.sampled_from(
            [
                spaces.Discrete(size + 1, start=size),
                spaces.Box(-1.0, 1.0, (size,), np.float32),
                spaces.Box(-1.0, 1.0, (size, 2), np.float32),
            ]
        )
    )
    policy = build(action_space, config, num_inputs=num_inputs)
    generator = torch.Generator().manual_seed(draw(seeds))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        if isinstance(action_space, spaces.Box):
            # Within and beyond the bounds [-5, 2].
            policy.action_head.log_std.add_(draw(st.sampled_from([0.0, -2.0, 4.0])))
    policy.update_normalizer(3.0 + 2.0 * torch.randn(20, num_inputs, generator=generator))
    return policy, num_inputs


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_recording_of_the_default_policy_is_the_gradient_of_the_loss(data):
    policy, num_inputs = data.draw(default_policies())
    loss = data.draw(losses)
    ratios = data.draw(log_ratios(loss))
    seed = data.draw(st.integers(0, 2**31))
    check_replays(policy, batches_for(policy, ratios, seed, num_inputs), loss)


class TwoParts(OwnPolicy):
    """An own policy with a body; the rest of the cases build on it."""

    def __init__(self, body):
        super().__init__(6)
        self.body = body
        self.first = nn.Linear(4, 6)

    def act(self, obs, **options):
        return super().act(self.first(obs), **options)

    def evaluate(self, obs, actions):
        return super().evaluate(self.body(self.first(obs)), actions)


class LowRank(nn.Module):
    """A sum of parameters: one tensor is the gradient of both."""

    def __init__(self):
        super().__init__()
        self.base, self.delta = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.ends = nn.ParameterList(torch.randn(rows, 6) for rows in (2, 4))

    def forward(self, x):
        return functional.linear(x, self.base + self.delta + torch.cat([*self.ends])).tanh()


class Single(nn.Module):
    """Parameters of one entry and of none."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(()))
        self.nothing, self.unused = nn.Parameter(torch.zeros(0, 6)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale + self.shift + functional.linear(x, self.nothing).sum(-1, True)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6).t())

    def forward(self, x):
        return functional.linear(x, self.weight).tanh()


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = x.view(-1, 1, 6).expand(-1, 3, 6)
        return self.inner(x, x, x)[0].mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        return self.inner(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(7, 6)

    def forward(self, x):
        return x + self.inner((x > 0).long().sum(-1))


def changed_in_place(x):
    x = 1.0 * x
    x[:, :2].mul_(3.0)
    x[:, 2] = 2.0 * x[:, 3]
    x[x > 1.0] = 1.0
    zeros = torch.zeros(3, 6)
    zeros[1].add_(x.detach().mean())
    return x.add_(zeros.sum(0)).relu_()


def gradient_of_a_gradient(x):
    with torch.enable_grad():  # also where a batch is made without
        x = x if x.requires_grad else x.clone().requires_grad_()
        y = x.tanh()
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y + slope


BODIES = {
    "softmax": lambda: nn.Softmax(-1),
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "prelu": nn.PReLU,
    "hardtanh": nn.Hardtanh,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "glu": lambda: lambda x: functional.glu(torch.cat([x, x.flip(-1)], -1)),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "batch norm, not training": lambda: nn.BatchNorm1d(6).eval(),
    "rms": lambda: lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3),
    "normalize": lambda: functional.normalize,
    "bilinear": lambda: _Twice(nn.Bilinear(6, 6, 6)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "attention": SelfAttention,
    "lstm": Recurrent,
    "embedding": Table,
    "low rank": LowRank,
    "single": Single,
    "transposed": Transposed,
    "cat": lambda: lambda x: torch.cat([x[:, 3:], x[:, :3].tanh()], -1),
    "stack": lambda: lambda x: torch.stack([x, x.tanh(), x.square()]).mean(0),
    "where": lambda: lambda x: torch.where(x > 0.1, x, 0.5 * x),
    "masked": lambda: lambda x: x.masked_fill(x > 1.0, -3.0),
    "clamp": lambda: lambda x: x.clamp(max=0.5) + x.clamp(-0.3, 0.7) + x.clamp(min=0.1),
    "powers": lambda: lambda x: x**2 + x.abs() ** 1.5 + 2.0 ** x.clamp(max=1.0) + x.square() ** 0.5,
    "logs": lambda: lambda x: x.abs().log1p() + x.exp().log().expm1().clamp(max=3.0),
    "minimum": lambda: lambda x: torch.minimum(x, x.flip(-1)) + torch.maximum(x, x.roll(1, -1)),
    "scaled sums": lambda: lambda x: torch.add(x, x.tanh(), alpha=0.5).sub(x.sin(), alpha=2.0),
    "wide sum": lambda: lambda x: x + x.sum(-1, keepdim=True, dtype=torch.float64).float(),
    "across rows": lambda: lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 1.0),
    "largest": lambda: lambda x: x.sort(-1).values + x.max(-1, keepdim=True).values,
    "cumulative": lambda: lambda x: x.cumsum(-1) + x.logsumexp(-1, keepdim=True),
    "views": lambda: lambda x: x.t().reshape(2, 3, -1).permute(2, 1, 0).flatten(1).tanh(),
    "expanded": lambda: lambda x: x.unsqueeze(1).expand(-1, 2, -1).reshape(-1, 12)[:, 3:9].tanh(),
    "constant": lambda: lambda x: x * torch.tensor([1.0, 2.0, 0.5, 1.0, -1.0, 0.0]),
    "in place": lambda: changed_in_place,
    "twice differentiated": lambda: gradient_of_a_gradient,
    "custom function": lambda: StraightThrough.apply,
    "out argument": lambda: lambda x: x + torch.mul(x.detach(), 2.0, out=torch.empty(x.shape)),
}


class _Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


@pytest.mark.parametrize("name", BODIES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_recording_of_an_own_policy_is_the_gradient_of_the_loss(name, data):
    torch.manual_seed(data.draw(seeds))
    policy = TwoParts(BODIES[name]())
    loss = data.draw(losses)
    ratios = data.draw(log_ratios(loss))
    check_replays(policy, batches_for(policy, ratios, data.draw(st.integers(0, 2**31))), loss)


class Outputs(OwnPolicy):
    """Outputs that share memory, or have none of their own."""

    def __init__(self, change):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.3))
        self.change = change

    def evaluate(self, obs, actions):
        return self.change(self, obs, super().evaluate(obs, actions))


OUTPUTS = {
    "one thrice": lambda policy, obs, new: Evaluation(new.values, new.values, new.values),
    "columns": lambda policy, obs, new: Evaluation(*policy.actor(obs).unbind(-1)),
    "values of log-probs": lambda policy, obs, new: new._replace(values=3.0 * new.log_probs),
    "values in the observations": lambda policy, obs, new: new._replace(values=obs[:, 0]),
    "values in a parameter": lambda policy, obs, new: new._replace(
        values=policy.level.expand(len(obs))
    ),
    "entropy in a parameter": lambda policy, obs, new: new._replace(
        entropy=policy.level.expand(len(obs))
    ),
    "no entropy": lambda policy, obs, new: new._replace(entropy=torch.ones(len(obs))),
    "detached values": lambda policy, obs, new: new._replace(values=new.values.detach()),
    "a plain tuple": lambda policy, obs, new: tuple(new),
}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("change", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_may_be_views_of_anything(change, rows):
    torch.manual_seed(0)
    policy = Outputs(change)
    check_replays(policy, batches_for(policy, 0.3 * torch.randn(rows), 0))


class Plain(nn.Module):
    """Any encoder of observations of any kind before an own policy."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.policy = encoder, OwnPolicy()

    def evaluate(self, obs, actions):
        return self.policy.evaluate(self.encoder(obs), actions)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(9, 4)

    def forward(self, obs):
        return self.inner(obs).mean(1)


class Scaled(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, obs):
        return self.layers(obs.to(self.layers[-2].weight.dtype) / 255.0)


def convolutions():
    return Scaled(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4), nn.Tanh()
    )


@pytest.mark.parametrize(
    ("encoder", "shape", "dtype"),
    [
        (Bag, (3,), torch.int64),
        (Bag, (3,), torch.int32),
        (convolutions, (2, 8, 8), torch.uint8),
        (lambda: Scaled(nn.Flatten(), nn.Linear(6, 4), nn.Tanh()), (2, 3), torch.int16),
    ],
)
def test_observations_of_any_kind_are_repeated(encoder, shape, dtype):
    torch.manual_seed(0)
    study = Study(Plain(encoder()))
    for number in range(1, 6):
        obs = torch.randint(9 if dtype != torch.uint8 else 256, (7, *shape)).to(dtype)
        batch = make_batch(OwnPolicy(), 7, number).replace(obs=obs)
        if number <= 2:
            study.recorded(batch, LOSS)
        else:
            study.check(batch, LOSS)
        assert study.replays() == [number]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_a_policy_in_double_precision_is_repeated_in_it(entropy_coef):
    torch.manual_seed(0)
    study = Study(FromFeatures(lambda obs: obs.double().tanh()).double())
    loss = LossSettings(0.2, entropy_coef, 0.5, None, True)
    for number in range(1, 6):
        batch = make_batch(OwnPolicy(), 7, number)
        metrics, ours = study.gradient(study.recorded, batch, loss)
        wanted, theirs = study.gradient(study.eager, batch, loss)
        assert study.replays() == [number]
        # Advantages are normalised in the batch's own float32.
        assert metrics == pytest.approx(wanted, rel=1e-6)
        for replayed, eager in zip(ours, theirs, strict=True):
            torch.testing.assert_close(replayed, eager, rtol=1e-5, atol=1e-8)


def test_frozen_parts_are_read_anew_and_get_no_gradient():
    policy = build(BOX)
    policy.actor_body.requires_grad_(False)
    study = Study(policy)
    for number in range(1, 6):
        study.recorded(make_batch(policy, 9, number), LOSS)
        with torch.no_grad():
            policy.actor_body[1].weight.mul_(1.5)
    study.check(make_batch(policy, 9, 7), LOSS)
    assert study.replays() == [6]
    assert all(parameter.grad is None for parameter in policy.actor_body.parameters())


@pytest.mark.parametrize(
    "advantages",
    [torch.full((6,), 0.1), torch.zeros(6), 1e4 + torch.arange(6.0), 1e-12 * torch.arange(6.0)],
)
def test_advantages_without_spread_are_normalized_as_autograd_has_it(advantages):
    study = Study(build())
    loss = LossSettings(0.2, 0.0, 0.5, None, True)
    for number in range(1, 5):
        batch = make_batch(study.policy, 6, number).replace(advantages=advantages)
        metrics, ours = study.gradient(study.recorded, batch, loss)
        wanted, theirs = study.gradient(study.eager, batch, loss)
        assert study.replays() == [number]
        assert metrics == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        for replayed, eager in zip(ours, theirs, strict=True):
            torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("constant", [0.1, -1 / 3, 7.7, 1e9, 1e-9])
def test_equal_advantages_become_0_though_their_mean_is_rounded(constant, dtype):
    for size in (3, 64, 100, 1000):
        assert not normalized(np.full(size, constant, dtype)).any()


def test_what_is_not_finite_shows_in_the_metrics():
    study = Study(build(config=PolicyConfig(hidden_sizes=(8,), activation="relu")))
    for number in range(3):
        study.recorded(make_batch(study.policy, 6, number), LOSS)
    batch = make_batch(study.policy, 6, 3)
    for name, wanted in [("obs", "entropy"), ("advantages", "policy_loss"), ("returns", "value")]:
        bad = batch.fields[name].clone()
        bad[0] = torch.nan
        metrics, ours = study.gradient(study.recorded, batch.replace(**{name: bad}), LOSS)
        assert not all(map(math.isfinite, metrics)), wanted
        assert not all(vector.isfinite().all() for vector in ours)
    assert study.replays() == [6]


# Policies that cannot


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        result = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return grad * (1.0 - result * result)


def half_precise(x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ torch.ones(4, 4)


def statistics_moved_by_hand():
    norm = nn.BatchNorm1d(4)
    return _Moving(norm)


class _Moving(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return functional.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, training=True
        )


class KeepsAverage(nn.Module):
    """Exchanges its buffer, instead of changing it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x - self.average


class ChangesBuffer(KeepsAverage):
    def forward(self, x):
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.average


UNREPEATABLE = {
    "dropout": lambda: nn.Dropout(0.5),
    "noise": lambda: lambda x: x + 0.1 * torch.randn_like(x),
    "random slope": lambda: nn.RReLU(),
    "random backward": lambda: _Linear(Drawn.apply),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm by hand": statistics_moved_by_hand,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "buffer changed": ChangesBuffer,
    "observations changed": lambda: lambda x: x.clamp_(-1.0, 1.0),
    "branch on a value": lambda: lambda x: x if x.mean() > 0 else 2.0 * x,
    "item": lambda: lambda x: x * x.max().item(),
    "tolist": lambda: lambda x: x if x.tolist()[0][0] > 0 else 2.0 * x,
    "numpy": lambda: lambda x: torch.from_numpy(np.tanh(x.numpy())),
    "asarray": lambda: lambda x: x * float(np.asarray(x).max()),
    "numpy in a function": lambda: _Linear(InNumpy.apply),
    "boolean indexing": lambda: lambda x: x + x[x > 0].mean(),
    "nonzero": lambda: lambda x: x + x.nonzero().float().mean(),
    "sparse": lambda: lambda x: torch.sparse.mm(x.to_sparse(), torch.ones(4, 4)),
    "sparse gradient": lambda: _Sparse(),
    "complex": lambda: lambda x: torch.fft.fft(x).conj().imag + x,
    "axes exchanged in place": lambda: lambda x: (2.0 * x).t_().t(),
}


class _Linear(nn.Module):
    """Something behind a layer, so that its backward pass is needed."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear(x))


class _Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(7, 4, sparse=True)

    def forward(self, x):
        return x + self.inner((x > 0).long().sum(-1))


def assert_as_by_autograd(make, replays=()):
    """Gradients, buffers and random numbers are those of a policy that knows no recordings."""
    results = []
    for kind in ("recorded", "eager"):
        study = Study(seeded(make))
        gradients = []
        for number in range(4):
            batch = make_batch(OwnPolicy(), 8, number) if number else make_batch(seeded(OwnPolicy))
            torch.manual_seed(number)
            metrics, vectors = study.gradient(getattr(study, kind), batch, LOSS)
            gradients.append(torch.cat([torch.tensor(metrics), *vectors]))
        state = {name: tensor.clone() for name, tensor in study.policy.state_dict().items()}
        state |= {"random": torch.get_rng_state(), "gradients": torch.cat(gradients)}
        results.append(state)
        if kind == "recorded":
            assert study.replays() == list(replays)
    assert_bitwise_equal(*results)


@pytest.mark.parametrize("make", UNREPEATABLE.values(), ids=UNREPEATABLE)
def test_what_cannot_be_repeated_is_left_to_autograd_and_runs_once(make):
    assert_as_by_autograd(lambda: FromFeatures(make()))


@pytest.mark.parametrize(
    "change",
    [
        lambda policy, obs, new: new._replace(values=half_precise(obs).sum(-1)),
        lambda policy, obs, new: new._replace(entropy=new.entropy.double()),
        lambda policy, obs, new: new._replace(
            entropy=torch.from_numpy(new.entropy.detach().numpy() + 1.0)
        ),
    ],
)
def test_outputs_of_other_kinds_are_left_to_autograd(change):
    assert_as_by_autograd(lambda: Outputs(change))


def test_a_policy_that_exchanges_its_tensors_is_left_to_autograd():
    study = Study(FromFeatures(KeepsAverage()))
    for number in range(4):
        batch = make_batch(OwnPolicy(), 8, number)
        _, ours = study.gradient(study.recorded, batch, LOSS)
        # Its average has moved on meanwhile, and does so once more here.
        before = study.policy.features.average
        study.recorded(batch, LOSS)
        assert not torch.equal(study.policy.features.average, before)
        assert all(vector.isfinite().all() for vector in ours)
    assert study.replays() == []


def test_an_error_in_evaluate_reaches_the_caller_and_learning_goes_on():
    class Fragile(OwnPolicy):
        broken = True

        def evaluate(self, obs, actions):
            new = super().evaluate(obs, actions)
            if type(self).broken:
                raise RuntimeError("not today")
            return new

    study = Study(Fragile())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            study.recorded(make_batch(OwnPolicy(), 8), LOSS)
    Fragile.broken = False
    for number in range(1, 5):
        batch = make_batch(study.policy, 8, number)
        study.check(batch, LOSS)
        assert study.replays() == [number]
    y = torch.ones(2).exp()  # nothing is recorded any more
    assert torch.equal(y, torch.ones(2).exp())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda batch: batch.replace(obs=batch.obs[:, :1]),  # could be broadcast
        lambda batch: batch.replace(obs=batch.obs.double()),
        lambda batch: batch.replace(actions=batch.actions[:, None]),
    ],
)
def test_rows_of_another_kind_are_an_error_as_they_are_to_autograd(wrong):
    study = Study(OwnPolicy())
    batch = make_batch(study.policy, 8)
    for _ in range(3):
        study.recorded(batch, LOSS)
    for gradient in (study.eager, study.recorded):
        with pytest.raises((RuntimeError, ValueError)):
            gradient(wrong(batch), LOSS)


# Policies that change between updates


class Hidden:
    """Of a class that only its user knows."""

    shift = 0.0


class Adjustable(OwnPolicy):
    """Has something of everything that can be changed from outside."""

    def __init__(self):
        super().__init__()
        self.temperature, self.doubled, self.table = 1.0, False, {"shift": 0.0}
        self.weights, self.hidden = np.ones(4, np.float32), Hidden()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("scale", torch.ones(4))
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.eval()

    def evaluate(self, obs, actions):
        hidden = self.dropout(self.norm(self.frozen(obs * self.scale)))
        hidden = hidden * self.temperature + self.table["shift"] + self.hidden.shift
        hidden = hidden * torch.tensor(2.0 * self.weights, dtype=hidden.dtype)
        return super().evaluate(2.0 * hidden if self.doubled else hidden, actions)


class Opposite(Adjustable):
    def evaluate(self, obs, actions):
        return super().evaluate(-obs, actions)


def set_temperature(policy):
    policy.temperature = 3.0


def set_flag(policy):
    policy.doubled = True


def set_entry(policy):
    policy.table["shift"] = 3.0


def change_array(policy):
    policy.weights[1] = 3.0


def exchange_buffer(policy):
    policy.scale = torch.full((4,), 3.0)


def change_buffer(policy):
    policy.scale.mul_(3.0)


def move_buffer(policy):
    policy.scale.data = torch.full((4,), 3.0)


def move_frozen(policy):
    policy.double().float()
    policy.frozen.weight.data.mul_(3.0)


def transpose_frozen(policy):
    policy.frozen.weight.data = policy.frozen.weight.data.t()


def exchange_submodule(policy):
    policy.frozen = nn.Linear(4, 4).requires_grad_(False)


def exchange_class(policy):
    policy.__class__ = Opposite


def exchange_method(policy):
    policy.value = lambda obs: policy.critic(obs).squeeze(-1).tanh()


def reallocate(policy):
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()


def load_weights(policy):
    torch.manual_seed(5)
    policy.load_state_dict(type(policy)().state_dict())


def start_training(policy):
    policy.train()


def add_hook(policy):
    policy.frozen.register_forward_hook(lambda module, inputs, output: 2.0 * output)


def add_first_hook(policy):
    policy.frozen.register_forward_pre_hook(lambda module, inputs: (2.0 * inputs[0],))


def add_backward_hook(policy):
    policy.actor.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def add_tensor_hook(policy):
    policy.actor.weight.register_hook(lambda grad: 2.0 * grad)


def add_gradient_hook(policy):
    policy.actor.weight.register_post_accumulate_grad_hook(lambda p: None)


def pretend_to_compile(policy):
    policy._orig_mod = nn.Identity()


@pytest.mark.parametrize(
    ("change", "left_to_autograd"),
    [
        (set_temperature, False),
        (set_flag, False),
        (set_entry, False),
        (change_array, False),
        (exchange_buffer, False),
        (change_buffer, False),
        (move_buffer, False),
        (move_frozen, False),
        (transpose_frozen, False),
        (exchange_submodule, False),
        (exchange_class, False),
        (exchange_method, False),
        (reallocate, False),
        (load_weights, False),
        (start_training, True),
        (add_hook, True),
        (add_first_hook, True),
        (add_backward_hook, True),
        (add_tensor_hook, True),
        (add_gradient_hook, True),
        (pretend_to_compile, True),
    ],
)
def test_what_changed_in_the_policy_between_updates_shows_from_the_first_minibatch(
    change, left_to_autograd
):
    torch.manual_seed(0)
    study = Study(Adjustable())
    for number in range(4):
        study.recorded(make_batch(study.policy, 8, number), LOSS)
    assert study.replays() == [4]
    change(study.policy)
    study.begin()
    for number in range(4):
        batch = make_batch(study.policy, 8, 10 + number)
        state = torch.get_rng_state()
        metrics, ours = study.gradient(study.recorded, batch, LOSS)
        torch.set_rng_state(state)
        wanted, theirs = study.gradient(study.eager, batch, LOSS)
        assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        for replayed, eager in zip(ours, theirs, strict=True):
            torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-6)
    assert len(study.replays()) == (not left_to_autograd)


def test_a_policy_back_from_training_mode_is_recorded_again():
    study = Study(Adjustable())
    for training in (False, True, False):
        study.policy.train(training)
        study.begin()
        for number in range(3):
            study.recorded(make_batch(study.policy, 8, number), LOSS)
        assert study.replays() == ([] if training else [3])


def test_a_hook_is_called_for_every_minibatch():
    calls = []
    policy = OwnPolicy()
    policy.actor.register_forward_hook(lambda *_: calls.append(1))
    learner = make_learner(policy)
    batch = make_batch(policy)
    calls.clear()
    improve(learner, batch)
    assert len(calls) == 9  # 3 epochs of 3 minibatches


class Masked(OwnPolicy):
    """Divides by zero, of which torch never warns."""

    def evaluate(self, obs, actions):
        allowed = (obs[:, :3] > obs.amin(-1, keepdim=True) - 1.0).float()
        return super().evaluate(obs + (0.0 * allowed[:, :1]).log().exp(), actions)


def test_numpy_warns_of_no_number_in_a_replayed_update():
    policy = Masked()
    learner, batch = make_learner(policy), make_batch(policy)
    with np.errstate(all="warn"):
        improve(learner, batch)
    assert learner._gradient.replays == [9]


class Reads(OwnPolicy):
    """Reads what hangs on no module."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        factor = 1.0

        def closure(new=None):
            nonlocal factor
            factor = factor if new is None else new
            return factor

        self.closure = closure

    def evaluate(self, obs, actions):
        scale = self.scale * self.closure() * GLOBAL["scale"] * float(os.environ.get("SCALE", "1"))
        new = super().evaluate(obs, actions)
        return Evaluation(new.log_probs * scale, new.entropy, new.values)


class ReadsForValues(Reads):
    def evaluate(self, obs, actions):
        new, plain = super().evaluate(obs, actions), OwnPolicy.evaluate(self, obs, actions)
        return Evaluation(plain.log_probs, new.entropy, new.values * self.scale)


GLOBAL = {"scale": 1.0}


def change_class_attribute(policy, monkeypatch):
    monkeypatch.setattr(type(policy), "scale", 1.1, raising=False)


def change_closure(policy, monkeypatch):
    policy.closure(1.1)


def change_global(policy, monkeypatch):
    monkeypatch.setitem(GLOBAL, "scale", 1.1)


def change_environment(policy, monkeypatch):
    monkeypatch.setenv("SCALE", "1.1")


ELSEWHERE = [
    (Reads, change_class_attribute),
    (Reads, change_closure),
    (Reads, change_global),
    (Reads, change_environment),
    (ReadsForValues, change_class_attribute),
]


@pytest.mark.parametrize(("make", "change"), ELSEWHERE)
def test_what_changed_outside_of_the_policy_shows_from_the_first_minibatch(
    make, change, monkeypatch
):
    study = Study(make())
    for number in range(4):
        study.recorded(make_batch(study.policy, 8, number), LOSS)
    change(study.policy, monkeypatch)
    study.begin()
    assert study.replays() == [4]  # nothing shows
    for number in range(4):
        study.check(collected(study.policy, 8, number), LOSS)
    assert study.replays() == [3]  # the first minibatch was left to autograd


def collected(policy, rows=8, seed=0):
    """Rows with what the policy says of them."""
    batch = make_batch(policy, rows, seed, 0.0)
    with torch.no_grad():
        values = policy.evaluate(batch.obs, batch.actions).values
    return batch.replace(values=values)


@pytest.mark.parametrize(("make", "times"), [(Reads, [1]), (build, [])])
def test_rows_of_another_policy_are_compared_once_in_an_update_and_those_of_this_one_never(
    make, times
):
    """Nor is what runs nothing but the library's own code, which reads nothing elsewhere."""
    study = Study(make())
    for number in range(4):
        study.recorded(make_batch(study.policy, 8, number), LOSS)
    evaluate, calls = study.policy.evaluate, []
    study.recorded._recordings[next(iter(study.recorded._recordings))]._evaluator = lambda *args: (
        calls.append(1),
        evaluate(args[0], args[1]),
    )[1]
    study.begin()
    study.check(collected(study.policy), LOSS)
    study.check(make_batch(study.policy, 8), LOSS)
    assert calls == []
    study.begin()
    for number in range(3):
        study.check(make_batch(study.policy, 8, number), LOSS)
    assert calls == times
    assert study.replays() == [9]


def give_forward(policy):
    layer = policy.actor_body[1]
    layer.forward = lambda inputs: nn.functional.linear(inputs, layer.weight, layer.bias)


def append_own_layer(policy):
    policy.actor_body.append(type("Scaled", (nn.Tanh,), {})())


@pytest.mark.parametrize(
    ("change", "closed"),
    [(lambda policy: None, True), (give_forward, False), (append_own_layer, False)],
)
def test_code_of_a_user_is_told_from_the_librarys(change, closed):
    policy = build()
    change(policy)
    assert Study(policy).recorded.closed is closed


def test_hidden_state_that_changes_within_an_update_is_found_within_1024_replays():
    study = Study(Adjustable())
    for number in range(5):
        study.recorded(make_batch(study.policy, 2, number), LOSS)
    study.policy.hidden.shift = 1.0
    batch = make_batch(study.policy, 2, 7)
    _, wanted = study.gradient(study.eager, batch, LOSS)
    _, stale = study.gradient(study.recorded, batch, LOSS)
    assert not torch.allclose(stale[0], wanted[0], rtol=1e-2)
    for _ in range(1018):
        study.recorded(batch, LOSS)
    assert study.replays() == []  # dropped
    for number in range(1, 5):
        study.check(make_batch(study.policy, 2, number), LOSS)
        assert study.replays() == [number]


def test_a_policy_that_changes_with_every_call_is_given_up():
    class Counting(OwnPolicy):
        def __init__(self):
            super().__init__()
            self.calls = []

        def evaluate(self, obs, actions):
            self.calls.append(1)
            return super().evaluate(obs * len(self.calls), actions)

    study = Study(Counting())
    for number in range(3):
        study.recorded(make_batch(OwnPolicy(), 8, number), LOSS)
    assert study.replays() == []
    before = len(study.policy.calls)
    study.recorded(make_batch(OwnPolicy(), 8), LOSS)
    assert len(study.policy.calls) == before + 1


# Recordings themselves


def test_there_is_one_recording_for_each_size_of_minibatch():
    policy = build()
    learner = make_learner(policy)
    for number in range(3):
        improve(learner, make_batch(policy, 50, number), number)  # 4 of 12 and 13 rows
    sizes = {len(recording._rows) for recording in learner._gradient._recordings.values()}
    assert sizes == {12, 13}
    improve(learner, make_batch(policy, 50), entropy_coef=0.0)
    assert len(learner._gradient._recordings) == 4  # the entropy's gradient is no part of these


def test_recordings_of_many_sizes_do_not_pile_up():
    policy = build()
    study = Study(policy)
    for rows in range(1, 2 * _MOST_RECORDINGS):
        for _ in range(3):
            study.recorded(make_batch(policy, rows), LOSS)
        study.check(make_batch(policy, rows, rows), LOSS)
        assert len(study.replays()) <= _MOST_RECORDINGS
        assert study.replays()[-1] == 4


REPEATABLE = {
    "own": OwnPolicy,
    "tied": Tied,
    "low rank": lambda: TwoParts(LowRank()),
    "default": build,
    "gaussian": lambda: build(BOX),
}


@pytest.mark.parametrize("make", (KINDS | REPEATABLE).values(), ids=KINDS | REPEATABLE)
def test_a_learner_that_has_replayed_before_learns_as_a_fresh_one(make):
    batches = [make_batch(seeded(make), 50, number) for number in range(5)]
    old = seeded(make)
    learner = make_learner(old)
    for number in range(3):
        torch.manual_seed(number)
        improve(learner, batches[number], number)
    fresh = seeded(make)
    fresh.load_state_dict(old.state_dict())
    other = make_learner(fresh)
    other.load_state_dict(learner.state_dict())
    for number in range(3, 5):
        metrics = []
        for one in (learner, other):
            torch.manual_seed(number)
            metrics.append(improve(one, batches[number], number))
        assert metrics[0] == metrics[1]
    assert_bitwise_equal(parts(old, learner), parts(fresh, other))


@pytest.mark.parametrize("make", REPEATABLE.values(), ids=REPEATABLE)
def test_updates_of_repeatable_policies_are_replayed(make):
    policy = seeded(make)
    learner = make_learner(policy)
    improve(learner, make_batch(policy, 48))
    recordings = learner._gradient._recordings.values()
    assert [recording.replays for recording in recordings] == [9]


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
def test_a_copied_policy_has_its_own_recording(action_space):
    policy = build(action_space)
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    twin = copy.deepcopy(policy)
    before = parts(policy, learner)
    improve(make_learner(twin), make_batch(twin, seed=1))
    assert_bitwise_equal(parts(policy, learner), before)


def test_a_watched_policy_is_left_to_autograd():
    policy = build()
    policy.value_head.register_forward_hook(look_on)
    study = Study(policy)
    study.recorded(make_batch(policy), LOSS)
    assert study.replays() == []
    assert not study.recorded._recordings
