import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import Drawn
from strategies import seeds
from torch import nn

from ppo.recording.kernels import CONSTANTS, KERNELS
from ppo.recording.tape import Tape, UnsupportedError

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _overflow_is_no_warning():
    """As wherever programs run: torch does not warn either."""
    with np.errstate(all="ignore"):
        yield


def check_program(function, inputs, *, draw=None, times=2, atol=1e-6):
    """What a program computes from new inputs is what the function computes from them."""
    tape = Tape()
    with tape.record():
        results = leaves(function(*inputs))
    (program,) = tape.programs()
    for _ in range(times):
        for tensor in inputs:
            whole(tensor).copy_((draw or standard)(whole(tensor)))
        wanted = [tensor.clone() for tensor in leaves(function(*inputs))]
        before = [tensor.clone() for tensor in inputs]
        for result in results:
            if not any(shares_memory(result, tensor) for tensor in inputs):
                fill_with_rubbish(result)  # every entry must be written
        program()
        for result, truth in zip(results, wanted, strict=True):
            assert result.dtype == truth.dtype
            torch.testing.assert_close(result, truth, rtol=1e-5, atol=atol, equal_nan=True)
        torch.testing.assert_close(list(inputs), before, rtol=0.0, atol=0.0, equal_nan=True)
    return program


def leaves(result):
    return list(result) if isinstance(result, tuple | list) else [result]


def shares_memory(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def whole(tensor):
    """The memory of an input, so that a view with stride 0 can be filled too."""
    return tensor._base if tensor._base is not None else tensor


def fill_with_rubbish(tensor):
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(77)


def standard(like):
    if like.dtype == torch.bool:
        return torch.rand(like.shape) < 0.5
    if not like.is_floating_point():
        low = max(-5, torch.iinfo(like.dtype).min)
        return torch.randint(low, 5, like.shape, dtype=like.dtype)
    return torch.randn(like.shape, dtype=like.dtype)


def positive(like):
    return standard(like).abs() + 0.1


# Kernels

UNARY = {
    aten.neg.default: torch.neg,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.tanh.default: torch.tanh,
    aten.sqrt.default: torch.sqrt,
    aten.expm1.default: torch.expm1,
    aten.log1p.default: torch.log1p,
    aten.relu.default: torch.relu,
    aten.clone.default: torch.clone,
    aten.pow.Tensor_Scalar: torch.square,
}
BINARY = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.minimum.default: torch.minimum,
    aten.maximum.default: torch.maximum,
}
COMPARISONS = {
    aten.ge.Scalar: torch.ge,
    aten.le.Scalar: torch.le,
    aten.gt.Scalar: torch.gt,
    aten.lt.Scalar: torch.lt,
}
BY_THEMSELVES = {
    aten.clamp.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
    aten.where.self,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mm.default,
    aten.addmm.default,
    aten.cat.default,
    aten.argmax.default,
    aten.multinomial.default,
    aten.gather.default,
    aten.scatter_add.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    torch.ops.ppo.gru_layer.default,  # in test_gru_layer
    torch.ops.ppo.gru_layer_backward.default,
}


def test_every_kernel_is_tested():
    assert set(KERNELS) == UNARY.keys() | BINARY.keys() | COMPARISONS.keys() | BY_THEMSELVES


sizes = st.integers(0, 5)
kinds = st.sampled_from([torch.float32, torch.float64])


