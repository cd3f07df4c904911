"""Files made to do harm: changed in every way, or carrying code; nothing runs, nothing moves."""

import contextlib
import copy
import json
import math
import random
import shutil
import struct
import sys
import time
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from environments import CountingEnv
from forging import change_document, edit_document, rewrite
from processes import run_script

from ppo import PolicyConfig, PPOAgent, PPOConfig, make_policy
from ppo.checkpoint import all_or_nothing, read_episodes
from ppo.errors import CheckpointError, NonFiniteError

SMALL = PPOConfig(
    num_envs=2, num_steps=8, num_epochs=1, minibatch_size=8, policy=PolicyConfig(hidden_sizes=(4,))
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "agent.safetensors"
    PPOAgent(config=SMALL).learn(CountingEnv, 64).save(path)
    return path


@pytest.fixture
def file(original, tmp_path):
    return shutil.copy(original, tmp_path / "agent.safetensors")


# Three hundred mutations


def truncate(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def extend(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 5000])))


def flip_bits(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 2, 8, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def wipe_a_block(path, rng):
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    block = data[start : start + 512]
    data[start : start + 512] = bytes(len(block)) if rng.random() < 0.5 else rng.randbytes(512)
    path.write_bytes(data)


def lie_about_the_header(path, rng):
    data = path.read_bytes()
    length = rng.choice([0, 1, len(data), 2**31, 2**63, 2**64 - 1, rng.randrange(len(data))])
    path.write_bytes(struct.pack("<Q", length) + data[8:])


def parts(path):
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def splice_another_header(path, rng):
    header, data = parts(path)
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    start, end = entry["data_offsets"]
    entry |= rng.choice(
        [
            {"dtype": rng.choice(["F64", "F16", "I64", "BOOL", "U8", "C64", "F8_E4M3", "X"])},
            {"shape": [rng.choice([0, 1, 7, 2**40, 2**63, -1])]},
            {"shape": entry["shape"][::-1]},
            {"data_offsets": [start, end + rng.choice([-4, 4, 2**40])]},
            {"data_offsets": [end, start]},
            {"data_offsets": [0, len(data)]},
        ]
    )
    if rng.random() < 0.3:
        header[f"{name}.twin"] = dict(entry)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def bring_foreign_tensors(path, rng):
    metadata = rng.choice([None, {"format": "pt"}, {"format": "ppo checkpoint"}])
    tensors = {"weight": torch.ones(rng.randrange(5), 3)}
    safetensors.torch.save_file(tensors, path, metadata)


def forge_a_tensor(path, rng):
    def change(metadata, tensors):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        tensors[name] = rng.choice(
            [
                lambda: tensor.double(),
                lambda: tensor.half(),
                lambda: tensor.to(torch.int64),
                lambda: tensor.to(torch.bfloat16),
                lambda: tensor > 0,
                lambda: tensor.reshape(-1, 1),
                lambda: tensor.reshape(-1)[:-1].clone(),
                lambda: torch.cat([tensor.reshape(-1)] * 2),
                lambda: torch.full_like(tensor.float(), rng.choice([math.nan, math.inf])),
                lambda: torch.full_like(tensor.float(), rng.choice([-1.0, -1e30, 1e38])),
                lambda: torch.full_like(tensor, rng.choice([0, 1, 100])),
                lambda: -tensor.to(tensor.dtype),
                lambda: torch.empty(0, 5),
            ]
        )()
        if rng.random() < 0.2:
            tensors[name + rng.choice(["x", "/", "/../x", "\n"])] = tensors.pop(name)

    rewrite(path, change)


VALUES = (
    *(None, True, False, 0, -1, 3, 2**31, 2**64, -(2**70), 10**300, 1.5, -0.0, 1e308),
    *(
        math.nan,
        math.inf,
        "",
        "x",
        "1",
        "../../x",
        "os.system",
        "__import__('os')",
        "\x00",
        "é" * 9,
    ),
    *([], [[]], {}, [0], [1, 2, 3], {"linear": [1, 0]}, {"type": "Box"}, {"": {}}),
    "!!python/object/apply:os.system [x]",
    [[1.0, 2, 3]] * 1000,
)


def places(node):
    """Every (container, key) of a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def forge_the_document(path, rng):
    def edit(document):
        for _ in range(rng.choice([1, 1, 1, 3])):
            node, key = rng.choice(list(places(document)))
            what = rng.random()
            if what < 0.2:
                del node[key]
            elif what < 0.3 and isinstance(node, dict):
                node[rng.choice(["x", "env", "type", "shape", "seed"])] = rng.choice(VALUES)
            else:
                node[key] = rng.choice(VALUES)

    edit_document(path, edit)


MUTATIONS = {
    truncate: 25,
    extend: 10,
    flip_bits: 35,
    wipe_a_block: 25,
    lie_about_the_header: 20,
    splice_another_header: 30,
    bring_foreign_tensors: 5,
    forge_a_tensor: 60,
    forge_the_document: 100,
}


def state_of(policy):
    return {
        "tensors": {name: t.clone() for name, t in policy.state_dict().items()},
        "frozen": [name for name, p in policy.named_parameters() if not p.requires_grad],
        "gradients": [p.grad for p in policy.parameters()],
        "modes": [module.training for module in policy.modules()],
    }


def same_state(one, other):
    return (
        one["tensors"].keys() == other["tensors"].keys()
        and all(torch.equal(t, other["tensors"][name]) for name, t in one["tensors"].items())
        and one["frozen"] == other["frozen"]
        and all(a is b for a, b in zip(one["gradients"], other["gradients"], strict=True))
        and one["modes"] == other["modes"]
    )


def generators():
    numpys = np.random.get_state()  # noqa: NPY002
    return random.getstate(), torch.get_rng_state().tolist(), numpys[1].tolist(), numpys[2]


def own_policy(path):
    """A policy that fits the original, with values, gradients and frozen parts of its own."""
    policy = make_policy(CountingEnv.observation_space, CountingEnv.action_space, SMALL.policy)
    for index, parameter in enumerate(policy.parameters()):
        parameter.grad = torch.ones_like(parameter) if index % 2 else None
        parameter.requires_grad_(index % 3 != 0)
    policy.value_head.eval()
    return policy


def assert_valid(agent, policy, folder):
    action = agent.act(agent.observation_space.sample())
    assert agent.action_space.contains(action)
    agent.save(folder / "again.safetensors")
    PPOAgent.load(folder / "again.safetensors", policy=policy)
    spaces = (agent.observation_space, agent.action_space)
    if (agent.config, spaces) == (SMALL, (CountingEnv.observation_space, CountingEnv.action_space)):
        with contextlib.suppress(NonFiniteError):  # weights of 1e38 are finite, but not for long
            agent.learn(CountingEnv, 1)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_mutated_file_is_a_typed_error_or_a_valid_agent(mutate, original, tmp_path):
    refused = 0
    for number in range(MUTATIONS[mutate]):
        path = shutil.copy(original, tmp_path / "mutated.safetensors")
        mutate(path, random.Random(number))
        policy = own_policy(path)
        before, drawn = state_of(policy), generators()
        for given in (None, policy):
            start = time.perf_counter()
            with warnings.catch_warnings():
                # A fingerprint of elsewhere is no fault.
                warnings.filterwarnings("ignore", ".*was written with")
                try:
                    agent = PPOAgent.load(path, policy=given)
                except CheckpointError as error:
                    assert str(path) in str(error)  # noqa: PT017
                    agent = None
            assert time.perf_counter() - start < 1.0, number
            assert generators() == drawn, number
            if agent is None:
                assert same_state(state_of(policy), before), number
                refused += 1
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*was written with")
                    assert_valid(agent, given, tmp_path)
    assert refused > 0


def test_three_hundred_mutations_are_tried():
    assert sum(MUTATIONS.values()) >= 300


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": True},
        {"steps": 2**200},
        {"seed": "5"},
        {"seed": [1, 2]},
        {"seed": True},
        {"recent_episodes": [["1", "2", "3"]]},
        {"recent_episodes": [[1.0, 2, 3, 4]]},
        {"recent_episodes": [[math.inf, 2, 3]]},
        {"recent_episodes": [{"a": 1, "b": 2, "c": 3}]},
        {"versions": 3},
        {"machine": {"cpu": 3}},
    ],
    ids=str,
)
def test_what_passes_for_a_number_but_is_none_is_refused(file, changes):
    change_document(file, **changes)
    with pytest.raises(CheckpointError):
        PPOAgent.load(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy/value_head.bias", torch.tensor([math.nan])),
        ("policy/value_head.bias", torch.tensor([1.0], dtype=torch.float64)),
        ("policy/value_head.bias", torch.tensor([1])),
        ("policy/normalizer.var", torch.tensor([-1.0, 1.0], dtype=torch.float64)),
        ("reward_scaler/m2", torch.tensor(-1.0, dtype=torch.float64)),
        ("reward_scaler/count", torch.tensor(3)),
        ("optimizer/actor.exp_avg_sq", -1.0),
        ("optimizer/actor.step", -1.0),
    ],
    ids=str,
)
def test_values_that_no_agent_can_have_are_refused_behind_an_honest_checksum(file, name, value):
    def change(metadata, tensors):
        assert name in tensors
        given = isinstance(value, torch.Tensor)
        tensors[name] = value if given else torch.full_like(tensors[name], value)

    rewrite(file, change)
    with pytest.raises(CheckpointError):
        PPOAgent.load(file)


def test_episodes_come_back_as_they_were():
    assert read_episodes({"recent_episodes": [[1, 2, 0], [0.5, 1, 3]]}) == [
        (1.0, 2, 0),
        (0.5, 1, 3),
    ]
    with pytest.raises(ValueError, match="recent_episodes"):
        read_episodes({})


# A failed load, at every stage


def late_in_the_policy(path):
    rewrite(path, lambda m, t: t.pop("policy/value_head.bias"))


def shape_in_the_policy(path):
    rewrite(path, lambda m, t: t.update({"policy/value_head.bias": torch.ones(3)}))


def negative_variance(path):
    bad = torch.full((2,), -1.0, dtype=torch.float64)
    rewrite(path, lambda m, t: t.update({"policy/normalizer.var": bad}))


def optimizer(path):
    rewrite(path, lambda m, t: [t.pop(name) for name in list(t) if "exp_avg_sq" in name])


def frozen(path):
    change_document(path, frozen=["nobody"])


def frozen_in_optimizer(path):
    change_document(path, frozen_in_optimizer=["value_head.weight"])


def reward_scaler(path):
    rewrite(path, lambda m, t: t.pop("reward_scaler/m2"))


def generator(path):
    rewrite(path, lambda m, t: t.update({"generators/acting": torch.zeros(3)}))


def counts(path):
    change_document(path, goal=-1)


def episodes(path):
    change_document(path, recent_episodes=3)


@pytest.mark.parametrize(
    "spoil",
    [
        late_in_the_policy,
        shape_in_the_policy,
        negative_variance,
        optimizer,
        frozen,
        frozen_in_optimizer,
        reward_scaler,
        generator,
        counts,
        episodes,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_load_that_fails_at_any_stage_leaves_the_callers_policy_as_it_was(spoil, file):
    spoil(file)
    policy = own_policy(file)
    tensors = [*policy.parameters(), *policy.buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    before, drawn = state_of(policy), generators()
    with pytest.raises(CheckpointError):
        PPOAgent.load(file, policy=policy)
    assert same_state(state_of(policy), before)
    now = [*policy.parameters(), *policy.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert generators() == drawn


def test_ctrl_c_while_loading_leaves_the_callers_policy_as_it_was(file, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ppo.checkpoint.read_episodes", interrupted)
    policy = own_policy(file)
    before = state_of(policy)
    with pytest.raises(KeyboardInterrupt):
        PPOAgent.load(file, policy=policy)
    assert same_state(state_of(policy), before)


def test_a_policy_that_was_moved_comes_back_from_a_load_that_fails(tmp_path):
    policy = torch.nn.BatchNorm1d(3)
    before = copy.deepcopy(policy.state_dict())

    def load():
        with all_or_nothing("my file", policy):
            policy.to("meta")
            policy.to(torch.float64)
            raise ValueError("half-way")

    with pytest.raises(CheckpointError, match="my file"):
        load()
    assert all(torch.equal(t, before[name]) for name, t in policy.state_dict().items())
    assert policy(torch.ones(2, 3)).shape == (2, 3)


def test_a_load_that_succeeds_after_one_that_failed_is_a_load(file, original):
    counts(file)
    policy = own_policy(file)
    with contextlib.suppress(CheckpointError):
        PPOAgent.load(file, policy=policy)
    agent = PPOAgent.load(original, policy=policy)
    alone = PPOAgent.load(original)
    for one in (agent, alone):
        one.learn(CountingEnv, 32)
    for name, tensor in alone.policy.state_dict().items():
        assert torch.equal(tensor, agent.policy.state_dict()[name]), name


# The fingerprint


def elsewhere(path, part, **entries):
    edit_document(path, lambda document: document[part].update(entries))


@pytest.mark.parametrize(
    ("part", "entries", "said"),
    [
        ("versions", {"torch": "1.0"}, r"torch 1\.0 \(here "),
        ("versions", {"python": "2.7.18"}, r"python 2\.7\.18 \(here "),
        ("versions", {"python": f"{sys.version_info.major}.99.1"}, r"python 3\.99\.1"),
        ("versions", {"ppo": "9.9"}, r"ppo 9\.9"),
        ("machine", {"threads": "64"}, r"threads 64 \(here 1\)"),
        ("machine", {"cpu": "Abacus"}, "cpu Abacus"),
        ("machine", {"cpu_capability": "BEADS"}, "cpu_capability BEADS"),
    ],
)
def test_what_differs_from_where_a_file_was_written_is_named(file, part, entries, said):
    elsewhere(file, part, **entries)
    with pytest.warns(UserWarning, match=said) as caught:
        PPOAgent.load(file)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(file) in str(caught[0].message)


def test_all_that_differs_is_said_at_once(file):
    elsewhere(file, "versions", torch="1.0", numpy="0.1")
    elsewhere(file, "machine", cpu="Abacus")
    with pytest.warns(UserWarning, match=r"torch 1\.0.*numpy 0\.1.*cpu Abacus") as caught:
        PPOAgent.load(file)
    assert len(caught) == 1


def test_a_file_of_this_machine_is_loaded_without_a_word(file):
    PPOAgent.load(file)


def test_a_bug_fix_of_python_is_not_worth_a_warning(file):
    elsewhere(file, "versions", python=f"{sys.version_info.major}.{sys.version_info.minor}.99")
    PPOAgent.load(file)


def test_another_number_of_threads_is_noticed_for_real(file):
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match=r"threads 1 \(here 2\)"):
            PPOAgent.load(file)
    finally:
        torch.set_num_threads(1)


def test_a_warning_that_is_an_error_leaves_the_callers_policy_as_it_was(file):
    elsewhere(file, "machine", cpu="Abacus")
    policy = own_policy(file)
    before = state_of(policy)
    with pytest.raises(UserWarning, match="Abacus"):
        PPOAgent.load(file, policy=policy)
    assert same_state(state_of(policy), before)


# Files that carry code

PAYLOADS = r"""
import gzip, io, json, os, pickle, shutil, sys, tarfile, warnings, zipfile
from pathlib import Path
import numpy as np
import torch
import ppo.cli
from ppo import PPOAgent, PPOConfig
from ppo.cli.runs import RunFolder
from ppo.errors import ConfigError, PPOError

folder = Path(sys.argv[1])
os.chdir(folder)
sys.path.insert(0, str(folder))
(folder / "hostile_marker.py").write_text("open('it ran', 'w')")
config = PPOConfig(env="CartPole-v1", steps=64, num_envs=2, num_steps=32, num_workers=0)
run = RunFolder.create(config, out=folder, name="run")
run.save(PPOAgent(config=config).learn("CartPole-v1", 64))
run.finish(run.load())

class Call:
    def __init__(self, function, *arguments):
        self.how = function, arguments
    def __reduce__(self):
        return self.how

HARM = [
    Call(os.system, "touch 'it ran'"),
    Call(exec, "open('it ran', 'w')"),
    Call(__import__, "hostile_marker"),
    Call(eval, "open('it ran', 'w')"),
]

def old_tar(payload):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(payload)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()

def written(write):
    def make(payload):
        out = io.BytesIO()
        write(payload, out)
        return out.getvalue()
    return make

def a_zip_with_code(payload):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("__main__.py", "open('it ran', 'w')")
        archive.writestr("data.pkl", pickle.dumps(payload))
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
    return out.getvalue()

def objects(payload):
    return np.array([payload], dtype=object)

GOOD = run.checkpoints()[0].read_bytes()
FORMATS = {
    **{f"pickle {n}": lambda p, n=n: pickle.dumps(p, n) for n in range(6)},
    "torch zip": written(lambda p, out: torch.save({"policy": p}, out)),
    "torch old": written(lambda p, out: torch.save(p, out, _use_new_zipfile_serialization=False)),
    "torch tar": old_tar,
    "npy": written(lambda p, out: np.save(out, objects(p), allow_pickle=True)),
    "npz": written(lambda p, out: np.savez(out, x=objects(p))),
    "gzip": lambda p: gzip.compress(pickle.dumps(p)),
    "zip": a_zip_with_code,
    "before a good file": lambda p: pickle.dumps(p) + GOOD,
    "behind a good file": lambda p: GOOD + pickle.dumps(p),
    "python": lambda p: b"open('it ran', 'w')\n",
    "yaml": lambda p: b"!!python/object/apply:os.system [\"touch 'it ran'\"]\n",
    "yaml value": lambda p: b"gamma: !!python/object/apply:os.system [\"touch 'it ran'\"]\n",
    "yaml new": lambda p: b"env_kwargs: {a: !!python/object/new:os.system [\"touch 'it ran'\"]}\n",
}
SUFFIXES = ("safetensors", "pt", "pth", "ckpt", "pkl", "joblib", "npy", "npz", "zip", "tar",
            "yaml", "py", "pyc", "")
BAD = {"exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
       "pickle.find_class", "marshal.loads", "ctypes.dlopen", "code.__new__", "compile"}
happened, listening = [], False

def hook(event, arguments):
    if listening and (event in BAD or (event == "import" and "hostile" in str(arguments))):
        happened.append((event, str(arguments)[:200]))

def refused(action, *arguments, **keywords):
    global listening
    listening = True
    try:
        status = action(*arguments, **keywords)
    except (PPOError, ConfigError):
        status = 1
    finally:
        listening = False
    assert status in (1, 2), (action, arguments, status)
    assert not happened, (action, arguments, happened)
    assert not (folder / "it ran").exists(), (action, arguments)

def everything(data):
    count = 0
    for suffix in SUFFIXES:
        path = folder / f"payload.{suffix}"
        path.write_bytes(data)
        refused(PPOAgent.load, path)
        refused(PPOAgent.load, str(path), policy=torch.nn.Linear(2, 2))
        refused(PPOConfig.from_yaml, path)
        refused(RunFolder.open, path)
        refused(ppo.cli.main, ["train", str(path), "--out", str(folder / "new")])
        path.unlink()
        count += 5
    # In every place of a run where something is read.
    for path in [*run.checkpoints(), run.path / "final.safetensors"]:
        path.write_bytes(data)
    opened = RunFolder.open(run.path)
    refused(opened.load)
    refused(opened.load, best=True)
    refused(opened.resume)
    for command in ("resume", "evaluate", "play"):
        refused(ppo.cli.main, [command, str(run.path)])
    refused(ppo.cli.main, ["evaluate", str(run.path), "--best"])
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        path = run.path / name
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(data)
        opened = RunFolder.open(run.path)
        refused(lambda: (opened.metrics(), 1)[1])
        if name != "metrics.jsonl":
            refused(lambda: getattr(opened, {"config.yaml": "config", "run.json": "info"}[name]))
        path.write_bytes(before)
    return count + 12

# Whatever is imported late, or made by `exec` when first used, is so before anybody listens.
for text in (b"[", b"gamma: !!python/name:os.system 1", b"gama: 3"):
    everything(text)
sys.addaudithook(hook)
# The hook hears: this very payload runs where somebody unpickles it.
listening = True
pickle.loads(pickle.dumps(HARM[1]))
listening = False
assert {event for event, _ in happened} >= {"pickle.find_class", "exec"}, happened
(folder / "it ran").unlink()
happened.clear()
count = 0
for payload in HARM:
    for make in FORMATS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = make(payload)
        count += everything(data)
print(count)
"""


def test_no_payload_of_any_format_runs_under_any_name_by_any_way_in(tmp_path):
    status, out, err = run_script(tmp_path / "script.py", PAYLOADS, tmp_path)
    assert status == 0, err[-3000:]
    assert int(out.splitlines()[-1]) > 1000
