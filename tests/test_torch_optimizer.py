import copy
import math

import pytest
import torch
from small_policies import assert_bitwise_equal, build, improve, make_batch, make_learner, parts
from torch import nn

from ppo.errors import ConfigError, NonFiniteError
from ppo.learner.torch_optimizer import (
    UNFIT,
    TorchOptimizer,
    check_options,
    check_parameters,
    optimizer_names,
)

KINDS = {name: (name, {}) for name in optimizer_names()} | {
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "centred": ("RMSprop", {"centered": True, "momentum": 0.9, "alpha": 0.9}),
    "amsgrad": ("AdamW", {"amsgrad": True, "betas": [0.8, 0.9]}),
    "factored": ("Adafactor", {"weight_decay": 0.1, "beta2_decay": -0.5}),
}
HAS_MUON = "Muon" in optimizer_names()
if HAS_MUON:
    KINDS["orthogonal"] = ("Muon", {"momentum": 0.5, "adjust_lr_fn": "match_rms_adamw"})
each = pytest.mark.parametrize(("name", "options"), KINDS.values(), ids=KINDS)
SLOW = {"Adadelta": 1.0, "Rprop": 1e-2}  # what these take for an ordinary step
BY_SHAPE = [(name, options) for name, options in KINDS.values() if name in ("Adafactor", "Muon")]


def learner_with(policy, name, options, **settings):
    return make_learner(policy, optimizer=name, optimizer_kwargs=options, **settings)


def fits(name, parameter):
    return name != "Muon" or parameter.ndim == 2


def policy_for(name, seed=0):
    policy = build(seed=seed)
    for parameter in policy.parameters():
        parameter.requires_grad_(fits(name, parameter))
    return policy


def small_networks(name):
    torch.manual_seed(0)
    sizes = [(3, 5), (5, 2), (3, 1)]
    layers = nn.ModuleList([nn.Linear(*size, bias=name != "Muon") for size in sizes])
    actor = [*layers[0].parameters(), *layers[1].parameters()]
    return layers, {"actor": actor, "critic": [*layers[2].parameters()]}


def test_every_optimizer_of_torch_is_offered_or_refused_with_a_reason():
    kinds = {
        name
        for name in torch.optim.__all__
        if isinstance(getattr(torch.optim, name), type) and name != "Optimizer"
    }
    assert kinds == {*optimizer_names(), *UNFIT}
    assert len(optimizer_names()) >= 10


@each
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_a_vector_is_stepped_as_its_parameters_would_be(name, options, max_norm):
    ours, our_groups = small_networks(name)
    theirs, their_groups = small_networks(name)
    before = [p.detach().clone() for p in theirs.parameters()]
    flat = TorchOptimizer(our_groups, name, options)
    plain = getattr(torch.optim, name)(
        [{"params": members} for members in their_groups.values()], lr=0.0, **options
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            gradient = torch.randn(one.shape, generator=generator) * 10 ** (step % 3 - 1)
            one.grad.copy_(gradient)
            other.grad = gradient.clone()
        rates = [1e-2 / (step + 1), 1e-3]
        norm = flat.step(rates, max_norm)
        norms = [nn.utils.clip_grad_norm_(group, max_norm) for group in their_groups.values()]
        for group, rate in zip(plain.param_groups, rates, strict=True):
            group["lr"] = rate
        plain.step()
        assert norm == pytest.approx(math.hypot(*(float(n) for n in norms)), rel=1e-5)
    for one, other, start in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(one, start)


@each
def test_it_goes_on_exactly_from_its_state_dict(name, options):
    trained = []
    for interrupted in (False, True):
        policy = policy_for(name, seed=3)
        learner = learner_with(policy, name, options)
        improve(learner, make_batch(policy, seed=1))
        if interrupted:
            state, weights = learner.state_dict(), copy.deepcopy(policy.state_dict())
            improve(learner, make_batch(policy, seed=9))  # must not reach into the copies
            policy = policy_for(name, seed=4)
            policy.load_state_dict(weights)
            learner = learner_with(policy, name, options)
            learner.load_state_dict(state)
        improve(learner, make_batch(policy, seed=2))
        trained.append(parts(policy, learner))
    assert_bitwise_equal(*trained)


@each
@pytest.mark.parametrize("updates", [0, 1])
def test_a_failed_update_changes_nothing(name, options, updates):
    policy = policy_for(name)
    learner = learner_with(policy, name, options)
    for number in range(updates):
        improve(learner, make_batch(policy, seed=number))
    before = parts(policy, learner)
    batch = make_batch(policy, seed=5)
    bad = batch.returns.clone()
    bad[-1] = torch.nan
    with pytest.raises(NonFiniteError):
        improve(learner, batch.replace(returns=bad))
    assert_bitwise_equal(parts(policy, learner), before)
    trained = []
    for one in (policy, policy_for(name)):
        own = learner if one is policy else learner_with(one, name, options)
        for number in range(updates if one is not policy else 0):
            improve(own, make_batch(one, seed=number))
        improve(own, batch)
        trained.append(parts(one, own))
    assert_bitwise_equal(*trained)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("actor.momentum_buffer"),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({"critic.momentum_buffer": torch.zeros(3)}),
        lambda state: state.update({"critic.exp_avg": state.pop("critic.momentum_buffer")}),
    ],
)
def test_the_state_of_another_optimizer_is_refused_whole(damage):
    policy = build()
    learner = learner_with(policy, "SGD", {"momentum": 0.9})
    improve(learner, make_batch(policy))
    before = parts(policy, learner)
    assert {"optimizer.actor.momentum_buffer", "optimizer.critic.momentum_buffer"} <= before.keys()
    state = {name: tensor + 1.0 for name, tensor in learner.state_dict().items()}
    damage(state)
    with pytest.raises(ValueError, match="optimizer state"):
        learner.load_state_dict(state)
    assert_bitwise_equal(parts(policy, learner), before)


