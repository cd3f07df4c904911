import errno
import json
import os
import pathlib
import pickle
import shutil
import struct
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from breaking import break_at
from environments import CountingEnv
from forging import change_document, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from small_policies import assert_bitwise_equal, parts
from strategies import seeds

from ppo import PolicyConfig, PPOAgent, PPOConfig
from ppo.checkpoint import FORMAT_VERSION, read_checkpoint, versions, write_checkpoint
from ppo.errors import CheckpointError

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SMALL = PPOConfig(
    num_envs=2, num_steps=8, num_epochs=1, minibatch_size=8, policy=PolicyConfig(hidden_sizes=(4,))
)
GROUPS = {
    "policy": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)},
    "optimizer": {"actor.step": torch.tensor(3.0)},
}
DOCUMENT = {"steps": 3, "seed": 2**70, "name": "é\n\x00", "list": [1.5, None, True, {"a": {}}]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An agent and its file; copy the file before you break it."""
    path = tmp_path_factory.mktemp("saved") / "agent.safetensors"
    agent = PPOAgent(config=SMALL).learn(CountingEnv, 1)
    agent.save(path)
    return agent, path


@pytest.fixture
def file(saved, path):
    shutil.copy(saved[1], path)
    return path


def assert_equal(groups, wanted):
    assert {g: set(tensors) for g, tensors in groups.items()} == {
        g: set(tensors) for g, tensors in wanted.items()
    }
    for group, tensors in wanted.items():
        for name, tensor in tensors.items():
            assert groups[group][name].dtype == tensor.dtype, name
            assert torch.equal(groups[group][name], tensor), name


# What is written is read


def test_tensors_and_document_come_back_exactly(path):
    write_checkpoint(path, GROUPS, DOCUMENT)
    groups, document = read_checkpoint(path)
    assert_equal(groups, GROUPS)
    assert document == DOCUMENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.ones(2, 3).t(),
        torch.arange(10)[::3],
        torch.tensor([True, False]),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0], dtype=torch.float16),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(1).expand(4),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_every_kind_of_tensor_comes_back(path, tensor):
    write_checkpoint(path, {"group": {"a.b/c": tensor}}, {})
    groups, _ = read_checkpoint(path)
    assert_equal(groups, {"group": {"a.b/c": tensor.detach()}})


def test_tensors_that_share_memory_are_written_each(path):
    weight = torch.ones(3)
    write_checkpoint(path, {"policy": {"one": weight, "other": weight, "part": weight[:2]}}, {})
    assert_equal(
        read_checkpoint(path)[0],
        {"policy": {"one": torch.ones(3), "other": torch.ones(3), "part": torch.ones(2)}},
    )


def test_writing_leaves_the_tensors_to_their_owner(path):
    weight = torch.ones(3)
    write_checkpoint(path, {"policy": {"weight": weight}}, {})
    weight.fill_(5.0)
    groups, _ = read_checkpoint(path)
    assert groups["policy"]["weight"].tolist() == [1.0, 1.0, 1.0]
    groups["policy"]["weight"].fill_(7.0)
    assert read_checkpoint(path)[0]["policy"]["weight"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_non_finite_tensors_are_not_written(path, value, dtype):
    write_checkpoint(path, GROUPS, DOCUMENT)
    broken = {"policy": {"weight": torch.tensor([0.0, value], dtype=dtype)}}
    with pytest.raises(CheckpointError, match=r"policy/weight.*finite"):
        write_checkpoint(path, broken, {})
    assert_equal(read_checkpoint(path)[0], GROUPS)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [np.ones(2), {1, 2}, object(), b"bytes", torch.ones(1)])
def test_a_document_that_is_no_json_is_not_written(path, value):
    write_checkpoint(path, GROUPS, DOCUMENT)
    with pytest.raises((CheckpointError, TypeError)):
        write_checkpoint(path, GROUPS, {"steps": value})
    assert read_checkpoint(path)[1] == DOCUMENT
    assert list(path.parent.iterdir()) == [path]


def test_the_versions_that_numbers_depend_on_are_kept(saved):
    _, document = read_checkpoint(saved[1])
    assert document["versions"] == versions()
    assert {"ppo", "python", "torch", "numpy", "gymnasium"} <= set(versions())


# A crash while writing


class Crash(BaseException):
    """The process ends here: no handler of ordinary errors sees it."""


def raiser(error):
    def end():
        raise error

    return end


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_save_writes_flushes_syncs_and_only_then_replaces(path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = break_at(patch, 10_000)
        write_checkpoint(path, GROUPS, DOCUMENT)
    order = [calls.index(name) for name in ("open file", "write", "flush", "fsync", "replace")]
    assert order == sorted(order)
    assert "fsync" in calls[calls.index("replace") :]  # of the folder


@pytest.mark.parametrize("error", [Crash(), NO_SPACE], ids=["crash", "full disk"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_save_that_breaks_anywhere_leaves_the_old_file_or_the_new(
    path, monkeypatch, error, existed
):
    number, finished = 0, False
    while not finished:
        for leftover in path.parent.iterdir():
            leftover.unlink()
        if existed:
            write_checkpoint(path, GROUPS, {"steps": "old"})
        raised = None
        with monkeypatch.context() as patch:
            calls = break_at(patch, number, raiser(error))
            try:
                write_checkpoint(path, GROUPS, {"steps": "new"})
            except (Crash, CheckpointError) as caught:
                raised = caught
        finished = len(calls) <= number
        replaced = "replace" in calls[:number]
        if raised is not None and not isinstance(raised, Crash):
            assert not replaced, calls  # an error says: nothing was saved
            assert [f for f in path.parent.iterdir() if f != path] == []
        if replaced:
            assert read_checkpoint(path)[1] == {"steps": "new"}
        elif existed:
            assert read_checkpoint(path)[1] == {"steps": "old"}
        else:
            assert not path.exists()
        # What a crash leaves is no checkpoint to anybody who looks for one.
        assert set(path.parent.glob("*.safetensors")) <= {path}
        number += 1
    assert number > 5


def cut(fd, size):
    os.ftruncate(fd, size - 1)


def flip(fd, size):
    os.pwrite(fd, b"\xff", size - 1)


@pytest.mark.parametrize("damage", [cut, flip])
def test_what_the_disk_does_not_keep_never_takes_the_place_of_the_old_file(
    path, monkeypatch, damage
):
    write_checkpoint(path, GROUPS, {"steps": "old"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: damage(fd, os.fstat(fd).st_size))
        with pytest.raises(CheckpointError, match=r"agent\.safetensors.*give back"):
            write_checkpoint(path, GROUPS, {"steps": "new"})
    assert read_checkpoint(path)[1] == {"steps": "old"}
    assert list(path.parent.iterdir()) == [path]


def test_what_a_crash_left_behind_is_no_obstacle(path, monkeypatch):
    with monkeypatch.context() as patch:
        break_at(patch, 1, raiser(Crash()))
        with pytest.raises(Crash):
            write_checkpoint(path, GROUPS, {"steps": "old"})
    write_checkpoint(path, GROUPS, {"steps": "new"})
    assert read_checkpoint(path)[1] == {"steps": "new"}


def test_a_folder_that_does_not_exist_is_an_error(path):
    with pytest.raises(CheckpointError, match="missing"):
        write_checkpoint(path.parent / "missing" / "agent.safetensors", GROUPS, {})


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / "agent").mkdir()
    with pytest.raises(CheckpointError, match="agent"):
        write_checkpoint(tmp_path / "agent", GROUPS, {})
    with pytest.raises(CheckpointError, match="agent"):
        read_checkpoint(tmp_path / "agent")
    assert [f.name for f in tmp_path.iterdir()] == ["agent"]


# Files that are no checkpoints


def refused(path, match=None):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError):
        PPOAgent.load(path)


def test_a_missing_file_is_named(path):
    refused(path, match="no checkpoint")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000, -100, -1])
def test_a_truncated_file_is_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    refused(file)


@pytest.mark.parametrize("extra", [b"\x00", b"x" * 1000])
def test_a_file_that_goes_on_is_refused(file, extra):
    file.write_bytes(file.read_bytes() + extra)
    refused(file)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_noticed_or_harmless(saved, tmp_path_factory, data):
    agent, original = saved
    content = bytearray(original.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    positions = st.integers(0, header - 1) | st.integers(header, len(content) - 1)
    position = data.draw(positions)
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(content)
    try:
        loaded = PPOAgent.load(path)
    except CheckpointError:
        return
    # Only padding and the names of unread entries may change without notice.
    assert position < header
    for name, tensor in agent.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name
    assert loaded.config == agent.config


@settings(max_examples=40, deadline=None)
@given(seed=seeds, length=st.integers(0, 2000))
def test_noise_is_refused(tmp_path_factory, seed, length):
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(np.random.default_rng(seed).bytes(length))
    refused(path)


@pytest.mark.parametrize(
    "length", [0, 1, 2**20, 10**8, 10**8 + 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
)
def test_a_header_of_absurd_length_is_refused(path, length):
    path.write_bytes(struct.pack("<Q", length) + b'{"a":' * 100)
    refused(path)


def with_header(path, header):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    "shape", [[2**62], [2**31, 2**31], [10**18, 0], [-1], [2**64], ["x"], [1.5]]
)
def test_a_tensor_of_absurd_size_is_refused(path, shape):
    with_header(path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    refused(path)


def test_a_header_nested_without_end_is_refused(path):
    text = b'{"a":' * 200_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(path)


def test_rewriting_without_a_change_is_accepted(file):
    rewrite(file, lambda metadata, tensors: None)
    PPOAgent.load(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, t: t.update({"policy/value_head.bias": torch.ones(1)}),
        lambda m, t: t.update({"policy/extra": torch.ones(1)}),
        lambda m, t: t.pop("policy/value_head.bias"),
        lambda m, t: m.update(document=m["document"].replace('"steps": ', '"steps": 1')),
        lambda m, t: m.update(document=m["document"] + " "),
        lambda m, t: m.update(sha256="0" * 64),
        lambda m, t: m.update(sha256=""),
        lambda m, t: m.pop("sha256"),
    ],
)
def test_the_checksum_covers_tensors_and_document(file, change):
    def altered(metadata, tensors):
        metadata["honest"] = "1"  # keep the old checksum
        change(metadata, tensors)

    rewrite(file, altered)
    refused(file, match="damaged")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "not a checkpoint"),
        ({"format_version": "2"}, "'2'"),
        ({"format_version": "0"}, "'0'"),
        ({"format_version": "1.0"}, "'1.0'"),
        ({"format_version": ""}, "format"),
    ],
)
def test_another_format_or_version_is_named(file, change, match):
    rewrite(file, lambda metadata, tensors: metadata.update(change))
    refused(file, match=match)


def test_a_safetensors_file_of_somebody_else_is_refused(path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    refused(path, match="not a checkpoint")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pathlib.Path(os.environ["PPO_TEST_PAYLOAD"]).touch, ())


def write_pickle(path, payload):
    path.write_bytes(pickle.dumps(payload))


def write_torch(path, payload):
    torch.save({"policy": {"weight": torch.ones(2)}, "x": payload}, path)


def write_old_torch(path, payload):
    torch.save({"x": payload}, path, _use_new_zipfile_serialization=False)


def write_numpy(path, payload):
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


def write_numpy_archive(path, payload):
    with path.open("wb") as file:
        np.savez(file, x=np.array([payload], dtype=object))


@pytest.fixture(scope="module")
def unpickled():
    """Everything this process looks up for unpickling; a hook cannot be taken back."""
    found = []
    sys.addaudithook(lambda event, args: event == "pickle.find_class" and found.append(args))
    return found


@pytest.mark.parametrize(
    "write", [write_pickle, write_torch, write_old_torch, write_numpy, write_numpy_archive]
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "pkl", "npz", "zip", ""])
def test_no_file_runs_code_under_any_name(tmp_path, write, suffix, monkeypatch, unpickled):
    trace = tmp_path / "it ran"
    monkeypatch.setenv("PPO_TEST_PAYLOAD", str(trace))
    path = tmp_path / f"agent.{suffix}"
    write(path, Payload())
    unpickled.clear()
    refused(path)
    assert unpickled == []
    assert not trace.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": 3},
        {"config": []},
        {"config": {"gama": 0.9}},
        {"config": {"gamma": 2}},
        {"config": {"gamma": "__import__('os')"}},
        {"config": {"policy": {"hidden_sizes": [4, 4]}}},
        {"config": {"policy": {"hidden_sizes": [10**7, 10**7]}}},
        {"observation_space": None},
        {"observation_space": {"type": "Tuple"}},
        {"observation_space": {"type": "Discrete", "n": 2, "start": 0}},
        {
            "observation_space": {
                "type": "Box",
                "low": 0,
                "high": 1,
                "shape": [10**15],
                "dtype": "float32",
            }
        },
        {"observation_space": {"type": "Box", "low": 0, "high": 1, "shape": [3], "dtype": "O"}},
        {"action_space": {"type": "Discrete", "n": 3, "start": 0}},
        {"action_space": {"type": "Discrete", "n": -3, "start": 0}},
        {"action_space": {"type": "Discrete", "n": 10**15, "start": 0}},
        {"action_space": None},
        {"seed": None},
        {"seed": "x"},
        {"seed": -1},
        {"steps": None},
        {"steps": "many"},
        {"steps": -1},
        {"updates": [1]},
        {"goal": {"a": 1}},
        {"learn_calls": "x"},
        {"recent_episodes": [[1.0]]},
        {"recent_episodes": 3},
        {"frozen": ["nobody.weight"]},
        {"frozen": 3},
        {"frozen_in_optimizer": ["nobody.weight"]},
        {"frozen_in_optimizer": ["value_head.weight"]},
        {"frozen_in_optimizer": [[]]},
        {"optimizer_order": 3},
        {"optimizer_order": {"actor": 3}},
        {"optimizer_order": {"actor": [3]}},
        {"optimizer_order": {"actor": [["nobody.weight", 12]]}},
        {"optimizer_order": {}},
    ],
    ids=str,
)
def test_a_document_that_makes_no_sense_is_refused(file, changes):
    change_document(file, **changes)
    with pytest.raises(CheckpointError) as caught:
        PPOAgent.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "hidden_sizes",
    [[3000, 3000], [10**9], [10**9, 10**9], [10**12, 10**12], [10**30], [4, 4], [], [4] * 5000],
    ids=lambda sizes: str(sizes)[:30],
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_any_weight_is_drawn(
    file, hidden_sizes, monkeypatch
):
    drawn = []
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda *args, **kwargs: drawn.append(args))
    change_document(file, config=SMALL.to_dict() | {"policy": {"hidden_sizes": hidden_sizes}})
    with pytest.raises(CheckpointError, match="does not fit"):
        PPOAgent.load(file)
    assert drawn == []


def test_loading_draws_no_weights(saved, monkeypatch):
    drawn = []
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda *args, **kwargs: drawn.append(args))
    loaded = PPOAgent.load(saved[1])
    assert drawn == []
    buffers = dict(saved[0].policy.named_buffers())  # also those that are not in the file
    for name, tensor in loaded.policy.named_buffers():
        assert torch.equal(tensor, buffers[name]), name


@pytest.fixture
def default_dtype():
    """Sets torch's; it is put back."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("made", [torch.float32, torch.float64])
@pytest.mark.parametrize("converted", [torch.float32, torch.float64])
@pytest.mark.parametrize("here", [torch.float32, torch.float64])
def test_an_agent_is_loaded_in_the_precision_of_its_file(
    made, converted, here, path, default_dtype
):
    default_dtype(made)
    agent = PPOAgent(config=SMALL).learn("Pendulum-v1", 16)
    agent.policy.to(converted)
    agent.learn("Pendulum-v1", 16)
    agent.save(path)
    default_dtype(here)
    loaded = PPOAgent.load(path)
    assert {parameter.dtype for parameter in loaded.policy.parameters()} == {converted}
    default_dtype(torch.float32)
    for one in (agent, loaded):
        one.learn("Pendulum-v1", 2 * 16)
    assert_bitwise_equal(*(parts(one.policy, one._learner) for one in (agent, loaded)))


def test_tensors_of_several_precisions_are_refused(file):
    def change(metadata, tensors):
        tensors["policy/actor_body.1.weight"] = tensors["policy/actor_body.1.weight"].double()

    rewrite(file, change)
    with pytest.raises(CheckpointError, match=r"float64 .* in the file, and torch.float32"):
        PPOAgent.load(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"config": 1}', "[" * 100_000])
def test_a_document_that_is_no_object_is_refused(file, text):
    rewrite(file, lambda metadata, tensors: metadata.update(document=text))
    with pytest.raises(CheckpointError):
        PPOAgent.load(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("policy/value_head.bias"),
        lambda t: t.update({"policy/extra": torch.ones(1)}),
        lambda t: t.update({"policy/value_head.bias": torch.ones(2)}),
        lambda t: t.pop("optimizer/actor.step"),
        lambda t: t.update({"optimizer/actor.exp_avg": torch.ones(1)}),
        lambda t: [t.pop(name) for name in list(t) if name.startswith("optimizer/")],
        lambda t: [t.pop(name) for name in list(t) if name.startswith("policy/")],
        lambda t: [t.pop(name) for name in list(t) if name.startswith("generators/")],
        lambda t: t.update({"generators/minibatches": torch.zeros(3, dtype=torch.uint8)}),
        lambda t: t.update({"generators/minibatches": torch.zeros(3)}),
        lambda t: t.pop("reward_scaler/mean"),
        lambda t: t.update({"reward_scaler/returns": torch.zeros(())}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(file, change):
    rewrite(file, lambda metadata, tensors: change(tensors))
    with pytest.raises(CheckpointError) as caught:
        PPOAgent.load(file)
    assert str(file) in str(caught.value)


# Old files


def test_a_file_that_does_not_say_what_is_frozen_stays_loadable(file):
    change_document(file, frozen=None, frozen_in_optimizer=None)
    policy = PPOAgent.load(file).policy
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_a_file_that_does_not_name_the_parameters_of_the_optimizer_stays_loadable(saved, file):
    change_document(file, optimizer_order=None)
    loaded, state = PPOAgent.load(file), saved[0]._learner.state_dict()
    for name, tensor in loaded._learner.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_file_of_format_version_1_stays_loadable():
    # Written by PPOAgent(config=..., seed=1).learn("CartPole-v1", 64) of version 0.1.0.
    path = FIXTURES / "checkpoint_v1.safetensors"
    groups, document = read_checkpoint(path)
    agent = PPOAgent.load(path)
    assert FORMAT_VERSION >= 1
    assert (agent.steps, agent.updates, agent.goal, agent.seed) == (64, 4, 64, 1)
    assert agent.config == PPOConfig(
        env="CartPole-v1",
        num_envs=2,
        num_workers=0,
        num_steps=8,
        num_epochs=1,
        minibatch_size=8,
        learning_rate={"linear": [1e-3, 0]},
        policy=PolicyConfig(hidden_sizes=(4,), output_gain=1.0),
    )
    for name, tensor in agent.policy.state_dict().items():
        assert torch.equal(tensor, groups["policy"][name]), name
    obs = np.float32([[0.0, 0.5, 0.1, -0.5], [0.0, -0.5, -0.1, 0.5]])
    logits = agent.policy.distribution(torch.from_numpy(obs)).log_p
    wanted = [[-1.1156963, -0.3970313], [-0.3137490, -1.3119380]]
    np.testing.assert_allclose(logits.detach(), wanted, rtol=1e-4)
    assert agent.act(obs).tolist() == [1, 0]
    assert document["recent_episodes"] == [list(episode) for episode in agent._recent]
    agent.learn("CartPole-v1", 16)
    assert agent.steps == 80
