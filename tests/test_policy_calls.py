"""A policy acts by a recording exactly where that chooses what the policy itself would choose."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from environments import CountingEnv
from torch import nn

from ppo import RolloutCollector
from ppo._threads import threads
from ppo.collector.policy_calls import PolicyCalls
from ppo.policies import ObservationNormalizer
from ppo.recording import RecordedCall
from ppo.spaces import Leaf

CPU = torch.device("cpu")
ACTIONS, VECTORS = (Leaf(shape, np.dtype(np.float32)) for shape in ((), (4,)))


@pytest.fixture(autouse=True)
def _without_gradients():
    """As the collector calls it."""
    with torch.no_grad():
        yield


class Own(nn.Module):
    """A categorical policy that draws from a torch generator."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.normalizer = ObservationNormalizer((3,))
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4))
        self.temperature = 1.0
        self.options = {"bias": [0.0]}
        self.slopes = np.ones(4, np.float32)

    def logits(self, obs):
        logits = self.net(self.normalizer(obs)) / self.temperature
        return logits * torch.tensor(2.0 * self.slopes) + self.options["bias"][0]

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return torch.multinomial(self.logits(obs).softmax(-1), 1, generator=generator).squeeze(-1)


class Gaussian(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        mean = self.logits(obs)
        return mean + 0.1 * torch.randn(mean.shape, generator=generator)


class Noisy(Own):
    def draw_noise(self, rng, num_steps):
        return rng.normal(size=(num_steps, 4)).astype(np.float32)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return self.logits(obs) + noise


class Rejecting(Own):
    """Draws as often as it takes: how often depends on values."""

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        actions = super().act(obs, generator=generator)
        while bool((actions == 0).any()):
            actions = super().act(obs, generator=generator)
        return actions


class Counting(Own):
    """Explores less with every call."""

    calls = 0

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        self.calls += 1
        return super().act(obs, generator=generator) % (1 + self.calls % 3)


class ThroughNumpy(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        shifted = torch.from_numpy(obs.numpy() * 2.0 - 1.0)
        return super().act(shifted, generator=generator)


class NumpyOnly(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return torch.from_numpy((obs.numpy()[:, 0] > 0).astype(np.int64))


class PythonRandom(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        if random.random() < 0.5:
            return torch.zeros(len(obs), dtype=torch.int64)
        return super().act(obs, generator=generator)


class NumpyRandom(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return super().act(obs, generator=generator) + int(np.random.randint(2))  # noqa: NPY002


class OwnGenerator(Own):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return super().act(obs, generator=generator) + int(self.rng.integers(2))


class GlobalTorch(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return torch.multinomial(self.logits(obs).softmax(-1), 1).squeeze(-1)


class InPlace(Own):
    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        logits = self.logits(obs)
        logits[:, 0] = -5.0
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax(-1)


def seed_all():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002


def play(make, steps, recorded):
    """Actions and the states of all generators, by `PolicyCalls` or by the policy itself."""
    policy = make()
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(2)
    takes_noise = make is Noisy
    actions = VECTORS if make in (Gaussian, Noisy) else ACTIONS
    calls = PolicyCalls(policy, CPU, generator, 5, actions)
    seed_all()
    chosen = []
    for step in range(steps):
        if step % 50 == 0:
            calls.begin()
        obs = rng.normal(size=(5, 3)).astype(np.float32)
        noise = rng.normal(size=(5, 4)).astype(np.float32) if takes_noise else None
        if not recorded:
            calls._act.begin(None)
        chosen.append(calls.act(obs, noise, None).copy())
    states = [generator.get_state(), torch.get_rng_state()]
    states += [random.random(), float(np.random.rand())]  # noqa: NPY002
    return chosen, states, calls._act


POLICIES = [
    Own,
    Gaussian,
    Noisy,
    Rejecting,
    Counting,
    ThroughNumpy,
    NumpyOnly,
    PythonRandom,
    NumpyRandom,
    OwnGenerator,
    GlobalTorch,
    InPlace,
]
RECORDED = {Own, Gaussian, Noisy, GlobalTorch, InPlace}


@pytest.mark.parametrize("make", POLICIES)
def test_a_recording_chooses_what_the_policy_would(make):
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        ours, our_states, acting = play(make, 150, recorded=True)
        theirs, their_states, _ = play(make, 150, recorded=False)
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(our_states, their_states, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    replays = 0 if acting._recording is None else acting._recording.replays
    assert (replays == 150) == (make in RECORDED)
    assert replays in (0, 150)


def set_temperature(policy):
    policy.temperature = 0.01


def set_an_option(policy):
    policy.options["bias"][0] = 3.0


def change_an_array(policy):
    policy.slopes[1] = 30.0


def fill_the_normalizer(policy):
    policy.normalizer.update(torch.linspace(-5, 9, 30).view(10, 3))


def exchange_a_layer(policy):
    policy.net[0] = nn.Linear(3, 8)


def move_a_parameter(policy):
    policy.net[2].weight.data = 30.0 * policy.net[2].weight.data


def change_in_place(policy):
    with torch.no_grad():
        policy.net[2].weight.mul_(30.0)


def add_a_hook(policy):
    policy.net.register_forward_hook(lambda module, args, output: 30.0 * output)


@pytest.mark.parametrize(
    "change",
    [
        set_temperature,
        set_an_option,
        change_an_array,
        fill_the_normalizer,
        exchange_a_layer,
        move_a_parameter,
        change_in_place,
        add_a_hook,
    ],
)
def test_what_a_user_does_to_the_policy_between_rollouts_is_taken_up(change):
    policy = Noisy()
    calls = PolicyCalls(policy, CPU, torch.Generator(), 5, VECTORS)
    rng = np.random.default_rng(0)

    def numbers():
        return (rng.normal(size=(5, width)).astype(np.float32) for width in (3, 4))

    calls.begin()
    for _ in range(5):
        calls.act(*numbers(), None)
    assert calls._act._recording.replays == 5
    torch.manual_seed(5)
    obs, noise = numbers()
    (before,) = calls._act.plainly(obs, noise)
    change(policy)
    calls.begin()
    for _ in range(3):
        (wanted,) = calls._act.plainly(obs, noise)
        np.testing.assert_allclose(calls.act(obs, noise, None), wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(wanted, before, atol=1e-3)


class Extreme(Noisy):
    """Divides by zero, overflows and computes what is no number, of which torch never warns."""

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        logits = self.logits(obs)
        allowed = (logits > 0.0).float().log()
        return logits + noise + allowed + (1e4 * logits).exp() + allowed * 0.0 + 1e300


def test_numpy_warns_of_no_number_in_a_replay():
    calls = PolicyCalls(Extreme(), CPU, torch.Generator(), 5, VECTORS)
    rng, before = np.random.default_rng(0), np.geterr()
    calls.begin()
    for _ in range(5):
        obs, noise = (rng.normal(size=(5, width)).astype(np.float32) for width in (3, 4))
        actions = calls.act(obs, noise, None)
        np.testing.assert_array_equal(actions, calls._act.plainly(obs, noise)[0])
    assert calls._act._recording.replays == 5
    assert not np.isfinite(actions).any()
    assert np.geterr() == before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda calls: pickle.loads(pickle.dumps(calls))]
)
def test_a_copy_has_no_recording_and_acts_as_the_original(duplicate):
    obs = np.ones((5, 3), np.float32)
    calls = PolicyCalls(Own(), CPU, torch.Generator().manual_seed(0), 5, ACTIONS)
    calls.begin()
    for _ in range(4):
        calls.act(obs, None, None)
    assert calls._act._recording is not None
    copied = duplicate(calls)
    copied.begin()
    assert copied._act._recording is None
    for _ in range(4):
        assert np.array_equal(copied.act(obs, None, None), calls.act(obs, None, None))
    assert copied._act._recording is not None


def test_wide_networks_and_policies_that_are_no_modules_act_for_themselves():
    class NoModule:
        def act(self, obs, *, generator):
            return torch.zeros(len(obs))

    for policy in (Own(width=100_000), NoModule()):
        calls = PolicyCalls(policy, CPU, torch.Generator(), 5, ACTIONS)
        calls.begin()
        calls.act(np.zeros((5, 3), np.float32), None, None)
        assert calls._act._recording is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rollouts_do_not_depend_on_when_a_recording_was_made(num_workers):
    class Chance(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 2)

        def act(self, obs, *, noise=None, generator=None, deterministic=False):
            p = torch.softmax(0.01 * self.linear(obs), -1)
            return torch.multinomial(p, 1, generator=generator).squeeze(-1)

        def evaluate(self, obs, actions):
            values = obs[:, 0]
            return values, values, values

        def value(self, obs):
            return obs[:, 0]

    def actions(*lengths):
        with RolloutCollector(
            lambda: CountingEnv(7), num_envs=3, seed=0, num_workers=num_workers
        ) as collector:
            policy = Chance()
            return torch.cat([collector.collect(policy, length).actions for length in lengths])

    one = actions(12)
    assert 0 < one.float().mean() < 1
    assert torch.equal(one, actions(1, 5, 1, 5))
    assert torch.equal(one, actions(2, 10))


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda obs: torch.zeros(len(obs), 1), r"Tensor \[5, 1\]"),
        (lambda obs: torch.zeros(()), r"Tensor \[\]"),
        (lambda obs: np.zeros(len(obs)), r"ndarray \[5\]"),
        (lambda obs: (torch.zeros(len(obs)), 0), r"Tensor \[5\], int \[\]"),
    ],
)
def test_actions_of_a_wrong_shape_or_type_are_named_with_what_was_wanted(answer, got):
    class Answering:
        def act(self, obs):
            return answer(obs)

    calls = PolicyCalls(Answering(), CPU, torch.Generator(), 5, ACTIONS)
    calls.begin()
    with pytest.raises(ValueError, match=rf"act of Answering returned {got}, wanted Tensor \[5\]:"):
        calls.act(np.zeros((5, 3), np.float32), None, None)


def test_few_numbers_are_acted_on_by_one_thread():
    seen = []

    def look(x, *_):
        seen.append(torch.get_num_threads())
        return x

    call = RecordedCall(None, look, CPU)
    with threads(3):
        call.plainly(np.zeros(2**18, np.uint8))
        call.plainly(np.zeros(2**18, np.uint8), np.zeros(1, np.float32))
        assert torch.get_num_threads() == 3
    assert seen == [1, 3]
