import copy
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import (
    assert_bitwise_equal,
    build,
    improve,
    make_batch,
    make_learner,
    parts,
)
from strategies import seeds
from torch import nn

from ppo.learner.flat_adam import FlatAdam


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
        assert norm == pytest.approx(math.hypot(*(float(n) for n in norms)), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("rates", [1e-2, [1e-2, 3e-3]])
def test_weight_decay_is_decoupled_and_every_network_has_its_rate(weight_decay, rates):
    layers, groups = groups_of_layers()
    before = [p.detach().double().reshape(-1).tolist() for p in layers.parameters()]
    flat = FlatAdam(groups, 1e-5, weight_decay)
    generator = torch.Generator().manual_seed(0)
    gradients = [[] for _ in before]
    for _ in range(5):
        for parameter, history in zip(layers.parameters(), gradients, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad.copy_(gradient)
            history.append(gradient.double().reshape(-1).tolist())
        flat.step(rates, 1e6)
    for number, parameter in enumerate(layers.parameters()):
        rate = rates if isinstance(rates, float) else rates[number >= 4]
        wanted = reference.weight_decayed_adam(
            before[number], gradients[number], rate, weight_decay, 1e-5
        )
        np.testing.assert_allclose(parameter.detach().reshape(-1), wanted, rtol=1e-5, atol=1e-6)


def test_one_rate_for_all_is_one_number():
    _, groups = groups_of_layers()
    flat = FlatAdam(groups, 1e-5)
    assert flat.rates(1e-3, {}) == flat.rates(1e-3, {"critic": 1e-3}) == 1e-3
    assert flat.rates(5.0, {"actor": 1e-3, "critic": 1e-3}) == 1e-3
    assert flat.rates(1e-3, {"critic": 1e-2}) == [1e-3, 1e-2]


def test_the_parts_of_a_network_of_two_dtypes_share_its_rate():
    both = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]
    flat = FlatAdam({"both": both, "other": [nn.Parameter(torch.ones(3))]}, 1e-5)
    rates = dict(zip(flat.names, flat.rates(0.1, {"both": 0.2}), strict=True))
    assert rates == {"both": 0.2, "both1": 0.2, "other": 0.1}


def test_equal_rates_given_one_by_one_change_no_bit():
    trained = []
    for rates in (1e-2, [1e-2, 1e-2]):
        layers, groups = groups_of_layers()
        flat = FlatAdam(groups, 1e-5)
        for number, gradient in enumerate(flat.gradients):
            gradient.fill_(0.5 + number)
        flat.step(rates, 0.1)
        trained.append(dict(layers.state_dict()))
    assert_bitwise_equal(*trained)


def test_flat_adam_moves_parameters_into_one_vector_without_changing_them():
    layers, groups = groups_of_layers()
    before = [p.detach().clone() for p in layers.parameters()]
    objects = list(layers.parameters())
    flat = FlatAdam(groups, 1e-5)
    assert all(p is q for p, q in zip(layers.parameters(), objects, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(layers.parameters(), before, strict=True))
    assert sum(map(len, flat.parameters)) == sum(p.numel() for p in before)
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


def train(policy, learner, numbers):
    for number in numbers:
        improve(learner, make_batch(policy, seed=number), number)


def moments(learner):
    """Both moments of every parameter, by the parameter's id."""
    adam = learner._optimizer
    return {
        id(p): torch.stack(state).clone()
        for p, *state in adam._split(adam._exp_avg, adam._exp_avg_sq)
    }


def test_the_moments_of_what_is_frozen_and_released_leave_all_others_alone():
    policy = build()
    learner = make_learner(policy)
    train(policy, learner, range(2))
    before = moments(learner)
    body = {id(parameter) for parameter in policy.actor_body.parameters()}
    policy.actor_body.requires_grad_(False)
    learner._take_up_changes()
    assert moments(learner).keys() == before.keys() - body
    assert all(torch.equal(state, before[key]) for key, state in moments(learner).items())
    assert {*itertools.chain(*learner._optimizer.step_counts)} == {
        18.0
    }  # 2 updates, 3 epochs, 3 minibatches

    train(policy, learner, range(2, 4))
    frozen = moments(learner)
    policy.actor_body.requires_grad_(True)
    learner._take_up_changes()
    for key, state in moments(learner).items():
        assert torch.equal(state, torch.zeros_like(state) if key in body else frozen[key])
    counts = zip(
        learner._optimizer.members, itertools.chain(*learner._optimizer.step_counts), strict=True
    )
    assert all(count == (0.0 if id(p) in body else 36.0) for p, count in counts)


def test_a_part_frozen_from_elsewhere_does_not_change_how_the_rest_learns():
    trained = []
    for freeze in (False, True):
        policy = build()
        learner = make_learner(policy)
        train(policy, learner, range(2))
        if freeze:
            policy.actor_body.requires_grad_(False)
            policy.action_head.requires_grad_(False)
        train(policy, learner, range(2, 4))
        critic = [*policy.critic_body.parameters(), *policy.value_head.parameters()]
        trained.append({str(number): p.detach().clone() for number, p in enumerate(critic)})
    # Actor and critic share nothing, so the critic's steps are those it would have taken.
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-5, atol=1e-6)


def test_a_parameter_exchanged_for_another_starts_without_moments():
    policy = build()
    learner = make_learner(policy)
    train(policy, learner, range(2))
    before = moments(learner)
    policy.value_head = nn.Linear(8, 1)
    learner._take_up_changes()
    new = {id(parameter) for parameter in policy.value_head.parameters()}
    for key, state in moments(learner).items():
        assert torch.equal(state, torch.zeros_like(state) if key in new else before[key])


def step_both(layers, twins, flat, adam, generator, max_norm=0.5):
    """One step with the same gradients of what is trained, by this optimizer and by torch's."""
    for one, other in zip(layers.parameters(), twins.parameters(), strict=True):
        gradient = torch.randn(one.shape, generator=generator)
        other.grad = gradient if other.requires_grad else None
        if one.requires_grad:
            one.grad.copy_(gradient)
    flat.step(1e-2, max_norm)
    for own in (twins[:2], twins[2:]):
        nn.utils.clip_grad_norm_([p for p in own.parameters() if p.requires_grad], max_norm)
    adam.step()


@pytest.mark.parametrize("change", ["freeze", "replace"])
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_released_or_replaced_learns_as_in_torch(change, saved):
    (layers, _), (twins, _) = groups_of_layers(), groups_of_layers()

    def regroup():
        return {"actor": [*layers[:2].parameters()], "critic": [*layers[2].parameters()]}

    adam = torch.optim.Adam(twins.parameters(), lr=1e-2, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    for part in (layers, twins):
        part[0].weight.requires_grad_(change != "freeze")
    flat = FlatAdam(regroup(), 1e-5)
    for _ in range(50):
        step_both(layers, twins, flat, adam, generator)
    if change == "freeze":
        for part in (layers, twins):
            part[0].weight.requires_grad_(True)
    else:
        weight = torch.randn(5, 3, generator=generator)
        layers[0].weight, twins[0].weight = (nn.Parameter(weight.clone()) for _ in range(2))
        adam.param_groups[0]["params"][0] = twins[0].weight
    start = layers[0].weight.detach().clone()
    heir = FlatAdam(regroup(), 1e-5)
    heir.take_over(flat)
    for number in range(10):
        if saved and number == 5:
            state = heir.state_dict()
            assert state["actor.step"].tolist() == [5.0, 55.0, 55.0, 55.0]
            assert state["critic.step"].tolist() == 55.0
            heir = FlatAdam(regroup(), 1e-5)
            heir.load_state_dict(state)
            assert_bitwise_equal(heir.state_dict(), state)
        step_both(layers, twins, heir, adam, generator)
    for one, other in zip(layers.parameters(), twins.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 0.0 < (layers[0].weight - start).abs().max() <= 0.101  # 10 steps of 0.01


def test_one_count_for_a_network_is_read_for_all_its_parameters():
    _, groups = groups_of_layers()
    flat = FlatAdam(groups, 1e-5)
    state = flat.state_dict()
    assert state["actor.step"].shape == ()
    flat.load_state_dict(state | {"actor.step": torch.full((4,), 3.0)})
    assert flat.state_dict()["actor.step"].tolist() == 3.0  # one count, so one number
    flat.load_state_dict(state | {"actor.step": torch.tensor([3.0, 1.0, 1.0, 2.0])})
    assert flat.step_counts == [[3.0, 1.0, 1.0, 2.0], [0.0, 0.0]]
    before = flat.state_dict()
    with pytest.raises(ValueError, match="optimizer state"):
        flat.load_state_dict(state | {"actor.step": torch.zeros(3)})
    assert_bitwise_equal(flat.state_dict(), before)


def test_spans_of_equal_counts_are_bit_for_bit_the_whole_vector():
    """Without a change nothing is cut; and where it is, every number is as it would be."""
    trained = []
    for cut in (False, True):
        policy = build()
        learner = make_learner(policy)
        train(policy, learner, range(2))
        adam = learner._optimizer
        if cut:
            counts = adam.step_counts
            adam.step_counts = [[*range(len(own))] for own in counts]
            assert len(adam._whole[0]) == sum(map(len, counts))
            adam.step_counts = counts
        assert len(adam._whole[0]) == len(adam.names)
        train(policy, learner, range(2, 4))
        trained.append(parts(policy, learner))
    assert_bitwise_equal(*trained)