@st.composite
def laid_out(draw, shape, dtype):
    """A tensor of that shape: contiguous, transposed, every second entry, or with stride 0."""
    layout = draw(st.sampled_from(["plain", "plain", "transposed", "strided", "expanded"]))
    if layout == "transposed" and len(shape) > 1:
        return torch.zeros(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
    if layout == "strided" and shape:
        return torch.zeros((*shape[:-1], 2 * shape[-1] + 1), dtype=dtype)[..., 1::2]
    if layout == "expanded" and shape:
        axis = draw(st.integers(0, len(shape) - 1))
        single = [1 if number == axis else size for number, size in enumerate(shape)]
        return torch.zeros(single, dtype=dtype).expand(shape)
    return torch.zeros(shape, dtype=dtype)


@st.composite
def shapes(draw):
    return tuple(draw(st.lists(sizes, max_size=3)))


@st.composite
def broadcast_pairs(draw):
    """Two shapes that can be broadcast together."""
    shape = draw(shapes())
    pair = []
    for _ in range(2):
        kept = [1 if draw(st.booleans()) else size for size in shape]
        pair.append(tuple(kept[draw(st.integers(0, len(shape))) :]))
    return pair


def made_with(tape, operator):
    """True if that operator was recorded."""
    return any(call.operator is operator for part in tape._parts for call in part)


@pytest.mark.parametrize("operator", UNARY)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_unary_kernel_is_its_operation(operator, data):
    x = data.draw(laid_out(data.draw(shapes()), data.draw(kinds)))
    function = UNARY[operator]
    tape = Tape()
    with tape.record():
        function(x)
    assert made_with(tape, operator)
    check_program(function, [x], draw=positive if function in (torch.log, torch.sqrt) else None)


@pytest.mark.parametrize("operator", BINARY)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_binary_kernel_is_its_operation_with_broadcasting_and_types(operator, data):
    dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.int64, torch.bool])
    one, other = (
        data.draw(laid_out(shape, data.draw(dtypes))) for shape in data.draw(broadcast_pairs())
    )
    if operator is aten.sub.Tensor:  # not of bool
        one, other = (x.float() if x.dtype == torch.bool else x for x in (one, other))
    check_program(lambda x, y: BINARY[operator](x, y), [one, other], draw=positive_or_bool)


def positive_or_bool(like):
    return standard(like) if like.dtype == torch.bool else standard(like).abs() + 1


