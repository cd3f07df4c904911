import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, elsewhere
from hypothesis import given
from hypothesis import strategies as st
from policy_setup import generator, global_randomness
from strategies import law, seeds
from torch import nn

from ppo.policies import make_memory
from ppo.recording import Tape

KINDS = ["lstm", "gru", "attention"]
ALL = pytest.mark.parametrize("kind", KINDS)
FEATURES, SIZE, WINDOW = 3, 8, 5


def make(kind, seed=0, dtype=torch.float64):
    """A memory as if it had been trained: its biases are not 0."""
    memory = make_memory(kind, FEATURES, SIZE, generator(seed), window=WINDOW).to(dtype)
    shuffle = generator(seed + 1)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=shuffle)
    return memory


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def stepped(memory, features, state):
    """Outputs of one sequence `[L, F]`, row by row, and the state behind it."""
    outputs = []
    for row in features:
        output, state = memory.step(row[None], state)
        outputs.append(output)
    return torch.cat(outputs), state


def in_the_middle(memory, steps, seed=0):
    """The state after some steps of an episode."""
    dtype = next(memory.parameters()).dtype
    state = torch.zeros(1, memory.state_size, dtype=dtype)
    with torch.no_grad():
        for row in normal(steps, FEATURES, seed=seed, dtype=dtype):
            _, state = memory.step(row[None], state)
    return state


def sequences_of(lengths, states):
    return SimpleNamespace(lengths=tuple(lengths), states=torch.cat(states))


def separately(memory, features, sequences):
    """What `replay` says, by stepping through each sequence on its own."""
    parts = features.split(sequences.lengths)
    states = sequences.states.split(1)
    return torch.cat([stepped(memory, *pair)[0] for pair in zip(parts, states, strict=True)])


@st.composite
def replays(draw, dtype=torch.float64):
    """A memory, features and sequences: of one length or of many, from the start or later."""
    memory = make(draw(st.sampled_from(KINDS)), draw(st.integers(0, 9)), dtype)
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    before = [draw(st.integers(0, 9)) for _ in lengths]
    states = [in_the_middle(memory, steps, seed) for seed, steps in enumerate(before)]
    features = normal(sum(lengths), FEATURES, seed=draw(seeds), dtype=dtype)
    return memory, features, sequences_of(lengths, states)


@law
@given(replays())
def test_replayed_sequences_equal_steps_one_by_one(drawn):
    memory, features, sequences = drawn
    replayed = memory.replay(features, sequences)
    assert replayed.shape == (len(features), memory.num_features)
    torch.testing.assert_close(
        replayed, separately(memory, features, sequences), rtol=1e-9, atol=1e-9
    )


@law
@given(replays(torch.float32))
def test_in_float32_they_differ_by_rounding_alone(drawn):
    memory, features, sequences = drawn
    replayed = memory.replay(features, sequences)
    assert replayed.dtype == torch.float32
    one_by_one = separately(memory, features, sequences)
    doubles = sequences_of(sequences.lengths, [sequences.states.double()])
    exact = separately(memory.double(), features.double(), doubles)
    errors = [(found - exact).abs().max().item() for found in (replayed, one_by_one)]
    # Attention may enlarge what is rounded; then the steps show by how much.
    assert errors[0] <= max(2e-6, 4.0 * errors[1])


@law
@given(replays())
def test_the_gradient_of_a_replay_is_that_of_the_steps(drawn):
    memory, features, sequences = drawn
    inputs = [features.requires_grad_(), sequences.states.requires_grad_()]
    weights = normal(len(features), memory.num_features, seed=5)
    gradients = [
        torch.autograd.grad((outputs * weights).sum(), [*inputs, *memory.parameters()])
        for outputs in (
            memory.replay(features, sequences),
            separately(memory, features, sequences),
        )
    ]
    for replayed, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, wanted, rtol=1e-8, atol=1e-9)


