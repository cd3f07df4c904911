"""What shows in a policy that changed, and what forbids a recording of it."""

import dataclasses
import random
from collections import OrderedDict, deque
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from ppo.recording import Fingerprint


@dataclasses.dataclass
class Options:
    """Settings, some of them nested."""

    bias: float = 0.0
    more: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Slotted:
    """Settings without a dict."""

    bias: float = 0.0


class Holding(nn.Module):
    """Has something of every container; `inner` has the same again."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner
        self.mapping = {"a": 1.0, "b": [2.0, {"c": 3.0}]}
        self.ordered = OrderedDict(a=1.0)
        self.one, self.two = [1.0], []
        self.pair = ([1.0], "a")
        self.names = {"a", "b"}
        self.queue = deque([1.0, 2.0])
        self.options, self.slotted, self.space = Options(), Slotted(), SimpleNamespace(a=1.0)
        self.array = np.zeros((2, 3), np.float32)
        self.arrays = {"a": np.arange(3)}
        self.loop = [self.mapping]
        self.loop.append(self.loop)


def rename(policy):
    policy.ordered["b"] = policy.ordered.pop("a")


def move(policy):
    policy.two.append(policy.one.pop())


def reshape(policy):
    policy.array.resize((3, 2), refcheck=False)


CHANGES = {
    "entry": lambda policy: policy.mapping.update(a=2.0),
    "type": lambda policy: policy.mapping.update(a=1),
    "new entry": lambda policy: policy.mapping.update(d=None),
    "nested entry": lambda policy: policy.mapping["b"][1].update(c=4.0),
    "key": rename,
    "item": lambda policy: policy.one.__setitem__(0, 2.0),
    "item that moved": move,
    "item in a tuple": lambda policy: policy.pair[0].append(2.0),
    "member": lambda policy: policy.names.add("c"),
    "queue": lambda policy: policy.queue.rotate(),
    "field": lambda policy: setattr(policy.options, "bias", 1.0),
    "inside a field": lambda policy: policy.options.more.update(a=1.0),
    "slot": lambda policy: setattr(policy.slotted, "bias", 1.0),
    "namespace": lambda policy: setattr(policy.space, "a", 2.0),
    "array": lambda policy: policy.array.__setitem__((1, 2), 1.0),
    "shape": reshape,
    "array inside": lambda policy: policy.arrays["a"].__imul__(2),
    "loop": lambda policy: policy.loop.append(1.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("nested", [False, True])
def test_what_changes_inside_a_container_shows(change, nested):
    policy = Holding(Holding())
    before = Fingerprint(policy)
    assert Fingerprint(policy) == before
    assert before.repeatable
    change(policy.inner if nested else policy)
    after = Fingerprint(policy)
    assert after != before
    assert Fingerprint(policy) == after


@pytest.mark.parametrize(
    ("held", "repeatable"),
    [
        ([0.0] * 9_000, True),
        ([0.0] * 11_000, False),
        ([[0.0] * 6_000, [1.0] * 6_000], False),
        (np.zeros(2**15), True),
        (np.zeros(2**15 + 1), False),
        ([np.zeros(2**14), np.zeros(2**14 + 1)], False),
        ({"rng": np.random.default_rng(0)}, False),
        ([SimpleNamespace(rng=random.Random(0))], False),
    ],
    ids=[
        "items",
        "too many items",
        "too many together",
        "array",
        "too large an array",
        "too large together",
        "generator",
        "generator deep inside",
    ],
)
def test_what_cannot_be_watched_forbids_a_recording(held, repeatable):
    policy = nn.Identity()
    policy.held = held
    assert Fingerprint(policy).repeatable == repeatable
    assert Fingerprint(policy) == Fingerprint(policy)