@pytest.mark.parametrize("operator", [*list(BINARY)[:4], *COMPARISONS])
@pytest.mark.parametrize("number", [2, -0.1, 0.0, True, 1e39, float("inf"), 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_numbers_of_python_are_taken_as_torch_takes_them(operator, number, dtype):
    function = (BINARY | COMPARISONS)[operator]
    if number is True and function is torch.sub:
        number = 1
    check_program(lambda x: function(x, number), [torch.zeros(3, 2, dtype=dtype)])


@pytest.mark.parametrize("number", [0.1, 0.3, 1 / 3])
def test_comparisons_round_a_number_as_torch_does(number):
    check_program(
        lambda x: (x >= number, x > number, x <= number, x < number),
        [torch.zeros(3)],
        draw=lambda like: torch.full_like(like, number),
    )


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_clamp_kernel_is_clamp(data):
    bounds = st.sampled_from([None, -0.5, 0, 0.5, 1, float("inf")])
    low, high = data.draw(bounds), data.draw(bounds)
    if low is None and high is None:
        low = 0.0
    x = data.draw(laid_out(data.draw(shapes()), data.draw(st.sampled_from([*FLOATS, torch.int64]))))
    check_program(lambda x: x.clamp(low, high), [x])


FLOATS = [torch.float32, torch.float64]


@pytest.mark.parametrize("exponent", [2, 2.0, 3, 0.5, -1, 0])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
def test_every_power_is_computed(exponent, dtype):
    if dtype == torch.int32 and exponent == -1:
        exponent = 4
    check_program(lambda x: x**exponent, [torch.zeros(5, dtype=dtype)])


def with_edges(like):
    """Numbers, and what compares in a way of its own."""
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=like.dtype)
    chosen = edges[torch.randint(len(edges), like.shape)]
    return torch.where(torch.rand(like.shape) < 0.5, standard(like), chosen)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clamp(min=0.0),
        lambda x: torch.minimum(x, x.flip(0)),
        lambda x: torch.maximum(x, x.flip(0)),
        lambda x: (x >= 0.0, x > 0.0, x <= 0.0, x < 0.0),
        lambda x: torch.where(x > 0.0, x, 2.0 * x),
        lambda x: aten.threshold_backward(x.flip(0), x, 0.0),
        lambda x: aten.tanh_backward(x.flip(0), x),
        torch.tanh,
        torch.exp,
        torch.log,
        torch.sqrt,
        lambda x: x.view(4, 25).sum(0),
        lambda x: x.view(4, 25).sum(1),
        lambda x: x.view(100, 1) @ x.view(1, 100),
        lambda x: x.view(100, 1).expand(100, 3) @ x.view(100, 1)[:3],
    ],
)
def test_what_is_not_finite_goes_the_way_it_goes_in_torch(function):
    check_program(function, [torch.zeros(100)], draw=with_edges, times=5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_backward_kernels_are_their_operations(data):
    shape, dtype = data.draw(shapes()), data.draw(kinds)
    grad, x = (data.draw(laid_out(shape, dtype)) for _ in range(2))
    check_program(aten.tanh_backward, [grad, x])
    at = data.draw(st.sampled_from([0, 0.0, 0.3, -1]))
    check_program(lambda grad, x: aten.threshold_backward(grad, x, at), [grad, x])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_where_kernel_is_where(data):
    (one, other), dtype = data.draw(broadcast_pairs()), data.draw(kinds)
    condition = data.draw(laid_out(one, torch.bool))
    x = data.draw(laid_out(other, dtype))
    y = data.draw(laid_out((), data.draw(kinds)))
    check_program(torch.where, [condition, x, x.clone()])
    check_program(torch.where, [condition, x, y])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_kernel_is_sum(data):
    shape = data.draw(shapes())
    x = data.draw(laid_out(shape, data.draw(st.sampled_from([*FLOATS, torch.int64, torch.bool]))))
    number = len(shape)
    axes = data.draw(
        st.lists(st.integers(-number, number - 1), unique_by=lambda a: a % number)
        if number
        else st.just([])
    )
    keep = data.draw(st.booleans())
    wider = data.draw(st.sampled_from([{}, {}, {"dtype": torch.float64}]))
    check_program(lambda x: x.sum(axes, keep, **wider), [x])
    check_program(lambda x: x.sum(**wider), [x])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_kernel_that_joins_is_cat(data):
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    kind = data.draw(st.sampled_from([*FLOATS, torch.int64]))
    parts = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape[axis] = data.draw(sizes)
        parts.append(data.draw(laid_out(tuple(shape), kind)))
    check_program(lambda *parts: torch.cat(parts, axis), parts)
    check_program(lambda *parts: torch.cat([torch.zeros(0, dtype=kind), *parts], axis), parts)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_argmax_kernel_is_argmax_also_where_several_are_the_greatest(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    x = data.draw(laid_out(shape, data.draw(st.sampled_from([*FLOATS, torch.int64]))))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    keep = data.draw(st.booleans())
    check_program(lambda x: x.argmax(axis, keep), [x])
    check_program(lambda x: x.argmax(), [x])
    check_program(lambda x: (x > 0.5).to(x.dtype).argmax(axis), [x])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kernel_that_draws_draws_what_torch_draws_and_moves_the_generator_as_far(data):
    rows, classes = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    shape = data.draw(st.sampled_from([(rows, classes), (rows, classes), (classes,)]))
    weights = data.draw(laid_out(shape, data.draw(kinds)))
    number = data.draw(st.sampled_from([1, 1, classes]))
    generator = data.draw(st.sampled_from([None, torch.Generator()]))
    options = {"replacement": data.draw(st.booleans()), "generator": generator}
    some_are_0 = number == 1 and data.draw(st.booleans())
    mine = generator or torch.default_generator
    with torch.random.fork_rng():
        whole(weights).fill_(1.0)
        tape = Tape(random=True)
        with tape.record():
            result = torch.multinomial(weights, number, **options)
        (program,) = tape.programs()
        for seed in range(4):
            whole(weights).copy_(positive(whole(weights)))
            if some_are_0:
                whole(weights).mul_(whole(weights) > 0.6)
                if (weights.sum(-1) == 0).any():
                    whole(weights).fill_(1.0)
            mine.manual_seed(seed)
            wanted, state = torch.multinomial(weights, number, **options), mine.get_state()
            mine.manual_seed(seed)
            fill_with_rubbish(result)
            program()
            assert torch.equal(result, wanted)
            assert torch.equal(mine.get_state(), state)


@pytest.mark.parametrize("row", [[1.0, torch.nan], [1.0, torch.inf], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_are_no_distribution_are_refused_by_a_program_too(row):
    weights, generator = torch.ones(3, 2), torch.Generator()
    tape = Tape(random=True)
    with tape.record():
        torch.multinomial(weights, 1, generator=generator)
    (program,) = tape.programs()
    program()
    weights[1] = torch.tensor(row)
    state = generator.get_state()
    with pytest.raises(RuntimeError, match="probabilit"):
        program()
    assert torch.equal(generator.get_state(), state)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_kernels_of_torchs_own_functions_are_their_operations(data):
    shape, dtype = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))), data.draw(kinds)
    x, y = (data.draw(laid_out(shape, dtype)) for _ in range(2))
    axis = data.draw(st.sampled_from([0, 1, -1]))
    check_program(lambda x: (x.softmax(axis), x.log_softmax(axis)), [x])
    check_program(lambda x: x.softmax(axis, dtype=torch.float64), [x])
    check_program(lambda x, y: aten._log_softmax_backward_data(x, y, axis, dtype), [x, y])

    def chosen(x, y):
        places = (y > 0).long()[:, :1].clamp(max=min(shape) - 1)
        return x.gather(axis, places), x.scatter_add(axis, places, y)

    check_program(chosen, [x, y])


# On both sides of every change of path.
lengths = st.sampled_from([0, 1, 2, 3, 9, 33, 70])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kernels_of_products_are_their_operations(data):
    rows, inner, columns = (data.draw(lengths) for _ in range(3))
    dtype = data.draw(st.sampled_from([*FLOATS, torch.int64, torch.bfloat16]))
    if dtype == torch.bfloat16:
        inner = min(inner, 1)  # the order of a sum matters too much
    x, y = (data.draw(laid_out(s, dtype)) for s in ((rows, inner), (inner, columns)))
    bias = data.draw(laid_out(data.draw(st.sampled_from([(columns,), (1,), (rows, 1)])), dtype))
    check_program(torch.mm, [x, y], atol=1e-4)
    check_program(torch.addmm, [bias, x, y], atol=1e-4)
    if dtype != torch.bfloat16:
        scaled = functools.partial(torch.addmm, beta=2, alpha=3)
        check_program(scaled, [bias, x, y], atol=1e-4)


@pytest.mark.parametrize("columns", [5, 64])
def test_what_comes_of_a_few_rows_does_not_depend_on_how_many_there_are(columns):
    """Each is taken by itself; a product of matrices rounds one row otherwise than many."""
    x, weight, bias = torch.randn(16, 64), torch.randn(columns, 64), torch.randn(columns)

    def results_of(rows):
        tape = Tape()
        with tape.record():
            results = torch.addmm(bias, rows, weight.t()), torch.mm(rows, weight.t())
        (program,) = tape.programs()
        program()
        return results

    for all_rows, alone in zip(results_of(x), results_of(x[:1].clone()), strict=True):
        assert torch.equal(alone, all_rows[:1])


@pytest.mark.parametrize("shape", [(300, 200, 300), (300, 300, 1), (1, 300, 300)])
def test_large_products_are_torchs(shape):
    rows, inner, columns = shape
    x, y = torch.zeros(rows, inner, dtype=torch.float64), torch.zeros(inner, columns).double()
    check_program(torch.mm, [x, y])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.add(x, y, alpha=0.5),
        lambda x, y: torch.sub(x, y, alpha=2),
        lambda x, y: x.contiguous(memory_format=torch.contiguous_format) + y.clone(),
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
    ],
)
def test_options_of_an_operation_are_kept(function):
    check_program(function, [torch.zeros(3, 4), torch.zeros(3, 4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool])
def test_types_that_numpy_has_not_are_left_to_torch(dtype):
    x = torch.zeros(3, 4, dtype=dtype)
    check_program(lambda x: (x.clone(), x.t().contiguous(), x.float() * 2.0, x.to(dtype)), [x])


# Programs


def test_a_program_computes_from_what_its_inputs_hold_now():
    weight = nn.Parameter(torch.ones(2, 3))
    x = torch.ones(4, 3)
    tape = Tape()
    with tape.record():
        y = nn.functional.linear(x, weight).exp().sum()
    (program,) = tape.programs()
    with torch.no_grad():
        weight.mul_(0.5)
    x.mul_(2.0)
    program()
    assert y.item() == pytest.approx(8 * np.exp(3.0))


def test_views_cost_nothing_and_neither_do_constants():
    x = torch.zeros(4, 6)
    tape = Tape()
    with tape.record():
        x.view(2, 2, 6).transpose(0, 1)[1].unsqueeze(0).expand(3, -1, -1).squeeze(0).detach()
        x.reshape(-1).split(6)
        torch.ones(3), torch.zeros_like(x), torch.arange(4), torch.full_like(x, 2.0)
    (program,) = tape.programs()
    assert len(program) == 0
    assert aten.zeros_like.default in CONSTANTS


def test_a_reshape_that_copies_is_repeated():
    check_program(lambda x: x.t().reshape(-1), [torch.zeros(3, 4)])
    check_program(lambda x: (x.t().reshape(6, 2) * 1.0).sum(), [torch.zeros(3, 4)])


def in_place(x):
    y = 2.0 * x
    y[0].add_(1.0)
    y[:, 1].mul_(3.0)
    y[y > 0.5] = 0.25
    y.clamp_(-1.0, 1.0).tanh_()
    return y


def constants_in_place(x):
    total, ones = torch.zeros(4), torch.ones_like(x)
    for row in x:
        total.add_(row)
    ones[0].sub_(x[1])
    ones.view(-1)[2:4].zero_()
    return total, ones


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        constants_in_place,
        lambda x: torch.relu_(x * 1.0),
        lambda x: torch.mul(x, 2.0, out=torch.empty(3, 4)),
        lambda x: torch.empty(3, 4).copy_(x).sub_(x.mean()),
        lambda x: torch.zeros(3, 4).scatter_add_(1, torch.ones(3, 4).long(), x),
        lambda x: torch.zeros(3, 4).index_put_((torch.tensor([1, 1]),), x[:2], accumulate=True),
    ],
)
def test_what_is_changed_in_place_starts_afresh_in_every_run(function):
    check_program(function, [torch.zeros(3, 4)], times=3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sort(-1),
        lambda x: x.max(-1),
        lambda x: x.topk(2),
        lambda x: torch.var_mean(x, -1),
        lambda x: nn.functional.layer_norm(x, (4,)),
        lambda x: nn.functional.softmax(x, -1),
        lambda x: nn.functional.gelu(x),
        lambda x: nn.functional.silu(x),
        lambda x: torch.cat([x, x[:1]]),
        lambda x: torch.stack([x, -x], 1),
        lambda x: torch.einsum("bi,bj->bij", x, x),
        lambda x: torch.gather(x, 1, (x[:, :2] > 0).long()),
        lambda x: x.cumsum(0),
        lambda x: x.argmax(-1),
        lambda x: x.norm(),
        lambda x: x.double().float().long(),
        lambda x: nn.functional.pad(x, (1, 2)),
        lambda x: torch.linalg.solve(torch.eye(4) * 9.0 + x.t() @ x, x.t()),
    ],
)
def test_operations_without_a_kernel_are_called_again(function):
    check_program(function, [torch.zeros(3, 4)], times=3)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_forward_and_backward_are_two_parts(seed):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4))
    layers, x, slope = layers.double(), torch.randn(6, 3).double(), torch.randn(6, 4).double()
    tape = Tape()
    with tape.record():
        y = layers(x)
    with tape.record():
        gradients = torch.autograd.grad(y, list(layers.parameters()), slope)
    forward, backward = tape.programs()
    x.normal_()
    slope.normal_()
    forward()
    backward()
    torch.testing.assert_close(y, layers(x))
    truth = torch.autograd.grad(layers(x), list(layers.parameters()), slope)
    torch.testing.assert_close(gradients, truth)