def kept(learner):
    """What the optimizer keeps of every parameter, by the parameter's id."""
    optimizer = learner._optimizer
    states = optimizer._by_parameter(optimizer._states())
    return {key: {kind: x.clone() for kind, x in state.items()} for key, state in states}


@each
def test_what_is_frozen_and_released_leaves_all_others_alone(name, options):
    policy = policy_for(name)
    learner = learner_with(policy, name, options)
    rate = SLOW.get(name, 1e-3)
    improve(learner, make_batch(policy), learning_rate=rate)
    before = kept(learner)
    body = [parameter for parameter in policy.actor_body.parameters() if fits(name, parameter)]
    policy.actor_body.requires_grad_(False)
    learner._take_up_changes()
    assert kept(learner).keys() == before.keys() - set(map(id, body))
    for key, state in kept(learner).items():
        assert_bitwise_equal(state, before[key])

    frozen = policy.actor_body.state_dict()
    weights = {key: tensor.clone() for key, tensor in frozen.items()}
    improve(learner, make_batch(policy, seed=1), learning_rate=rate)
    assert_bitwise_equal(policy.actor_body.state_dict(), weights)
    held = kept(learner)
    for parameter in body:
        parameter.requires_grad_(True)
    learner._take_up_changes()
    after = kept(learner)
    assert after.keys() == before.keys()
    for key, state in held.items():
        assert_bitwise_equal(after[key], state)
    improve(learner, make_batch(policy, seed=2), learning_rate=rate)
    assert not torch.equal(policy.actor_body[1].weight, weights["1.weight"])


@pytest.mark.parametrize(("name", "options"), BY_SHAPE)
def test_one_that_looks_at_shapes_keeps_a_state_of_every_parameter(name, options):
    policy = policy_for(name)
    learner = learner_with(policy, name, options)
    improve(learner, make_batch(policy))
    groups = policy.parameter_groups()
    state = learner.state_dict()
    numbers = {
        group: {key.split(".")[1] for key in state if key.startswith(group)} for group in groups
    }
    for group, members in groups.items():
        assert len(numbers[group]) == sum(parameter.requires_grad for parameter in members)
    # Released, a parameter begins anew, whatever the others have counted.
    weight = policy.actor_body[1].weight
    weight.requires_grad_(False)
    improve(learner, make_batch(policy))
    weight.requires_grad_(True)
    learner._take_up_changes()
    for kind, tensor in kept(learner)[id(weight)].items():
        assert not tensor.any(), kind


@pytest.mark.parametrize("name", ["Adafactor", "SGD"])
def test_a_parameter_of_no_dimension_is_taken_over_like_any_other(name):
    alone, other = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(2, 2))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = TorchOptimizer({"all": [alone, other]}, name, options)
    alone.grad.fill_(3.0)
    other.grad.fill_(5.0)
    optimizer.step(1e-3, 1e6)
    heir = TorchOptimizer({"all": [alone, other]}, name, options)
    heir.take_over(optimizer)
    assert_bitwise_equal(heir.state_dict(), optimizer.state_dict())
    assert any((tensor != 0).any() for tensor in heir.state_dict().values())


@pytest.mark.parametrize("name", ["Adafactor", "SGD"])
def test_gradients_and_parameters_in_their_shapes_are_those_of_the_flat_vectors(name):
    layers, groups = small_networks(name)
    optimizer = TorchOptimizer(groups, name, {})
    before = [vector.clone() for vector in optimizer.parameters]
    for vector in optimizer.gradients:
        vector.normal_(generator=torch.Generator().manual_seed(0))
    layers.double().float()  # what moves parameters elsewhere
    optimizer.bind()
    optimizer.step(0.1, 1e6)
    for members, vector, old in zip(optimizer.networks, optimizer.parameters, before, strict=True):
        assert not torch.equal(vector, old)
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in members]), vector)


