"""An exported policy does what `act` does, without the library."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from nested_spaces import batches
from small_policies import OwnPolicy

from ppo import PolicyConfig, PPOAgent, PPOError, make_policy
from ppo.errors import MissingExtraError
from ppo.export import DeterministicPolicy
from ppo.policies.bodies import NatureCNN
from ppo.spaces import sub_spaces
from ppo.trees import leaves, leaves_with_paths, map_tree, rebuild

VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
FINE = spaces.Box(-3.0, 3.0, (2, 2), np.float64)
BOUNDS = spaces.Box(np.float32([-0.3, -np.inf]), np.float32([0.2, 0.1]))
SENSES = spaces.Dict(
    eye=spaces.Box(0, 255, (3,), np.uint8),
    near=spaces.Tuple((spaces.MultiBinary(2), spaces.Discrete(4, start=-1))),
    where=spaces.MultiDiscrete([3, 2], start=[1, 5], dtype=np.int32),
    speed=spaces.Box(-np.inf, np.inf, (2,), np.float64),
)
LIMBS = spaces.Dict(
    arm=spaces.Box(-1.0, 2.0, (2,), np.float32),
    fingers=spaces.MultiBinary(3),
    steps=spaces.Tuple(
        (spaces.Discrete(3, start=7), spaces.MultiDiscrete([[2, 3]], dtype=np.int32))
    ),
)
MASKED = spaces.Dict(action_mask=spaces.MultiBinary(5), speed=VECTOR)


class Own(OwnPolicy):
    """A policy of a user: asks for the length of the batch, and names its actions in any order."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        logits = self.actor(obs["speed"])
        return {"go": logits.argmax(-1), "by": logits.sum(-1).reshape(len(logits), 1)}


def small(**options):
    config = PolicyConfig(hidden_sizes=(8,), output_gain=3.0, **options)
    return lambda *spaces_: make_policy(*spaces_, config, seed=1)


# What is built, from what to what, and whether there is an input for masks.
CASES = {
    "lstm": (small(memory="lstm", memory_size=6), VECTOR, spaces.Discrete(3, start=2), False),
    "image": (small(cnn_features=16, precision="bfloat16"), IMAGE, BOUNDS, False),
    "beta": (small(distribution="beta", layer_norm=True), FINE, FINE, False),
    "bare": (small(distribution="squashed"), VECTOR, spaces.Box(-2.0, 1.0, ()), False),
    "nested": (small(distribution="squashed"), SENSES, LIMBS, True),
    "stacked": (
        small(memory="gru", memory_size=6, shared=True, frame_stack=3),
        MASKED,
        spaces.Discrete(5),
        False,
    ),
    "own": (
        Own,
        spaces.Dict(speed=VECTOR),
        spaces.Dict(by=spaces.Box(-9.0, 9.0, (1,)), go=spaces.Discrete(3)),
        False,
    ),
}