def test_outputs_are_written_where_they_are_wanted():
    x, wanted = torch.ones(2, 3), torch.zeros(10)
    home = wanted[2:8].view(2, 3)
    tape = Tape()
    with tape.record():
        y = x.exp()
        z = y.t()[1].sum() + y.view(-1)[0]
        y.mul_(2.0)
    (program,) = tape.programs([(y, home)])
    y.fill_(77.0)
    x.fill_(2.0)
    program()
    assert home.flatten().tolist() == pytest.approx([2.0 * np.exp(2.0)] * 6)
    assert wanted[[0, 1, 8, 9]].tolist() == [0.0] * 4
    assert z.item() == pytest.approx(3.0 * np.exp(2.0))
    assert (y == 77.0).all()


def test_results_take_the_place_of_what_nobody_reads_any_more():
    x, tape = torch.zeros(5), Tape()
    with tape.record():
        first = x + 1.0
        second = first.tanh()
        third = second * 2.0
        last = third.exp()
    (program,) = tape.programs(only=[last])
    second.fill_(77.0)
    third.fill_(77.0)
    x.fill_(3.0)
    program()
    assert first.tolist() == pytest.approx([2.0 * np.tanh(4.0)] * 5)
    assert last.tolist() == pytest.approx([np.exp(2.0 * np.tanh(4.0))] * 5)
    assert x.tolist() == [3.0] * 5
    assert (torch.stack([second, third]) == 77.0).all()