@ALL
def test_a_sequence_knows_nothing_of_those_beside_it(kind):
    memory, lengths = make(kind), (4, 9, 1)
    states = [in_the_middle(memory, 6), in_the_middle(memory, 2), in_the_middle(memory, 0)]
    features = normal(sum(lengths), FEATURES)
    outputs = memory.replay(features, sequences_of(lengths, states)).split(lengths)
    for index, part in enumerate(features.split(lengths)):
        alone = memory.replay(part, sequences_of(lengths[index : index + 1], [states[index]]))
        torch.testing.assert_close(outputs[index], alone, rtol=1e-10, atol=1e-10)
    changed = features.clone()
    changed[4:13] = torch.nan
    others = memory.replay(changed, sequences_of(lengths, states)).split(lengths)
    assert torch.equal(others[0], outputs[0])
    assert torch.equal(others[2], outputs[2])


@ALL
def test_an_output_depends_on_what_came_before_and_on_nothing_later(kind):
    memory = make(kind)
    features = normal(9, FEATURES).requires_grad_()
    outputs = memory.replay(features, sequences_of([9], [in_the_middle(memory, 3)]))
    (slopes,) = torch.autograd.grad(outputs[6].sum(), features)
    reached = (slopes != 0).any(1)
    assert not reached[7:].any()
    assert reached[7 - WINDOW : 7].all()
    assert reached[: 7 - WINDOW].all() == (kind != "attention")


@ALL
def test_zeros_begin_an_episode(kind):
    memory = make(kind)
    features = normal(7, FEATURES)
    blank = torch.zeros(1, memory.state_size, dtype=torch.float64)
    fresh, later = (stepped(memory, features, s)[0] for s in (blank, in_the_middle(memory, 4)))
    assert (fresh[0] - later[0]).abs().max() > 1e-3
    again = memory.replay(torch.cat([features] * 2), sequences_of([7, 7], [blank] * 2))
    torch.testing.assert_close(again, torch.cat([fresh] * 2), rtol=1e-9, atol=1e-9)


def test_attention_never_sees_rows_from_before_an_episode():
    memory = make("attention")
    state = in_the_middle(memory, 2)
    assert state[0, -1] == 2.0
    dirty = state.clone()
    unreal = (WINDOW - 1 - 2) * SIZE
    dirty[0, :unreal] = 1e3 * normal(unreal)
    features = normal(6, FEATURES)
    for seen in (
        lambda state: stepped(memory, features, state)[0],
        lambda state: memory.replay(features, sequences_of([6], [state])),
    ):
        torch.testing.assert_close(seen(dirty), seen(state), rtol=1e-12, atol=1e-12)
    _, last = stepped(memory, features, state)
    assert last[0, -1] == WINDOW - 1


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_step_is_that_of_torch(kind):
    memory = make(kind)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](FEATURES, SIZE).double()
    layer.load_state_dict(memory.core.state_dict())
    features = normal(6, FEATURES)
    parts = [normal(1, 6, SIZE, seed=seed) for seed in range(memory.state_size // SIZE)]
    output, state = memory.step(features, torch.cat(parts, -1)[0])
    wanted, end = layer(features[None], tuple(parts) if kind == "lstm" else parts[0])
    torch.testing.assert_close(output, wanted[0], rtol=1e-12, atol=1e-12)
    after = torch.cat(end, -1) if kind == "lstm" else end
    torch.testing.assert_close(state, after[0], rtol=1e-12, atol=1e-12)


@ALL
def test_a_step_can_be_recorded(kind):
    memory = make(kind, dtype=torch.float32)
    features = normal(4, FEATURES, dtype=torch.float32)
    state = torch.cat([in_the_middle(memory, steps, steps) for steps in range(4)])
    tape = Tape([*memory.parameters(), features, state])
    with torch.no_grad(), tape.record():
        outputs, after = memory.step(features, state)
    (program,) = tape.programs()
    for _ in range(3):
        features += 1.0
        state.copy_(after)
        with torch.no_grad():
            wanted = memory.step(features, state)
        program()
        torch.testing.assert_close((outputs, after), wanted, rtol=1e-5, atol=1e-5)


@ALL
def test_initial_weights_come_from_the_generator_alone(kind):
    before = global_randomness()
    memories = [make_memory(kind, FEATURES, SIZE, generator(seed)) for seed in (4, 4, 5)]
    blank = make_memory(kind, FEATURES, SIZE, None)
    assert global_randomness() == before
    same, twin, other = ([p.detach() for p in m.parameters()] for m in memories)
    assert all(torch.equal(*pair) for pair in zip(same, twin, strict=True))
    drawn = [p for p in zip(same, other, strict=True) if p[0].ndim == 2 and p[0].any()]
    assert drawn
    assert not any(torch.equal(*pair) for pair in drawn)
    assert {p.device.type for p in blank.parameters()} == {"meta"}


@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3)])
def test_every_gate_begins_orthogonal_and_without_bias(kind, gates):
    core = make_memory(kind, FEATURES, SIZE, generator()).core
    blocks = core.weight_hh_l0.split(SIZE)
    assert len(blocks) == gates
    for block in blocks:
        torch.testing.assert_close(block @ block.T, torch.eye(SIZE))
    for block in core.weight_ih_l0.split(SIZE):
        torch.testing.assert_close(block.T @ block, torch.eye(FEATURES))
    assert not core.bias_ih_l0.any()
    assert not core.bias_hh_l0.any()


