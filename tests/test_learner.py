import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

from ppo import ActorCritic, Batch, Evaluation, PolicyConfig, make_policy
from ppo.errors import NonFiniteError
from ppo.learner import Learner
from ppo.learner.closed_form import ClosedFormGradient
from ppo.learner.eager import METRICS, EagerGradient, LossWeights
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.learner import parameter_groups
from ppo.losses import MAX_LOG_RATIO, ppo_loss

DISCRETE = spaces.Discrete(3)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
SMALL = PolicyConfig(hidden_sizes=(8,), output_gain=1.0)
OPTIONS = {
    "num_epochs": 3,
    "minibatch_size": 16,
    "value_coef": 0.5,
    "value_clip_range": None,
    "max_grad_norm": 0.5,
    "target_kl": None,
    "adam_eps": 1e-5,
    "normalize_advantages": False,
}
UPDATE = {"learning_rate": 1e-3, "clip_range": 0.2, "entropy_coef": 0.01}


class EagerActorCritic(ActorCritic):
    """The default policy, but of a class whose methods might say anything: autograd has to."""


class OwnPolicy(nn.Module):
    """The least that the protocol asks for."""

    def __init__(self, num_inputs=4, num_actions=3):
        super().__init__()
        self.actor = nn.Linear(num_inputs, num_actions)
        self.critic = nn.Linear(num_inputs, 1)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        probs = self.actor(obs).softmax(-1)
        if deterministic:
            return probs.argmax(-1)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

    def evaluate(self, obs, actions):
        log_p = self.actor(obs).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        chosen = log_p.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        return Evaluation(chosen, entropy, self.value(obs))

    def value(self, obs):
        return self.critic(obs).squeeze(-1)


def build(action_space=DISCRETE, config=SMALL, seed=0, num_inputs=4):
    observation_space = spaces.Box(-np.inf, np.inf, (num_inputs,), np.float32)
    return make_policy(observation_space, action_space, config, seed=seed)


def eager(policy):
    policy.__class__ = EagerActorCritic
    return policy


def make_batch(policy, rows=48, seed=0, log_ratios=0.1, num_inputs=4):
    """Rows on which the ratio is exp of what is given: a scale, or one log-ratio per row."""
    generator = torch.Generator().manual_seed(seed)
    obs = 2.0 * torch.randn(rows, num_inputs, generator=generator)
    actions = policy.act(obs, generator=generator)
    if not isinstance(log_ratios, torch.Tensor):
        log_ratios = log_ratios * torch.randn(rows, generator=generator)
    with torch.no_grad():
        new = Evaluation(*policy.evaluate(obs, actions))
    return Batch(
        obs=obs,
        actions=actions,
        log_probs=new.log_probs - log_ratios,
        values=new.values + torch.randn(rows, generator=generator),
        advantages=torch.randn(rows, generator=generator),
        returns=new.values + 3.0 * torch.randn(rows, generator=generator),
    )


def make_learner(policy, **options):
    return Learner(policy, **OPTIONS | options)


def improve(learner, batch, seed=0, **update):
    return learner.improve(batch, torch.Generator().manual_seed(seed), **UPDATE | update)


def parts(policy, learner):
    """Every tensor that training moves, copied."""
    state = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    state |= {f"optimizer.{name}": tensor for name, tensor in learner.state_dict().items()}
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_bitwise_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def parameters(policy):
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


# The closed form


