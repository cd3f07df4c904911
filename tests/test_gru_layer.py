"""A GRU in one operation is torch's GRU: outputs, gradients, and wherever it does not apply."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, seeds
from torch import nn

from ppo.policies.gru_layer import _WIDEST, GRULayer
from ppo.recording import Tape

FLOATS = [torch.float32, torch.float64]
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 0, "atol": 1e-12},
}


class Case:
    """A layer, torch's with the same weights, sequences and the states they begin with."""

    def __init__(self, length, count, width, size, dtype=torch.float64, seed=0):
        self.rng = np.random.default_rng(seed)
        self.ours = GRULayer(width, size).to(dtype)
        self.torchs = nn.GRU(width, size).to(dtype)
        with torch.no_grad():
            for parameter in self.ours.parameters():
                parameter.copy_(self.normal(*parameter.shape))
        self.torchs.load_state_dict(self.ours.state_dict())
        self.inputs = self.normal(length, count, width).to(dtype).requires_grad_()
        self.start = self.normal(1, count, size).to(dtype).requires_grad_()
        self.slopes = self.normal(length, count, size).to(dtype), self.normal(count, size).to(dtype)

    def normal(self, *shape):
        return torch.from_numpy(self.rng.normal(size=shape) / shape[-1] ** 0.5)

    def computed_by(self, layer):
        """Outputs, last states, and the gradients of all that went in."""
        outputs, last = layer(self.inputs, self.start)
        of_outputs, of_last = self.slopes
        loss = (outputs * of_outputs).sum() + (last[0] * of_last).sum()
        sources = [self.inputs, self.start, *layer.parameters()]
        return [outputs, last, *torch.autograd.grad(loss, sources)]

    def check(self):
        ours, wanted = self.computed_by(self.ours), self.computed_by(self.torchs)
        for found, truth in zip(ours, wanted, strict=True):
            scale = truth.abs().max().clamp(min=1.0)
            torch.testing.assert_close(
                found / scale, truth / scale, **TOLERANCES[self.inputs.dtype]
            )


sizes = st.integers(1, 9)


@law
@given(sizes, sizes, sizes, sizes, st.sampled_from(FLOATS), seeds)
def test_it_is_torchs_gru_with_its_gradients(length, count, width, size, dtype, seed):
    Case(length, count, width, size, dtype, seed).check()


@pytest.mark.parametrize("count", [1, 2, 70])
def test_products_that_torch_computes_are_the_same(count):
    Case(4, count, 100, _WIDEST).check()


def test_the_gradients_are_the_differences_and_so_are_the_second_ones():
    case = Case(3, 2, 3, 4)
    weights = [p.detach().requires_grad_() for p in case.ours.parameters()]
    names = [name for name, _ in case.ours.named_parameters()]

    def outputs(inputs, start, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(case.ours, given, (inputs, start))[0]

    assert torch.autograd.gradcheck(outputs, (case.inputs, case.start, *weights))
    assert torch.autograd.gradgradcheck(outputs, (case.inputs, case.start, *weights))


def test_second_gradients_need_only_what_is_asked_for():
    case = Case(3, 2, 3, 4)
    found = []
    for layer in (case.ours, case.torchs):
        (slope,) = torch.autograd.grad(
            layer(case.inputs, case.start.detach())[0].sum(), case.inputs, create_graph=True
        )
        found.append(torch.autograd.grad(slope.square().sum(), case.inputs)[0])
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-12)


def test_gradients_by_function_transforms_are_the_same():
    case = Case(3, 2, 3, 4)

    def gradients(layer):
        def loss(weights):
            outputs, _ = torch.func.functional_call(layer, weights, (case.inputs, case.start))
            return outputs.square().sum()

        return torch.func.grad(loss)(dict(layer.named_parameters()))

    torch.testing.assert_close(gradients(case.ours), gradients(case.torchs), rtol=0.0, atol=1e-12)


def test_the_operators_keep_torchs_rules():
    case = Case(3, 2, 3, 4)
    tensors = [case.inputs, case.start[0], *case.ours.parameters()]
    args = tuple(tensor.detach() for tensor in tensors)
    x, _, w, u, *_ = args
    outputs, hidden, gates = torch.ops.ppo.gru_layer.default(*args)
    torch.library.opcheck(torch.ops.ppo.gru_layer.default, args)
    torch.library.opcheck(
        torch.ops.ppo.gru_layer_backward.default, (outputs, x, w, u, hidden, gates)
    )