@ALL
def test_a_memory_without_values_can_be_loaded(kind):
    memory = make(kind, dtype=torch.float32)
    blank = make_memory(kind, FEATURES, SIZE, None, window=WINDOW).to_empty(device="cpu")
    blank.load_state_dict(memory.state_dict())
    features = normal(5, FEATURES, dtype=torch.float32)
    sequences = sequences_of([2, 3], [in_the_middle(memory, 1), in_the_middle(memory, 2)])
    assert torch.equal(blank.replay(features, sequences), memory.replay(features, sequences))


@ALL
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_memory_is_the_same_and_independent(kind, clone):
    memory = make(kind)
    twin = clone(memory)
    features, start = normal(5, FEATURES), sequences_of([5], [in_the_middle(memory, 1)])
    before = memory.replay(features, start)
    assert torch.equal(twin.replay(features, start), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1.0
    assert torch.equal(memory.replay(features, start), before)
    assert not torch.allclose(twin.replay(features, start), before)


@ALL
def test_parameters_may_move_into_shared_storage(kind):
    memory = make(kind)
    features, start = normal(5, FEATURES), sequences_of([2, 3], [in_the_middle(memory, 1)] * 2)
    before = memory.replay(features, start)
    flat = nn.utils.parameters_to_vector(memory.parameters()).detach()
    nn.utils.vector_to_parameters(flat, memory.parameters())
    assert torch.equal(memory.replay(features, start), before)
    flat *= 1.5
    torch.testing.assert_close(
        memory.replay(features, start),
        separately(memory, features, start),
        rtol=1e-9,
        atol=1e-9,
    )
    assert not torch.allclose(memory.replay(features, start), before)


def test_attention_needs_a_width_that_its_heads_can_share():
    with pytest.raises(ValueError, match=r"multiple of heads=4, got 6"):
        make_memory("attention", FEATURES, 6, generator())


def test_a_window_of_one_step_is_no_memory():
    memory = make_memory("attention", FEATURES, SIZE, generator(), window=1)
    features = normal(4, FEATURES, dtype=torch.float32)
    outputs = memory.replay(features, sequences_of([3, 1], [torch.zeros(1, 1)] * 2))
    step, state = memory.step(features, torch.zeros(4, 1))
    torch.testing.assert_close(outputs, step)
    assert state.shape == (4, 1)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_gpu_is_not_advised_to_keep_the_weights_by_themselves(kind):
    """As cuDNN does at every call, for parameters that an optimizer keeps in one vector."""

    def advise(*_):
        warnings.warn("RNN module weights are not part of single contiguous chunk", stacklevel=1)

    with elsewhere():
        memory = make(kind).to(DEVICE)
        memory.core.register_forward_pre_hook(advise)
        features, state = normal(5, FEATURES).to(DEVICE), in_the_middle(make(kind), 2).to(DEVICE)
        outputs = memory.replay(features, sequences_of([2, 3], [state] * 2)).cpu()
    same = make(kind)
    wanted = same.replay(normal(5, FEATURES), sequences_of([2, 3], [in_the_middle(same, 2)] * 2))
    torch.testing.assert_close(outputs, wanted)