@st.composite
def gradient_cases(draw):
    rng = np.random.default_rng(draw(seeds))
    num_inputs = draw(st.integers(1, 6))
    config = PolicyConfig(
        hidden_sizes=tuple(draw(st.lists(st.integers(1, 16), max_size=3))),
        activation=draw(st.sampled_from(["tanh", "relu"])),
        normalize_observations=draw(st.booleans()),
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
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        if isinstance(action_space, spaces.Box):
            # Within and beyond the bounds [-5, 2].
            policy.action_head.log_std.add_(draw(st.sampled_from([0.0, -2.0, 4.0])))
    policy.update_normalizer(3.0 + 2.0 * torch.randn(20, num_inputs, generator=generator))

    clip_range = draw(st.sampled_from([0.0, 0.1, 0.2, 0.9]))
    rows = draw(st.sampled_from([1, 2, 3, 31, 64]))
    scale = draw(st.sampled_from([0.01, 0.3, 3.0, 30.0]))
    log_ratios = scale * torch.as_tensor(rng.normal(size=rows), dtype=torch.float32)
    # On an edge of the loss, rounding decides which side a row is on.
    for edge in (math.log1p(-clip_range), math.log1p(clip_range), MAX_LOG_RATIO, -MAX_LOG_RATIO):
        near = (log_ratios - edge).abs() < 1e-3
        log_ratios[near] = edge + 2e-3
    weights = LossWeights(
        clip_range=clip_range,
        entropy_coef=draw(st.sampled_from([0.0, 0.01, 1.0])),
        value_coef=draw(st.sampled_from([0.0, 0.5, 2.0])),
        value_clip_range=None,
    )
    return policy, make_batch(policy, rows, draw(seeds), log_ratios, num_inputs), weights


@settings(max_examples=150, deadline=None)
@given(gradient_cases())
def test_the_closed_form_is_the_gradient_of_the_loss(case):
    policy, batch, weights = case
    optimizer = FlatAdam(parameter_groups(policy), 1e-5)
    closed, autograd = ClosedFormGradient(policy.plain_layers()), EagerGradient(policy, optimizer)
    wanted_metrics = autograd(batch, weights)
    wanted = [vector.clone() for vector in optimizer.gradients]
    for vector in optimizer.gradients:
        vector.fill_(torch.nan)  # every entry must be written
    metrics = closed(closed.prepare(batch), weights)
    # A log-probability of size L is known to about L * 1e-7, a ratio is its exponential.
    size = 1.0 + batch.log_probs.abs().max().item()
    rtol = 1e-6 * (10.0 + size)
    torch.testing.assert_close(metrics, wanted_metrics, rtol=rtol, atol=1e-5, check_dtype=False)
    exact = gradients_in_double_precision(policy, batch, weights)
    for ours, theirs, truth in zip(optimizer.gradients, wanted, exact, strict=True):
        # Where rows cancel, or a Gaussian is narrow, autograd itself is off by more than 1e-5.
        rounding = 1e-5 * truth.norm() + 50.0 * (theirs - truth).norm() + 2e-6 * size
        assert (ours - truth).norm() <= rounding


def gradients_in_double_precision(policy, batch, weights):
    reference = Float64(policy)
    optimizer = FlatAdam(parameter_groups(reference), 1e-5)
    doubled = {n: t.double() if t.is_floating_point() else t for n, t in batch.fields.items()}
    EagerGradient(reference, optimizer)(Batch(**doubled), weights)
    return optimizer.gradients


class Float64(nn.Module):
    """The default policy in double precision."""

    def __init__(self, policy):
        super().__init__()
        self.inner = copy.deepcopy(policy).double()

    def evaluate(self, obs, actions):
        # Its own evaluate() takes observations to float32.
        policy = self.inner
        features = policy.normalizer(obs) if hasattr(policy.normalizer, "shift") else obs
        distribution = policy.action_head(policy.actor_body(features))
        flat = actions.reshape(len(actions), -1) if actions.is_floating_point() else actions
        values = policy.value_head(policy.critic_body(features)).squeeze(-1)
        return Evaluation(distribution.log_prob(flat), distribution.entropy(), values)

    def parameter_groups(self):
        return self.inner.parameter_groups()


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("per_minibatch", [False, True])
def test_whole_updates_are_the_same_by_either_gradient(action_space, activation, per_minibatch):
    config = PolicyConfig(hidden_sizes=(16, 16), activation=activation)
    policies = build(action_space, config), eager(build(action_space, config))
    learners = [make_learner(p, normalize_advantages=per_minibatch) for p in policies]
    for number in range(4):
        batch = make_batch(policies[1], 50, seed=number)
        metrics = [improve(learner, batch, number, learning_rate=3e-3) for learner in learners]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-4)
    start, *ends = (parameters(p) for p in (build(action_space, config), *policies))
    assert (ends[0] - ends[1]).norm() < 1e-3 * (ends[1] - start).norm()


