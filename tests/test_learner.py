import copy
import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_policies import (
    BOX,
    DISCRETE,
    KINDS,
    OPTIONS,
    UPDATE,
    OwnPolicy,
    assert_bitwise_equal,
    build,
    eager,
    improve,
    make_batch,
    make_learner,
    parameters,
    parts,
    seeded,
)
from torch import nn

from ppo import ActorCritic, Batch, Evaluation, PolicyConfig, make_policy
from ppo.errors import ConfigError, NonFiniteError
from ppo.learner import learner as learner_module
from ppo.learner.adaptive_rate import MAX_SCALE
from ppo.learner.eager import METRICS, EagerGradient
from ppo.learner.learner import parameter_groups
from ppo.learner.recorded import RecordedGradient
from ppo.losses import ppo_loss


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (build, RecordedGradient),
        (lambda: build(config=PolicyConfig(hidden_sizes=(256, 256))), RecordedGradient),
        (lambda: build(config=PolicyConfig(hidden_sizes=(300, 300))), EagerGradient),
        (OwnPolicy, RecordedGradient),
    ],
)
def test_the_gradient_of_a_small_policy_is_recorded(make, kind):
    assert type(make_learner(make())._gradient) is kind


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("normalized", ["none", "minibatch"])
def test_whole_updates_are_the_same_by_either_gradient(action_space, activation, normalized):
    config = PolicyConfig(hidden_sizes=(16, 16), activation=activation)
    policies = build(action_space, config), eager(build(action_space, config))
    learners = [make_learner(p, normalize_advantages=normalized) for p in policies]
    for number in range(4):
        batch = make_batch(policies[1], 50, seed=number)
        metrics = [improve(learner, batch, number, learning_rate=3e-3) for learner in learners]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-4)
    start, *ends = (parameters(p) for p in (build(action_space, config), *policies))
    assert (ends[0] - ends[1]).norm() < 1e-3 * (ends[1] - start).norm()


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_any_kind_of_policy_is_trained(make):
    policy = seeded(make)
    learner = make_learner(policy)
    before = parameters(policy)
    improve(learner, make_batch(policy, 32))
    assert (parameters(policy) != before).any()
    assert torch.isfinite(parameters(policy)).all()


def test_the_value_clip_is_applied():
    policies = [build(seed=1) for _ in range(2)]
    batches = [make_batch(policy, seed=1) for policy in policies]
    for policy, batch, limit in zip(policies, batches, (None, 1e-3), strict=True):
        improve(make_learner(policy, value_clip_range=limit), batch)
    plain, clipped = (policy.critic_body[1].weight for policy in policies)
    assert not torch.allclose(plain, clipped)


@pytest.mark.parametrize("options", [{}, {"optimizer": "SGD"}], ids=str)
def test_a_policy_that_is_frozen_altogether_is_refused_with_a_remedy(options):
    policy = make_policy(spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(2)).requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameters to train; leave requires_grad True"):
        make_learner(policy, **options)


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


def test_a_policy_converted_between_updates_stays_converted_and_is_trained():
    policy = build()
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    policy.double()
    before, moments = copy.deepcopy(policy), learner.state_dict()
    improve(learner, make_batch(build(), seed=1))
    for (name, one), start in zip(policy.named_parameters(), before.parameters(), strict=True):
        assert one.dtype == torch.float64, name
        assert not torch.equal(one, start), name
    other = make_learner(before)
    other.load_state_dict(moments)
    improve(other, make_batch(build(), seed=1))
    assert_bitwise_equal(parts(policy, learner), parts(before, other))


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


def nothing(policy):
    """Leave it as it is: a learner that goes on does as a fresh one, which exact resume needs."""


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
        nothing,
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
    if change is assign_other_weights:  # new parameters have none, and count from 0
        for tensor in moments.values():
            tensor.zero_()
    batch = make_batch(policy, seed=1)
    improve(learner, batch, seed=1)

    fresh = make()
    fresh.load_state_dict(weights)
    reference = make_learner(fresh)
    reference.load_state_dict(moments)
    improve(reference, batch, seed=1)
    assert_bitwise_equal(parts(policy, learner), parts(fresh, reference))
    assert not torch.equal(policy.value_head.weight, weights["value_head.weight"])


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
def test_rows_that_still_carry_a_gradient_are_constants(make):
    trained = []
    for with_history in (False, True):
        policy = make()
        batch = make_batch(policy)
        leaves = {n: t.requires_grad_() for n, t in batch.fields.items() if t.is_floating_point()}
        if not with_history:
            batch = make_batch(policy)
        learner = make_learner(policy)
        improve(learner, batch)
        trained.append(parts(policy, learner))
        assert all(leaf.grad is None for leaf in leaves.values())
    assert_bitwise_equal(*trained)