def tanh_of_itself(x):
    y = (2.0 * x).requires_grad_()
    with torch.enable_grad():
        z = y.tanh()
    (slope,) = torch.autograd.grad(z, y, z.detach())
    return slope * x


def tanh_twice(x):
    y = (2.0 * x).requires_grad_()
    with torch.enable_grad():
        z = (y.tanh() + 1.0).tanh().relu()
    return torch.autograd.grad(z, y, z.detach() * x)


def read_again(x):
    y = x + 1.0
    return y.tanh() + y


def read_through_a_view(x):
    y = x + 1.0
    part = y[1:].t()
    return (y.tanh().sum(), part.exp())


def with_itself_turned(x):
    y = x + 1.0
    return (y - y.t()).exp()


def changed_later(x):
    y = x + 1.0
    z = y.tanh()
    z.mul_(2.0)
    return z + 1.0


@pytest.mark.parametrize(
    "function",
    [
        tanh_of_itself,
        tanh_twice,
        read_again,
        read_through_a_view,
        with_itself_turned,
        changed_later,
        lambda x: (torch.ones_like(x) + x).exp(),
        lambda x: (torch.tensor([1.0, 2.0, 3.0, 4.0]) + x).exp(),
        lambda x: (torch.tensor([1.0, 2.0, 3.0, 4.0]) + x[0].detach()).exp().neg(),
        lambda x: (1.0 + x).sum(0) + (x + 2.0),  # not as large as what it could lie in place of
        lambda x: ((1.0 + x).double() + x).float(),
        lambda x: torch.add(x.exp(), x.tanh(), alpha=3.0) / (2.0 - x).relu().add(1.0),
        lambda x: (x.exp().t() + x).tanh(),
    ],
)
def test_nothing_that_is_read_later_loses_its_place(function):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    tape = Tape()
    with tape.record():
        results = leaves(function(x))
    (program,) = tape.programs(only=results)
    for _ in range(3):
        x.add_(0.3)
        before = x.clone()
        program()
        for result, wanted in zip(results, leaves(function(x)), strict=True):
            torch.testing.assert_close(result, wanted)
        assert torch.equal(x, before)


