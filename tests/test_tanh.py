"""`Tanh`: the numbers of PyTorch's operation, with and without gradients, and wherever it looks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ppo import PolicyConfig, RolloutCollector, make_policy
from ppo.policies import tanh
from ppo.policies.bodies import MLP
from ppo.policies.tanh import Tanh

MANY = (65, 64)


def counted(monkeypatch):
    """A list that grows whenever NumPy is asked."""
    calls, plain = [], tanh._numpy_tanh
    monkeypatch.setattr(tanh, "_numpy_tanh", lambda inputs: calls.append(1) or plain(inputs))
    return calls


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_the_numbers_are_those_of_torch(numbers):
    inputs = torch.tensor(numbers).repeat(5000)
    wanted = torch.tanh(inputs.double()).float()
    assert torch.allclose(Tanh()(inputs), wanted, rtol=4e-7, atol=0.0)


def test_special_numbers():
    inputs = torch.tensor([0.0, -0.0, 1e-40, torch.inf, -torch.inf, torch.nan])
    outputs = Tanh()(inputs.repeat(1000))[-6:]
    assert torch.equal(outputs[:2].signbit(), inputs[:2].signbit())
    assert outputs[3:5].tolist() == [1.0, -1.0]
    assert outputs[5].isnan()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5000,), MANY, (20, 30, 40)])
def test_shapes_and_orders_in_memory(shape):
    inputs = torch.randn(shape)
    outputs = Tanh()(inputs)
    assert outputs.shape == shape
    if len(shape) > 1:
        turned = Tanh()(inputs.mT)
        assert turned.stride() == inputs.mT.stride()
        assert torch.equal(turned.mT, outputs)


def test_numbers_do_not_depend_on_gradients(monkeypatch):
    calls = counted(monkeypatch)
    inputs = torch.randn(MANY)
    plain = Tanh()(inputs)
    wanting = Tanh()(inputs.clone().requires_grad_())
    with torch.no_grad():
        unwanted = Tanh()(inputs.clone().requires_grad_())
    with torch.inference_mode():
        inferred = Tanh()(inputs.clone())
    assert torch.equal(plain, wanting)
    assert torch.equal(plain, unwanted)
    assert torch.equal(plain, inferred)
    assert (plain.requires_grad, wanting.requires_grad, unwanted.requires_grad) == (0, 1, 0)
    assert len(calls) == 4


def test_gradients_are_those_of_torch():
    inputs, slopes = torch.randn(MANY), torch.randn(MANY)
    ours, theirs = (inputs.clone().requires_grad_() for _ in range(2))
    outputs = Tanh()(ours)
    outputs.backward(slopes)
    torch.tanh(theirs).backward(slopes)
    assert torch.equal(ours.grad, torch.ops.aten.tanh_backward(slopes, outputs.detach()))
    assert torch.allclose(ours.grad, theirs.grad, rtol=0.0, atol=1e-6)


def test_second_derivatives():
    found = []
    for function in (Tanh(), torch.tanh):
        inputs = torch.linspace(-2.0, 2.0, 4097).requires_grad_()
        (slope,) = torch.autograd.grad(function(inputs).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(slope.sum(), inputs)[0])
    assert found[0].abs().max() > 0.5
    assert torch.allclose(*found, rtol=0.0, atol=1e-6)


class Names(TorchDispatchMode):
    """The operations that were called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_who_looks_at_operations_sees_torch(monkeypatch):
    calls = counted(monkeypatch)
    inputs = torch.randn(MANY)
    with Names() as names:
        Tanh()(inputs)
    assert names.seen == [torch.ops.aten.tanh.default]
    assert torch.ops.aten.tanh.default in [
        node.target for node in make_fx(Tanh())(inputs).graph.nodes
    ]
    traced = torch.jit.trace(Tanh(), inputs, check_trace=False)
    assert "aten::tanh" in str(traced.graph)
    exported = torch.export.export(Tanh(), (inputs,))
    assert torch.ops.aten.tanh.default in [node.target for node in exported.graph.nodes]
    assert not calls
    assert torch.allclose(traced(2.0 * inputs), torch.tanh(2.0 * inputs))


def test_scripts():
    layers = torch.jit.script(MLP(3, (4,), "tanh", torch.Generator().manual_seed(0)))
    inputs = torch.randn(2000, 3)
    assert torch.allclose(layers(inputs), torch.tanh(layers[1](inputs)))


def test_transforms(monkeypatch):
    calls = counted(monkeypatch)
    inputs = torch.randn(65, 5000)
    slopes = torch.func.vmap(torch.func.grad(lambda row: Tanh()(row).sum()))(inputs)
    assert torch.allclose(slopes, 1.0 - torch.tanh(inputs) ** 2, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(Tanh())(inputs), torch.tanh(inputs))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs, torch.ones_like(inputs))
        tangent = forward_ad.unpack_dual(Tanh()(dual)).tangent
    assert torch.allclose(tangent, 1.0 - torch.tanh(inputs) ** 2, atol=1e-6)
    assert not calls


@pytest.mark.parametrize(("count", "asked"), [(4096, 0), (4097, 1)])
def test_few_numbers_are_left_to_torch(monkeypatch, count, asked):
    calls = counted(monkeypatch)
    inputs = torch.randn(count)
    assert torch.allclose(Tanh()(inputs), torch.tanh(inputs), rtol=4e-7)
    assert len(calls) == asked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_left_to_torch(monkeypatch, dtype):
    calls = counted(monkeypatch)
    inputs = torch.randn(MANY).to(dtype)
    assert torch.equal(Tanh()(inputs), torch.tanh(inputs))
    assert not calls


def test_shapes_without_memory():
    assert Tanh()(torch.empty(MANY, device="meta")).device.type == "meta"


def test_parameters_as_inputs():
    inputs = nn.Parameter(torch.randn(MANY))
    Tanh()(inputs).sum().backward()
    assert torch.allclose(inputs.grad, 1.0 - torch.tanh(inputs.detach()) ** 2, atol=1e-6)


def test_copies():
    for layer in (copy.deepcopy(Tanh()), pickle.loads(pickle.dumps(Tanh()))):
        assert type(layer) is Tanh
        assert not layer.state_dict()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_what_a_rollout_says_is_what_learning_is_told(monkeypatch, env_id):
    """With gradients and without, and by NumPy, as the recorded gradient does."""
    calls = counted(monkeypatch)
    with RolloutCollector(env_id, num_envs=2, seed=0) as collector:
        spaces = collector.observation_space, collector.action_space
        policy = make_policy(*spaces, PolicyConfig(activation="tanh"))
        rollout = collector.collect(policy, 70)
    assert len(calls) == 4  # two layers of two networks; the last successors are few
    flat = rollout.flatten()
    found = policy.evaluate(flat.obs, flat.actions)
    assert found.log_probs.requires_grad
    assert torch.equal(found.log_probs, flat.log_probs)
    assert torch.equal(found.values, rollout.values.flatten())


def test_numpy_takes_each_number_by_itself():
    """Vector instructions take many at once; what comes of one must not depend on its place."""
    inputs = np.random.default_rng(0).standard_normal((65, 64)).astype(np.float32) * 3.0
    whole = np.tanh(inputs)
    for rows in (1, 2, 7, 33):
        assert np.array_equal(np.tanh(inputs[:rows].copy()), whole[:rows])
    assert np.array_equal(np.tanh(inputs[:, 1:].copy()), whole[:, 1:])
    assert np.array_equal(np.tanh(inputs.T), whole.T)
