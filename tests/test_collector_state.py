"""Where the episodes of a run are, as a file says it: nothing that makes no sense is believed."""

import copy
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from environments import CountingEnv

from ppo import PolicyConfig, PPOAgent, PPOConfig
from ppo.checkpoint import read_checkpoint, write_checkpoint
from ppo.collector import CollectorState
from ppo.errors import CheckpointError
from ppo.packing import pack, unpack

CONFIG = PPOConfig(num_envs=3, num_steps=8, num_epochs=1, policy=PolicyConfig(hidden_sizes=(4,)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("forged") / "agent.safetensors"
    agent = PPOAgent(config=CONFIG)
    agent.learn(lambda: CountingEnv(length=50), 1000, callback=lambda report: False)
    agent.save(path)
    groups, document = read_checkpoint(path)
    arrays = {name: tensor.numpy() for name, tensor in groups.pop("episodes").items()}
    return path, groups, document, unpack(document.pop("episodes"), arrays)


def forge(parts, plain):
    path, groups, document, _ = parts
    forged, arrays = pack(plain)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    write_checkpoint(path, {**groups, "episodes": tensors}, {**document, "episodes": forged})
    return path


def test_the_parts_that_forgers_get_make_a_whole(parts):
    assert PPOAgent.load(forge(parts, parts[-1])).left_off is not None


def test_what_a_policy_remembers_of_a_lost_episode_is_forgotten(parts):
    policy = {
        "memory": np.ones((3, 2), np.float32),
        "frames": np.ones((3, 4, 2), np.float32),
        "age": np.array([5, 6, 7]),
    }
    state = CollectorState.from_plain({**parts[-1], "policy": policy})
    playing = np.array([True, False, True])
    same = SimpleNamespace(state_size=2, frame_stack=4)
    known = state.policy_state(playing, same)
    assert known.age.tolist() == [5, 0, 7]
    assert known.memory.tolist() == [[1, 1], [0, 0], [1, 1]]
    # What it was loaded from stays as it is.
    assert state.policy.age.tolist() == [5, 6, 7]
    for other in (SimpleNamespace(state_size=2), SimpleNamespace(state_size=3, frame_stack=4)):
        assert state.policy_state(playing, other).age.tolist() == [0, 0, 0]


NOTHING = object()
FORGED = {
    "no columns": {"bookmarks": (), "noise": (), "actions": ()},
    "another number of columns": {"noise": ()},
    "a column that is none": {"bookmarks": (1, 2, 3)},
    "no frames": {"frames": NOTHING},
    "frames of other columns": {"frames": np.zeros((1, 2, 2), np.float32)},
    "frames that are text": {"frames": "frames"},
    "masks that are numbers": {"masks": np.zeros((3, 2))},
    "a generator that is too short": {"generator": np.zeros(3, np.uint8)},
    "noise of another generator": {"noise": ({"bit_generator": "MT19937", "state": 1},) * 3},
    "noise that is nothing": {"noise": (None,) * 3},
    "more than there is": {"more": 1},
    "squash as a number": {"squash": 1},
    "memory of other columns": {
        "policy": {"memory": np.zeros((2, 0), np.float32), "frames": None, "age": np.zeros(3, int)}
    },
    "memory that is not finite": {
        "policy": {
            "memory": np.full((3, 1), np.nan, np.float32),
            "frames": None,
            "age": np.zeros(3, int),
        }
    },
    "memory before the beginning": {
        "policy": {"memory": np.zeros((3, 0), np.float32), "frames": None, "age": np.full(3, -1)}
    },
}
FORGED_MARKS = {
    "a seed below 0": {"seed": -1},
    "a seed that is text": {"seed": "1"},
    "another number of actions": {"episode_length": 10**6},
    "a negative length": {"episode_length": -1},
    "a return that is text": {"episode_return": "1"},
    "a kind that is no text": {"kind": 1},
    "seeds that are nothing": {"seeds": {}},
    "seeds beyond all bounds": {
        "seeds": {"bit_generator": "PCG64", "state": {"state": -1, "inc": 2**300}}
    },
    "more than there is": {"more": 1},
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED.keys())
def test_forged_episodes_are_refused(changes, parts):
    plain = {**parts[-1], **changes}
    plain = {name: value for name, value in plain.items() if value is not NOTHING}
    with pytest.raises(CheckpointError):
        PPOAgent.load(forge(parts, plain))


@pytest.mark.parametrize("changes", FORGED_MARKS.values(), ids=FORGED_MARKS.keys())
def test_forged_bookmarks_are_refused(changes, parts):
    first, *others = parts[-1]["bookmarks"]
    with pytest.raises(CheckpointError):
        PPOAgent.load(forge(parts, {**parts[-1], "bookmarks": ({**first, **changes}, *others)}))


VALUES = (None, -1, 0, 7, 2**70, 1.5, float("nan"), "text", [], {}, True, ["0", "<f8", [1]])


def mutate(rng, document, arrays):
    """Exchange one value somewhere in the document, or one byte of an array."""
    if rng.random() < 0.3:
        array = arrays[rng.choice([name for name, array in arrays.items() if array.size])]
        array[rng.randrange(array.size)] = rng.randrange(256)
        return
    places = []

    def walk(item):
        for key, part in item.items() if isinstance(item, dict) else enumerate(item):
            places.append((item, key))
            if isinstance(part, dict | list):
                walk(part)

    walk(document)
    item, key = rng.choice(places)
    item[key] = rng.choice(VALUES)


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_place_in_an_episode_is_a_typed_error_or_an_agent_that_learns(seed, parts):
    path, groups, document, plain = parts
    packed, arrays = pack(plain)
    rng = random.Random(seed)
    outcomes = {"refused": 0, "learned": 0}
    for _ in range(50):
        forged = copy.deepcopy(packed)
        changed = {name: array.copy() for name, array in arrays.items()}
        mutate(rng, forged, changed)
        tensors = {name: torch.from_numpy(array) for name, array in changed.items()}
        write_checkpoint(path, {**groups, "episodes": tensors}, {**document, "episodes": forged})
        try:
            agent = PPOAgent.load(path)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* environments begin new episodes")
            agent.learn(lambda: CountingEnv(length=50), 1)
        outcomes["learned"] += 1
    assert min(outcomes.values()) > 0
