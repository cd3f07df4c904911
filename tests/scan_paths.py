"""The ways through the linear recurrence, each made to be taken by small arrays."""

from unittest import mock

import pytest

from ppo import _scan, advantages

PATHS = {
    "NumPy": {"_SMALL": 2**30},
    "torch": {"_SMALL": 0, "_FEW": 2},
    "NumPy in blocks": {"_SMALL": 2**30, "_BLOCK": 300},
    "torch in blocks": {"_SMALL": 0, "_FEW": 2, "_BLOCK": 300},
    "row by row in blocks": {"_SMALL": 0, "_FEW": 99, "_BLOCK": 300},
}
EACH_PATH = pytest.mark.parametrize("path", PATHS)


def path_taken(path):
    """A context in which arrays on the CPU take this path."""
    return mock.patch.multiple(_scan, **PATHS[path])


def as_elsewhere():
    """A context in which `gae` treats the CPU as any other device."""
    return mock.patch.object(advantages, "as_arrays", lambda *xs: [x.detach() for x in xs])