def test_a_constant_is_written_to_its_home():
    home, tape = torch.full((3,), torch.nan), Tape()
    with tape.record():
        ones = torch.ones(3)
    (program,) = tape.programs([(ones, home)])
    home.fill_(torch.nan)
    program()
    assert home.tolist() == [1.0] * 3


def test_only_a_result_with_memory_of_its_own_has_a_home():
    x, tape = torch.ones(2, 3), Tape()
    with tape.record():
        y = x.exp()
        view, part, turned = x.view(3, 2), y[0], (y.t() * 2.0).t()
    movable = [tensor for tensor in (x, y, view, part, turned.t()) if tape.can_move(tensor)]
    assert all(tensor is y or tensor.shape == (3, 2) for tensor in movable)
    for result in (x, view, part):
        assert not tape.can_move(result)
        with pytest.raises(ValueError, match="memory of its own"):
            tape.programs([(result, torch.zeros(result.shape))])
    with pytest.raises(ValueError, match="memory of its own"):
        tape.programs([(y, torch.zeros(3, 2).t())])


def test_nothing_is_recorded_after_the_block_nor_after_an_error():
    x, tape = torch.ones(2), Tape()

    def recorded():
        with tape.record():
            x.exp()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        recorded()
    with tape.record():
        x.exp().log()
    x.exp()
    assert [len(part) for part in tape._parts] == [1, 2]