class Onnx:
    """A file in ONNX as a function; of torch nothing takes part."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, obs, options):
        feeds = {f"obs/{path}".rstrip("/"): leaf for path, leaf in leaves_with_paths(obs)}
        return self.session.run(None, feeds | options)


class Program:
    """A file of `torch.export` as a function."""

    def __init__(self, path):
        self.module = torch.export.load(path).module()

    def __call__(self, obs, options):
        tensors = {name: torch.from_numpy(array) for name, array in options.items()}
        result = self.module(map_tree(torch.from_numpy, obs), **tensors)
        return [leaf.detach().numpy() for leaf in leaves(result)]


class Exported:
    """An agent, its files, and the right answers."""

    def __init__(self, name, folder):
        build, observation_space, action_space, self.masked = CASES[name]
        torch.manual_seed(0)
        self.spaces = observation_space, action_space
        self.agent = PPOAgent(build(observation_space, action_space))
        policy = self.agent.policy
        if hasattr(policy, "update_normalizer"):
            policy.update_normalizer(batches(observation_space, 50, seed=3)[0])
        self.frames = getattr(policy, "frame_stack", 1)
        self.state_size = getattr(policy, "state_size", 0)
        self.paths = self.agent.export(folder / name, masked=self.masked)
        for part in policy.modules():
            if isinstance(part, NatureCNN):  # files compute in float32
                part.precision = "float32"

    def observations(self, rows, seed):
        """A batch as a vector environment would give it."""
        space, rng = self.spaces[0], np.random.default_rng(seed)
        space.seed(seed)
        obs = map_tree(lambda *leaf: np.stack(leaf), *(space.sample() for _ in range(rows)))
        if "action_mask" in getattr(space, "spaces", {}):
            obs["action_mask"][np.arange(rows), rng.integers(5, size=rows)] = 1
        return obs

    def masks(self, rows, seed):
        """Masks for `LIMBS`: three times two, three, two and three choices."""
        masks = np.random.default_rng(seed).random((rows, 14)) < 0.6
        masks[:, [0, 2, 4, 6, 9, 11]] = True  # something is left of each
        return masks


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    return Exported(request.param, tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("rows", [1, 5])
def test_both_files_do_what_act_does(exported, rows):
    onnx, program = (run(path) for run, path in zip((Onnx, Program), exported.paths, strict=True))
    state, memory, seen = None, np.zeros((rows, exported.state_size), np.float32), []
    chosen = []
    for step in range(4):
        obs = exported.observations(rows, seed=step)
        seen = [*(seen or [obs] * exported.frames)[1:], obs]
        given = map_tree(lambda *f: np.stack(f, 1), *seen) if exported.frames > 1 else obs
        options, masks = {}, {}
        if exported.masked:
            options["action_mask"] = masks["action_mask"] = exported.masks(rows, seed=step)
        if exported.state_size:
            options["state"] = memory
        answer = exported.agent.act(obs, state=state, **masks)
        if exported.state_size:
            answer, state = answer
            memory = state.memory
        wanted = [np.asarray(leaf) for leaf in leaves(answer)]
        chosen.append(wanted)
        for outputs in (onnx(given, options), program(given, options)):
            *actions, after = [*outputs, None] if state is None else outputs
            assert len(actions) == len(wanted)
            for action, leaf in zip(actions, wanted, strict=True):
                assert action.dtype == leaf.dtype
                np.testing.assert_allclose(action, leaf, rtol=0.0, atol=1e-5)
            if state is not None:
                np.testing.assert_allclose(after, memory, rtol=0.0, atol=1e-5)
            first = [np.asarray(action[0]) for action in actions]  # a Box warns of bare numbers
            sample = rebuild(sub_spaces(exported.spaces[1]), first)
            assert exported.spaces[1].contains(sample)
    # Neither constant nor all at a bound: it was a comparison.
    assert all(len(np.unique(np.concatenate(leaf))) > 1 for leaf in zip(*chosen, strict=True))


def test_what_is_exported_does_what_act_does_before_it_is(exported):
    """The module itself, run as torch runs modules."""
    agent, rows = exported.agent, 5
    module = DeterministicPolicy(agent.policy, *exported.spaces).eval()
    obs = exported.observations(rows, seed=0)
    given = map_tree(lambda x: np.stack([x] * exported.frames, 1), obs)
    given = map_tree(torch.from_numpy, given if exported.frames > 1 else obs)
    options, masks = {}, {}
    if exported.masked:
        masks["action_mask"] = exported.masks(rows, seed=0)
        options["action_mask"] = torch.from_numpy(masks["action_mask"])
    if exported.state_size:
        options["state"] = torch.zeros(rows, exported.state_size)
    with torch.no_grad():
        actions = module(given, **options)
    answer = agent.act(obs, **masks)
    if exported.state_size:
        (actions, memory), (answer, state) = actions, answer
        np.testing.assert_allclose(memory, state.memory, rtol=0.0, atol=1e-6)
    for action, leaf in zip(leaves(actions), leaves(answer), strict=True):
        assert action.numpy().dtype == np.asarray(leaf).dtype
        np.testing.assert_allclose(action, leaf, rtol=0.0, atol=1e-6)


def test_inputs_and_outputs_are_called_by_the_leaves(exported):
    onnx = Onnx(exported.paths[0])
    roots = zip(("obs", "action"), exported.spaces, strict=True)
    wanted = [
        [f"{root}/{path}".rstrip("/") for path, _ in leaves_with_paths(sub_spaces(space))]
        for root, space in roots
    ]
    options = ["action_mask"] * exported.masked + ["state"] * (exported.state_size > 0)
    assert list(onnx.inputs) == [*wanted[0], *options]
    assert onnx.outputs == [*wanted[1], *["next_state"] * (exported.state_size > 0)]
    assert {value.shape[0] for value in onnx.inputs.values()} == {"batch"}


class Flat(OwnPolicy):
    """A small policy with its spaces."""

    observation_space, action_space = VECTOR, spaces.Discrete(3)


class Deciding(Flat):
    """Looks at values to decide what to compute."""

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        return super().act(obs if obs.mean() > 0 else -obs, deterministic=deterministic)


def test_a_program_needs_no_extra_and_leaves_the_agent_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    agent = PPOAgent(Flat())
    before = {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}
    random = torch.get_rng_state()
    assert agent.export(str(tmp_path / "agent.pt2")) == [tmp_path / "agent.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["agent.pt2"]
    assert agent.policy.training
    assert torch.equal(torch.get_rng_state(), random)
    after = agent.policy.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ppo-gae\[export\]'"):
        PPOAgent(Flat()).export(tmp_path / "agent")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_cannot_be_followed_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "agent.pt2"
    path.write_bytes(b"an older one")
    with pytest.raises(
        PPOError, match=r"(?s)cannot be exported: .*(branching|control flow).*obs\.mean"
    ):
        PPOAgent(Deciding()).export(path)
    assert path.read_bytes() == b"an older one"


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    path = tmp_path / "agent.pt2"
    path.mkdir()
    with pytest.raises(PPOError, match="cannot be written"):
        PPOAgent(Flat()).export(path)
    assert list(tmp_path.iterdir()) == [path]


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.safetensors', wanted '.onnx', '.pt2'"):
        PPOAgent(Flat()).export(tmp_path / "agent.safetensors")


@pytest.mark.parametrize(
    "policy", [Flat, lambda: make_policy(VECTOR, FINE)], ids=["no argument", "no choices"]
)
def test_masks_need_something_to_mask(policy, tmp_path):
    with pytest.raises(ValueError, match="nothing can be masked"):
        PPOAgent(policy()).export(tmp_path / "agent.pt2", masked=True)


def test_without_a_policy_there_is_nothing_to_export(tmp_path):
    with pytest.raises(PPOError, match="nothing to export"):
        PPOAgent().export(tmp_path / "agent")