def supports(policy, value_clip_range=None):
    layers = policy.plain_layers()
    optimizer = FlatAdam(parameter_groups(policy), 1e-5)
    return layers is not None and ClosedFormGradient.supports(layers, optimizer, value_clip_range)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("hidden_sizes", [(), (8,), (256, 256)])
def test_the_closed_form_serves_plain_networks(action_space, hidden_sizes):
    assert supports(build(action_space, PolicyConfig(hidden_sizes=hidden_sizes)))


def freeze_an_actor_layer(policy):
    policy.actor_body[1].requires_grad_(False)


def freeze_the_log_std(policy):
    policy.action_head.log_std.requires_grad_(False)


def to_float64(policy):
    policy.double()


def add_a_parameter(policy):
    policy.temperature = nn.Parameter(torch.ones(()))
    groups = policy.parameter_groups
    policy.parameter_groups = lambda: {**groups(), "temperature": [policy.temperature]}


def add_dropout(policy):
    policy.actor_body.append(nn.Dropout(0.5))


def exchange_the_body(policy):
    policy.actor_body = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh())


def share_the_output_layers_input(policy):
    policy.critic_body = policy.actor_body


def mix_activations(policy):
    policy.critic_body[2] = nn.ReLU()


def constrain_the_value_head(policy):
    nn.utils.parametrizations.weight_norm(policy.value_head)


def constrain_the_action_head(policy):
    nn.utils.parametrizations.weight_norm(policy.action_head.linear)


@pytest.mark.parametrize(
    "change",
    [
        eager,
        freeze_an_actor_layer,
        freeze_the_log_std,
        to_float64,
        add_a_parameter,
        add_dropout,
        exchange_the_body,
        share_the_output_layers_input,
        mix_activations,
        constrain_the_value_head,
        constrain_the_action_head,
    ],
)
def test_the_closed_form_leaves_any_other_policy_to_autograd(change):
    policy = build(BOX)
    change(policy)
    assert not supports(policy)


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(hidden_sizes=(8,), shared=True),
        PolicyConfig(hidden_sizes=(8,), activation="gelu"),
        PolicyConfig(hidden_sizes=(300, 300)),
    ],
)
def test_the_closed_form_is_for_small_separate_bodies(config):
    assert not supports(build(config=config))


def test_the_closed_form_knows_no_value_clip():
    assert not supports(build(), value_clip_range=0.2)


def test_the_value_clip_is_applied():
    policies = [build(seed=1) for _ in range(2)]
    batches = [make_batch(policy, seed=1) for policy in policies]
    for policy, batch, limit in zip(policies, batches, (None, 1e-3), strict=True):
        improve(make_learner(policy, value_clip_range=limit), batch)
    plain, clipped = (policy.critic_body[1].weight for policy in policies)
    assert not torch.allclose(plain, clipped)


def test_a_body_frozen_between_updates_stays_as_it_is():
    policy = build()
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    policy.actor_body.requires_grad_(False)
    before = parts(policy, learner)
    improve(learner, make_batch(policy, seed=1))
    for name, tensor in policy.actor_body.state_dict().items():
        assert torch.equal(tensor, before[f"policy.actor_body.{name}"]), name
    assert not torch.equal(policy.value_head.weight, before["policy.value_head.weight"])


# Policies of all kinds