# What cannot be repeated


def refuse(function, *inputs):
    tape = Tape()
    with pytest.raises(UnsupportedError), tape.record():
        function(*inputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.randn(3),
        lambda x: torch.rand_like(x),
        lambda x: torch.randperm(4),
        lambda x: torch.bernoulli(x),
        lambda x: torch.multinomial(x, 1),
        lambda x: torch.normal(x, x),
        lambda x: x.clone().normal_(),
        lambda x: x.clone().uniform_(generator=torch.Generator()),
        lambda x: nn.functional.dropout(x, 0.5),
        lambda x: nn.functional.rrelu(x, training=True),
        lambda x: nn.functional.gumbel_softmax(x),
    ],
)
def test_random_numbers_are_refused_before_they_are_drawn(function):
    state = torch.get_rng_state()
    refuse(function, torch.full((3, 4), 0.5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: 1 if x.sum() > 0 else 2,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.detach().numpy(),
        lambda x: np.asarray(x),
        lambda x: np.tanh(x.detach()),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, 2.0 * x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, x[0].long(), dim=1),
    ],
)
def test_values_that_decide_on_anything_but_values_are_refused(function):
    refuse(function, torch.ones(3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.add_(1.0),
        lambda x: x[0].zero_(),
        lambda x: x.view(-1).mul_(2.0),
        lambda x: x.__setitem__(0, 5.0),
        lambda x: x.detach().clamp_(-0.5, 0.5),
        lambda x: x.data.fill_(3.0),
        lambda x: torch.exp(x, out=x),
        lambda x: x.copy_(2.0 * x),
        lambda x: x.t_(),
        lambda x: x.unsqueeze_(0),
        lambda x: x.resize_(20),
        lambda x: nn.functional.relu(x, inplace=True),
        lambda x: torch._foreach_add_([x], 1.0),
        lambda x: nn.functional.batch_norm(x, x[0], x[1], training=True),
        lambda x: nn.functional.batch_norm(1.0 * x, x[0], x[1], training=True),
        lambda x: nn.functional.embedding(torch.tensor([0]), x, max_norm=0.1),
    ],
)
def test_a_tensor_from_before_the_recording_is_never_changed(function):
    x = torch.full((3, 4), 7.0)
    refuse(function, x)
    assert x.shape == (3, 4)
    assert (x == 7.0).all()


def test_statistics_that_stay_as_they_are_may_be_read():
    mean, var = torch.zeros(4), torch.ones(4)
    for training, statistics in ((False, (mean, var)), (True, (None, None))):
        check_program(
            lambda x, t=training, s=statistics: nn.functional.batch_norm(x, *s, training=t),
            [torch.zeros(3, 4)],
        )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to_sparse(),
        lambda x: torch.sparse.mm(x.to_sparse(), x.t()),
        lambda x: torch.fft.fft(x),
        lambda x: torch.view_as_complex(x.view(-1, 2)),
        lambda x: x.to("meta"),
        lambda x: (2.0 * x).t_(),
    ],
)
def test_tensors_that_numpy_cannot_view_are_refused(function):
    refuse(function, torch.ones(3, 4))


def test_a_backward_pass_that_draws_is_refused():
    x = torch.ones(3, requires_grad=True)
    tape = Tape()
    with tape.record():
        y = Drawn.apply(x)
    with pytest.raises(UnsupportedError), tape.record():
        torch.autograd.grad(y, x, torch.ones(3))