def test_the_metrics_are_finite_means_with_the_documented_names():
    policy = build()
    metrics = improve(make_learner(policy), make_batch(policy))
    assert set(metrics) == {*METRICS, "grad_norm", "learning_rate"}
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


def test_what_a_learner_holds_does_not_grow_with_its_updates():
    policy = build()
    learner = make_learner(policy)

    def held():
        boxes = [vars(learner), vars(learner._gradient), vars(learner._optimizer)]
        return [len(x) for box in boxes for x in box.values() if isinstance(x, list | dict | set)]

    sizes = []
    for number in range(20):
        improve(learner, make_batch(policy, seed=number), number)
        sizes.append(held())
    assert sizes[3:] == [sizes[3]] * 17


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


# Options of the algorithm


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
@pytest.mark.parametrize(
    ("settings", "update"),
    [
        ({"dual_clip": 1.01}, {}),
        ({}, {"clip_range_high": 0.9}),
        ({"weight_decay": 10.0}, {}),
        ({"optimizer": "SGD"}, {}),
        ({"learning_rates": ["critic"]}, {"learning_rates": {"critic": 1e-2}}),
        ({"adaptive_kl": 1.0}, {}),
    ],
)
def test_every_option_changes_how_a_policy_learns(make, settings, update):
    ends = []
    for chosen, given_now in (({}, {}), (settings, update)):
        policy = make()
        learner = make_learner(policy, **chosen)
        for number in range(2):
            batch = make_batch(policy, log_ratios=0.5, seed=number)
            improve(learner, batch, number, learning_rate=3e-3, **given_now)
        ends.append(parameters(policy))
    assert not torch.allclose(*ends)


@pytest.mark.parametrize("optimizer", ["adam", "SGD", "Adafactor"])
def test_a_group_learns_at_its_own_rate_and_the_others_do_not_notice(optimizer):
    trained = []
    for own in ({}, {"critic": 0.0}):
        policy = build()
        learner = make_learner(policy, optimizer=optimizer, learning_rates=own)
        before = copy.deepcopy(policy.state_dict())
        metrics = improve(learner, make_batch(policy), learning_rates=own)
        assert metrics["learning_rate"] == UPDATE["learning_rate"]
        assert torch.equal(policy.value_head.weight, before["value_head.weight"]) == bool(own)
        trained.append([*policy.actor_body.parameters(), *policy.action_head.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (build, "actor, critic"),
        (lambda: build(config=PolicyConfig(hidden_sizes=(8,), shared=True)), "policy"),
        (OwnPolicy, "policy"),
    ],
)
def test_a_rate_for_a_group_that_the_policy_does_not_have_is_an_error(make, groups):
    with pytest.raises(ConfigError, match=f"learning_rates has 'encoder'.* it has {groups};"):
        make_learner(make(), learning_rates={"encoder": 1e-3})


def rates_and_kls(learner, policy, updates, **update):
    """The learning rate and the KL of every update of one epoch of one minibatch."""
    found = []
    for number in range(updates):
        metrics = improve(learner, make_batch(policy, seed=number), number, **update)
        found.append((metrics["learning_rate"], metrics["approx_kl"]))
    return found


@pytest.mark.parametrize("make", [build, lambda: eager(build())])
def test_the_learning_rate_follows_the_kl_of_the_update_before(make):
    policy = make()
    learner = make_learner(policy, num_epochs=1, minibatch_size=48, adaptive_kl=0.005)
    found = rates_and_kls(learner, policy, 12)
    assert found[0][0] == UPDATE["learning_rate"]
    for (rate, kl), (after, _) in itertools.pairwise(found):
        factor = 1 / 1.5 if kl > 0.01 else 1.5 if kl < 0.0025 else 1.0
        assert after == pytest.approx(rate * factor)