class FromFeatures(OwnPolicy):
    """An own policy with something between observations and outputs."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def evaluate(self, obs, actions):
        return super().evaluate(self.features(obs), actions)


class Branching(OwnPolicy):
    """Looks at values to decide what to compute."""

    def evaluate(self, obs, actions):
        return super().evaluate(obs if obs.mean() > 0 else 2.0 * obs, actions)


class Tied(OwnPolicy):
    """One weight in two layers, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.alias = self.second

    def value(self, obs):
        hidden = self.alias(self.second(self.first(obs).tanh()).tanh())
        return self.critic(hidden).squeeze(-1)


def seeded(make):
    torch.manual_seed(0)
    return make()


KINDS = {
    "own": OwnPolicy,
    "tied": Tied,
    "branching": Branching,
    "layer norm": lambda: FromFeatures(nn.LayerNorm(4)),
    "dropout": lambda: FromFeatures(nn.Dropout(0.5)),
    "batch norm": lambda: FromFeatures(nn.BatchNorm1d(4)),
    "shared": lambda: build(config=PolicyConfig(hidden_sizes=(8,), shared=True)),
    "gelu": lambda: build(BOX, PolicyConfig(hidden_sizes=(8,), activation="gelu")),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_any_kind_of_policy_is_trained_by_autograd(make):
    policy = seeded(make)
    learner = make_learner(policy)
    assert isinstance(learner._gradient, EagerGradient)
    before = parameters(policy)
    improve(learner, make_batch(policy, 32))
    assert (parameters(policy) != before).any()
    assert torch.isfinite(parameters(policy)).all()


class Biased(ActorCritic):
    """The default policy and one parameter more, which its groups do not know of."""

    def evaluate(self, obs, actions):
        log_probs, entropy, values = super().evaluate(obs, actions)
        return Evaluation(log_probs, entropy, values + self.bias)


def test_a_parameter_that_no_group_names_is_trained_all_the_same():
    policy = build()
    policy.__class__, policy.bias = Biased, nn.Parameter(torch.zeros(()))
    improve(make_learner(policy), make_batch(policy))
    assert policy.bias != 0.0


def by_hand(policy, batch, generator, value_clip_range):
    """An update as one would write it with torch alone."""
    groups = parameter_groups(policy)
    adam = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=OPTIONS["adam_eps"])
    for _ in range(OPTIONS["num_epochs"]):
        for mini in batch.minibatches(OPTIONS["minibatch_size"], generator):
            new = policy.evaluate(mini.obs, mini.actions)
            loss = ppo_loss(
                new.log_probs,
                mini.log_probs,
                mini.advantages,
                new.values,
                mini.returns,
                new.entropy,
                clip_range=UPDATE["clip_range"],
                value_coef=OPTIONS["value_coef"],
                entropy_coef=UPDATE["entropy_coef"],
                value_clip_range=value_clip_range,
                old_values=mini.values,
            )
            adam.zero_grad()
            loss.total.backward()
            for group in groups.values():
                nn.utils.clip_grad_norm_(group, OPTIONS["max_grad_norm"])
            adam.step()


WRITABLE = {name: make for name, make in KINDS.items() if name != "dropout"} | {
    "default": build,
    "gaussian": lambda: build(BOX),
    "linear": lambda: build(config=PolicyConfig(hidden_sizes=())),
}


@pytest.mark.parametrize("value_clip_range", [None, 0.1])
@pytest.mark.parametrize("make", WRITABLE.values(), ids=WRITABLE)
def test_an_update_is_what_one_would_write_with_torch_alone(make, value_clip_range):
    ours, theirs = seeded(make), seeded(make)
    before = parameters(ours)
    batch = make_batch(theirs, 50)
    improve(make_learner(ours, value_clip_range=value_clip_range), batch, seed=3)
    by_hand(theirs, batch, torch.Generator().manual_seed(3), value_clip_range)
    moved = (parameters(ours) - before).norm()
    assert moved > 1e-2
    assert (parameters(ours) - parameters(theirs)).norm() < 1e-3 * moved