def recorded(case):
    """What goes in, the outputs with the gradients, and the programs of both."""
    sources, slopes = [case.inputs, case.start, *case.ours.parameters()], case.slopes[0]
    tape = Tape([*sources, slopes])
    with tape.record():
        outputs, _ = case.ours(case.inputs, case.start)
    with tape.record():
        gradients = torch.autograd.grad((outputs * slopes).sum(), sources)
    results = [outputs, *gradients]
    return [*sources, slopes], results, tape.programs(only=results)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_recording_computes_the_same_bit_for_bit(dtype):
    case = Case(5, 3, 4, 6, dtype)
    sources, results, programs = recorded(case)
    with torch.no_grad():
        for source in sources:
            source.copy_(case.normal(*source.shape))
    for program in programs * 2:
        program()
    outputs, _ = case.ours(case.inputs, case.start)
    wanted = torch.autograd.grad((outputs * case.slopes[0]).sum(), sources[:-1])
    assert all(torch.equal(*pair) for pair in zip(results, [outputs, *wanted], strict=True))


def test_a_recording_has_no_more_steps_for_longer_sequences():
    short, long = ([len(p) for p in recorded(Case(n, 3, 4, 6))[2]] for n in (1, 20))
    assert short == long
    assert long[0] == 1


def test_inputs_need_not_be_contiguous():
    case = Case(3, 4, 5, 6)
    turned = case.inputs.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(case.ours(turned, case.start)[0], case.ours(case.inputs, case.start)[0])


def test_what_is_not_finite_stays_in_its_sequence_and_warns_of_nothing():
    case = Case(4, 3, 2, 5)
    before = case.ours(case.inputs, case.start)[0]
    with torch.no_grad():
        case.inputs[1, 0, 0], case.inputs[2, 1, 1] = torch.nan, torch.inf
    ours, wanted = (layer(case.inputs, case.start)[0] for layer in (case.ours, case.torchs))
    torch.testing.assert_close(ours, wanted, equal_nan=True)
    assert torch.equal(ours[:, 2], before[:, 2])
    ours[:, 2].sum().backward()


def as_it_comes(layer, case):
    return layer(case.inputs, case.start)


def in_half_precision(layer, case):
    return layer.bfloat16()(case.inputs.bfloat16(), case.start.bfloat16())


def under_autocast(layer, case):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(case.inputs, case.start)


def of_one_sequence(layer, case):
    return layer(case.inputs[:, 0], case.start[:, 0])


def from_nothing(layer, case):
    return layer(case.inputs)


def packed(layer, case):
    lengths = [case.inputs.shape[0]] * case.inputs.shape[1]
    outputs, last = layer(nn.utils.rnn.pack_padded_sequence(case.inputs, lengths), case.start)
    return outputs.data, last


def without_values(layer, case):
    return layer.to("meta")(case.inputs.to("meta"), case.start.to("meta"))


@pytest.mark.parametrize(
    ("call", "size"),
    [
        (as_it_comes, _WIDEST + 1),
        (in_half_precision, 4),
        (under_autocast, 4),
        (of_one_sequence, 4),
        (from_nothing, 4),
        (packed, 4),
        (without_values, 4),
    ],
)
def test_elsewhere_it_is_torchs_own(call, size, monkeypatch):
    case, calls = Case(3, 2, 3, size, torch.float32), []
    torchs = nn.GRU.forward

    def counted(self, *args):
        calls.append(self)
        return torchs(self, *args)

    monkeypatch.setattr(nn.GRU, "forward", counted)
    ours, wanted = call(case.ours, case), call(case.torchs, case)
    assert calls == [case.ours, case.torchs]
    for found, truth in zip(ours, wanted, strict=True):
        assert (found.dtype, found.shape) == (truth.dtype, truth.shape)
        assert truth.is_meta or torch.equal(found, truth)


@pytest.mark.parametrize(("width", "count"), [(4, 2), (3, 5)], ids=["width", "states"])
def test_shapes_that_do_not_fit_are_refused_by_torch(width, count):
    with pytest.raises(RuntimeError, match=r"(?i)expected|must be equal"):
        GRULayer(3, 8)(torch.ones(5, 2, width), torch.zeros(1, count, 8))