def test_the_kl_of_an_update_is_that_of_its_last_epoch():
    # The first epoch starts at ratio 1, and its KL is next to nothing.
    kls = {}
    for epochs in (1, 6):
        policy = build()
        learner = make_learner(policy, num_epochs=epochs, minibatch_size=48)
        batch = make_batch(policy, log_ratios=0.0)
        kls[epochs] = improve(learner, batch, learning_rate=1e-2)["approx_kl"]
    assert kls[1] == pytest.approx(0.0, abs=1e-6)
    mean = kls[6]
    for desired, scale in [(mean * 0.55, 1 / 1.5), (mean * 100, 1.5)]:
        policy = build()
        learner = make_learner(policy, num_epochs=6, minibatch_size=48, adaptive_kl=desired)
        batch = make_batch(policy, log_ratios=0.0)
        improve(learner, batch, learning_rate=1e-2)
        # 2 * 0.55 of the mean is more than the mean, but less than the last.
        assert learner.state_dict()["learning_rate_scale"] == pytest.approx(scale)


def test_the_rates_of_all_groups_are_scaled():
    ends = []
    for scale, adaptive in ((2.0, 1e6), (1.0, None)):
        policy = build()
        learner = make_learner(policy, adaptive_kl=adaptive, learning_rates=["critic"])
        if adaptive:
            state = learner.state_dict()
            state["learning_rate_scale"].fill_(scale)
            learner.load_state_dict(state)
        rates = {"learning_rate": 1e-3 / scale, "learning_rates": {"critic": 3e-3 / scale}}
        assert improve(learner, make_batch(policy), **rates)["learning_rate"] == 1e-3
        ends.append(parameters(policy))
    assert torch.equal(*ends)


def test_an_adaptive_rate_goes_on_from_its_state_dict_and_is_not_moved_by_a_failure():
    policy = build()
    learner = make_learner(policy, adaptive_kl=1e6)
    improve(learner, make_batch(policy))
    assert learner.state_dict()["learning_rate_scale"] == 1.5
    batch = make_batch(policy)
    with pytest.raises(NonFiniteError):
        improve(learner, batch.replace(returns=batch.returns * torch.nan))
    assert learner.state_dict()["learning_rate_scale"] == 1.5
    other = make_learner(build(), adaptive_kl=1e6)
    other.load_state_dict(learner.state_dict())
    assert improve(other, batch)["learning_rate"] == 1.5 * UPDATE["learning_rate"]

    before = learner.state_dict()
    del before["learning_rate_scale"]  # as a file from before there was one
    other.load_state_dict(before)
    assert improve(other, batch)["learning_rate"] == UPDATE["learning_rate"]


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e9, math.nan, math.inf])
def test_a_scale_out_of_bounds_is_refused_whole(scale):
    policy = build()
    learner = make_learner(policy, adaptive_kl=1e6)
    for number in range(8):
        improve(learner, make_batch(policy, seed=number))
    before = parts(policy, learner)
    assert before["optimizer.learning_rate_scale"] == MAX_SCALE
    state = {name: tensor + 1.0 for name, tensor in learner.state_dict().items()}
    state["learning_rate_scale"] = torch.tensor(scale)
    with pytest.raises(ValueError, match="learning_rate_scale is"):
        learner.load_state_dict(state)
    assert_bitwise_equal(parts(policy, learner), before)


def test_without_an_adaptive_rate_the_state_is_that_of_the_optimizer():
    policy = build()
    learner = make_learner(policy)
    improve(learner, make_batch(policy))
    assert {name.partition(".")[2] for name in learner.state_dict()} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


@pytest.mark.parametrize(("features", "wanted"), [(4, 0), (2048, 1)])
def test_only_a_large_policy_lets_the_process_keep_what_it_frees(features, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(learner_module, "keep_freed_memory", lambda: calls.append(1))
    space = spaces.Box(0, 255, (36, 36), np.uint8)
    config = PolicyConfig(hidden_sizes=(), cnn_features=features, shared=True)
    make_learner(make_policy(space, DISCRETE, config))
    assert len(calls) == wanted