def test_images_are_learned_from():
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    config = PolicyConfig(hidden_sizes=(), cnn_features=8, shared=True)
    policy = make_policy(space, DISCRETE, config)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(256, (6, 3, 36, 36), dtype=torch.uint8, generator=generator)
    actions = policy.act(obs, generator=generator)
    with torch.no_grad():
        new = policy.evaluate(obs, actions)
    batch = Batch(
        obs=obs,
        actions=actions,
        log_probs=new.log_probs,
        values=new.values,
        advantages=torch.linspace(-1, 1, 6),
        returns=torch.linspace(-1, 1, 6),
    )
    learner = make_learner(policy)
    losses = [improve(learner, batch)["value_loss"] for _ in range(10)]
    assert losses[-1] < losses[0] / 2


# Adam


def groups_of_layers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(3, 1)])
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    named = {
        "actor": [*layers[0].parameters(), *layers[1].parameters()],
        "critic": [*layers[2].parameters()],
    }
    return layers, named


@given(seeds, st.sampled_from([0.01, 0.5, 1e6]), st.sampled_from([1e-8, 1e-5, 1e-1]))
@settings(max_examples=15, deadline=None)
def test_flat_adam_is_torch_adam_with_a_clip_per_network(seed, max_norm, eps):
    ours, our_groups = groups_of_layers()
    theirs, their_groups = groups_of_layers()
    flat = FlatAdam(our_groups, eps)
    adam = torch.optim.Adam(theirs.parameters(), lr=1.0, eps=eps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(60):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            gradient = torch.randn(one.shape, generator=generator) * 10 ** (step % 5 - 2)
            one.grad.copy_(gradient)
            other.grad = gradient.clone()
        learning_rate = 1e-2 / (step + 1)
        norm = flat.step(learning_rate, max_norm)
        norms = [nn.utils.clip_grad_norm_(group, max_norm) for group in their_groups.values()]
        adam.param_groups[0]["lr"] = learning_rate
        adam.step()
        assert norm.item() == pytest.approx(math.hypot(*(float(n) for n in norms)), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_flat_adam_moves_parameters_into_one_vector_without_changing_them():
    layers, groups = groups_of_layers()
    before = [p.detach().clone() for p in layers.parameters()]
    objects = list(layers.parameters())
    flat = FlatAdam(groups, 1e-5)
    assert all(p is q for p, q in zip(layers.parameters(), objects, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(layers.parameters(), before, strict=True))
    assert flat.size == sum(p.numel() for p in before)
    flat.parameters[1].fill_(7.0)
    flat.gradients[0].fill_(5.0)
    assert (layers[2].weight == 7.0).all()
    assert (layers[1].bias.grad == 5.0).all()


def test_backward_adds_into_the_flat_gradient():
    layers, groups = groups_of_layers()
    flat = FlatAdam(groups, 1e-5)
    layers[2](torch.ones(1, 3)).sum().backward()
    assert flat.gradients[1].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert not flat.gradients[0].any()
    flat.zero_grad()
    assert not flat.gradients[1].any()
    assert not layers[2].weight.grad.any()


def test_flat_adam_goes_on_exactly_from_its_state_dict():
    trained = []
    for interrupted in (False, True):
        policy = build(seed=3)
        learner = make_learner(policy)
        improve(learner, make_batch(policy, seed=1))
        if interrupted:
            state, weights = learner.state_dict(), copy.deepcopy(policy.state_dict())
            improve(learner, make_batch(policy, seed=9))  # must not reach into the copies
            policy = build(seed=4)
            policy.load_state_dict(weights)
            learner = make_learner(policy)
            learner.load_state_dict(state)
        improve(learner, make_batch(policy, seed=2))
        trained.append(parts(policy, learner))
    assert_bitwise_equal(*trained)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("actor.exp_avg"),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({"critic.exp_avg": torch.zeros(3)}),
        lambda state: state.clear(),
    ],
)
def test_the_state_of_another_optimizer_is_refused_whole(damage):
    policy = build()
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    before = parts(policy, learner)
    state = {name: tensor + 1.0 for name, tensor in learner.state_dict().items()}
    damage(state)
    with pytest.raises(ValueError, match="optimizer state"):
        learner.load_state_dict(state)
    assert_bitwise_equal(parts(policy, learner), before)


def test_a_policy_without_parameters_cannot_be_trained():
    with pytest.raises(ValueError, match="no parameters"):
        make_learner(nn.Identity())


def test_parameters_of_two_dtypes_train_side_by_side():
    groups = {"both": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]}
    flat = FlatAdam(groups, 1e-5)
    for gradient in flat.gradients:
        gradient.fill_(1.0)
    flat.step(0.1, 10.0)
    for parameter in groups["both"]:
        assert parameter.tolist() == pytest.approx([0.9, 0.9], abs=1e-4)