def test_an_optimizer_that_has_not_stepped_has_nothing_to_hand_over():
    policy = build()
    learner = learner_with(policy, "SGD", {"momentum": 0.9})
    policy.actor_body.requires_grad_(False)
    learner._take_up_changes()
    assert learner.state_dict() == {}


@pytest.mark.parametrize("name", UNFIT)
def test_an_optimizer_that_needs_more_than_gradients_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=rf"{name} cannot be used here: .*take adam"):
        check_options(name, {})


@pytest.mark.skipif(not HAS_MUON, reason="PyTorch has Muon since 2.9")
def test_muon_is_refused_with_the_names_of_what_is_no_matrix():
    check_options("Muon", {"momentum": 0.9})
    policy = build()
    with pytest.raises(ConfigError, match=r"matrices only.* actor_body\.1\.bias \[8\], .*freeze"):
        learner_with(policy, "Muon", {})
    for name in ("adam", "Adafactor", "SGD"):
        check_parameters(name, policy)
    learner = learner_with(policy_for("Muon"), "Muon", {})
    learner._policy.actor_body.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"the policy has actor_body\.1\.bias \[8\]; freeze"):
        learner._take_up_changes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.1}, "learning_rate"),
        ({"momentun": 0.9}, "SGD: .*momentun"),
        ({"momentum": -1.0}, "SGD: .*momentum"),
        ({"momentum": "much"}, "SGD: "),
    ],
)
def test_options_that_the_class_does_not_take_are_refused(options, words):
    with pytest.raises(ConfigError, match=f"optimizer_kwargs .*{words}"):
        check_options("SGD", options)


def test_what_is_released_starts_at_the_present_rate():
    # Rprop keeps a step size per parameter, at first the learning rate.
    policy = build()
    policy.actor_body.requires_grad_(False)
    learner = learner_with(policy, "Rprop", {})
    improve(learner, make_batch(policy), learning_rate=0.02)
    policy.actor_body.requires_grad_(True)
    learner._take_up_changes()
    optimizer = learner._optimizer
    states = dict(optimizer._by_parameter(optimizer._states()))
    for parameter in policy.actor_body.parameters():
        assert states[id(parameter)]["step_size"].tolist() == pytest.approx(
            [0.02] * parameter.numel()
        )


# torch does not dampen the first gradient of a parameter; zeros as a start do.
NOT_DAMPENED = {kind: one for kind, one in KINDS.items() if "dampening" not in one[1]}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("name", "options"), NOT_DAMPENED.values(), ids=NOT_DAMPENED)
def test_what_is_released_or_replaced_learns_as_in_torch(name, options, saved):
    (layers, _), (twins, _) = small_networks(name), small_networks(name)

    def regroup():
        return {"actor": [*layers[:2].parameters()], "critic": [*layers[2].parameters()]}

    rate = SLOW.get(name, 1e-2)
    plain = getattr(torch.optim, name)(twins.parameters(), lr=rate, **options)
    generator = torch.Generator().manual_seed(0)

    def step():
        for one, other in zip(layers.parameters(), twins.parameters(), strict=True):
            gradient = torch.randn(one.shape, generator=generator)
            other.grad = gradient if other.requires_grad else None
            if one.requires_grad:
                one.grad.copy_(gradient)
        flat.step(rate, 1e6)
        plain.step()

    for part in (layers, twins):
        part[1].weight.requires_grad_(False)
    flat = TorchOptimizer(regroup(), name, options)
    for _ in range(30):
        step()
    for part in (layers, twins):
        part[1].weight.requires_grad_(True)
    weight = torch.randn(1, 3, generator=generator)
    layers[2].weight, twins[2].weight = (nn.Parameter(weight.clone()) for _ in range(2))
    members = plain.param_groups[0]["params"]
    members[[len(p) for p in members].index(1)] = twins[2].weight
    if name == "Adagrad":  # in older PyTorch it begins a state only when it is made
        plain.state[twins[2].weight] = {"step": torch.tensor(0.0), "sum": torch.zeros(1, 3)}
    start = layers[1].weight.detach().clone()
    heir = TorchOptimizer(regroup(), name, options)
    heir.take_over(flat)
    flat = heir
    for number in range(10):
        if saved and number == 5:
            state = flat.state_dict()
            flat = TorchOptimizer(regroup(), name, options)
            flat.load_state_dict(state)
            assert_bitwise_equal(flat.state_dict(), state)
        step()
    assert not torch.equal(layers[1].weight, start)
    for one, other in zip(layers.parameters(), twins.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