# The learner


def reallocate(policy):
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone()


def load_other_weights(policy):
    policy.load_state_dict(build(seed=5).state_dict())


def assign_other_weights(policy):
    policy.load_state_dict(build(seed=5).state_dict(), assign=True)


def drop_gradients(policy):
    policy.zero_grad(set_to_none=True)


def to_float64_and_back(policy):
    policy.double().float()


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
@pytest.mark.parametrize(
    "change",
    [
        reallocate,
        load_other_weights,
        assign_other_weights,
        drop_gradients,
        to_float64_and_back,
    ],
)
def test_what_a_user_does_to_the_policy_between_updates_is_taken_up(make, change):
    policy = make()
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    change(policy)
    weights, moments = copy.deepcopy(policy.state_dict()), learner.state_dict()
    batch = make_batch(policy, seed=1)
    improve(learner, batch, seed=1)

    fresh = make()
    fresh.load_state_dict(weights)
    reference = make_learner(fresh)
    reference.load_state_dict(moments)
    improve(reference, batch, seed=1)
    assert_bitwise_equal(parts(policy, learner), parts(fresh, reference))
    assert not torch.equal(policy.value_head.weight, weights["value_head.weight"])


def test_the_metrics_are_finite_means_with_the_documented_names():
    policy = build()
    metrics = improve(make_learner(policy), make_batch(policy))
    assert set(metrics) == {*METRICS, "grad_norm"}
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_one_whole_minibatch_reports_the_loss_before_its_step():
    policy = build()
    batch = make_batch(policy, rows=16, log_ratios=0.0)
    metrics = improve(make_learner(policy, num_epochs=1), batch)
    new = policy.evaluate(batch.obs, batch.actions)  # after the step
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["policy_loss"] == pytest.approx(-batch.advantages.mean().item(), abs=1e-6)
    assert metrics["value_loss"] != pytest.approx(
        (new.values - batch.returns).square().mean().item(), rel=1e-6
    )


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
def test_the_gradient_norm_is_reported_before_it_is_clipped(make):
    norms = []
    for limit in (1e-3, 1e3):
        policy = make()
        learner = make_learner(policy, num_epochs=1, minibatch_size=48, max_grad_norm=limit)
        norms.append(improve(learner, make_batch(policy))["grad_norm"])
    assert norms[0] == norms[1] > 1e-2


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
@pytest.mark.parametrize("field", ["advantages", "returns", "log_probs", "obs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_loss_that_is_not_finite_changes_nothing(make, field, value):
    policy = make()
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    batch = make_batch(policy, seed=1)
    bad = batch.fields[field].clone()
    bad[-1] = value
    before = parts(policy, learner)
    try:
        improve(learner, batch.replace(**{field: bad}))
    except NonFiniteError as error:
        assert "non-finite" in str(error)  # noqa: PT017
        assert_bitwise_equal(parts(policy, learner), before)
    else:
        # The clip of the log-ratio or of the observation made something finite of it.
        assert math.isfinite(value) or field in ("log_probs", "obs")
        assert all(torch.isfinite(t).all() for t in parts(policy, learner).values())
    improve(learner, batch)  # and learning goes on
    assert all(torch.isfinite(tensor).all() for tensor in parts(policy, learner).values())


def test_nan_in_any_row_is_an_error_for_every_field():
    for field in ("advantages", "returns", "log_probs", "obs"):
        policy = build()
        batch = make_batch(policy)
        bad = batch.fields[field].clone()
        bad[3] = torch.nan
        with pytest.raises(NonFiniteError):
            improve(make_learner(policy), batch.replace(**{field: bad}))


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
def test_parameters_that_the_last_step_made_infinite_are_an_error_too(make):
    policy = make()
    learner = make_learner(policy, num_epochs=1, minibatch_size=48)
    before = parts(policy, learner)
    with pytest.raises(NonFiniteError):
        improve(learner, make_batch(policy), learning_rate=1e39)
    assert_bitwise_equal(parts(policy, learner), before)


def run_epochs(num_epochs=10, **options):
    """Epochs that an update of one minibatch per epoch took, by Adam's own count, and its KL."""
    policy = build()
    learner = make_learner(policy, num_epochs=num_epochs, minibatch_size=48, **options)
    metrics = improve(learner, make_batch(policy, log_ratios=0.0), learning_rate=1e-2)
    return int(learner.state_dict()["actor.step"]), metrics["approx_kl"]


def test_an_epoch_whose_kl_exceeds_the_target_is_the_last():
    totals = [count * kl for count, kl in (run_epochs(number) for number in range(1, 7))]
    kls = np.diff(totals, prepend=0.0)
    assert kls[0] == pytest.approx(0.0, abs=1e-6)  # still at ratio 1
    assert (np.diff(kls) > 0.0).all()
    for number in range(1, 6):
        assert run_epochs(target_kl=float(kls[number]) * 0.99)[0] == number + 1
        assert run_epochs(target_kl=float(kls[number]) * 1.01)[0] == number + 2
    assert run_epochs(target_kl=None)[0] == 10
    assert run_epochs(target_kl=1e9)[0] == 10


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
def test_every_number_of_rows_can_be_learned_from(rows):
    policy = build()
    learner = make_learner(policy)
    metrics = improve(learner, make_batch(policy, rows))
    assert all(math.isfinite(value) for value in metrics.values())
    assert int(learner.state_dict()["actor.step"]) == 3 * math.ceil(rows / 16)


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
def test_the_number_of_threads_is_as_before(make):
    policy = make()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        learner = make_learner(policy)
        batch = make_batch(policy)
        improve(learner, batch)
        assert torch.get_num_threads() == 2
        with pytest.raises(NonFiniteError):
            improve(learner, batch.replace(returns=batch.returns * torch.nan))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
def test_the_global_generators_are_left_alone(action_space):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    policy = build(action_space)
    improve(make_learner(policy), make_batch(policy))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002


def test_the_advantage_of_an_action_raises_its_probability():
    for policy in (build(seed=2), eager(build(seed=2)), OwnPolicy()):
        batch = make_batch(policy, log_ratios=0.0)
        batch = batch.replace(advantages=(batch.actions == 1).float() - 0.5)
        before = policy.evaluate(batch.obs, torch.ones(len(batch))).log_probs.mean()
        improve(make_learner(policy), batch, learning_rate=1e-2, entropy_coef=0.0)
        after = policy.evaluate(batch.obs, torch.ones(len(batch))).log_probs.mean()
        assert after > before + 0.01


def test_a_policy_with_only_the_three_methods_trains_as_one_network():
    torch.manual_seed(0)
    policy = OwnPolicy()
    learner = make_learner(policy)
    before = parameters(policy)
    metrics = improve(learner, make_batch(policy))
    assert all(math.isfinite(value) for value in metrics.values())
    assert (parameters(policy) != before).any()
    assert set(learner.state_dict()) == {"policy.exp_avg", "policy.exp_avg_sq", "policy.step"}
