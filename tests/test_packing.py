"""Values come back as they were, and nothing but values."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from ppo.packing import pack, unpack

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
DTYPES = (
    stn.boolean_dtypes()
    | stn.integer_dtypes()
    | stn.unsigned_integer_dtypes()
    | stn.floating_dtypes(sizes=(16, 32, 64))
)
ARRAYS = stn.arrays(DTYPES, stn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
KEYS = st.text() | st.integers()
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.lists(parts, max_size=3).map(tuple)
        | st.dictionaries(KEYS, parts, max_size=3)
    ),
    max_leaves=10,
)


def there_and_back(value):
    document, arrays = pack(value)
    return unpack(json.loads(json.dumps(document)), arrays)


def same(one, other):
    if isinstance(one, np.ndarray | np.generic):
        return (
            type(one) is type(other)
            and (one.dtype.newbyteorder("="), one.shape) == (other.dtype, other.shape)
            and one.astype(other.dtype).tobytes() == other.tobytes()
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


@given(VALUES)
def test_values_come_back_bit_for_bit_through_json(value):
    assert same(value, there_and_back(value))


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.int8(-3), np.bool_(True)])
def test_scalars_of_numpy_stay_scalars_of_their_type(scalar):
    assert same(scalar, there_and_back(scalar))


def test_arrays_are_copies():
    array = np.zeros(3)
    document, arrays = pack(array)
    array[:] = 1.0
    again = unpack(document, arrays)
    again[:] = 2.0
    assert unpack(document, arrays).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, np.array([object()]), np.array(["a"]), {(1, 2): 3}, len, 1j, [print]],
    ids=["object", "set", "objects", "texts", "key", "function", "complex", "nested"],
)
def test_what_is_no_plain_value_is_refused(value):
    with pytest.raises(TypeError, match="is no plain value"):
        pack(value)


EIGHT = {"0": np.arange(8, dtype=np.uint8)}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"dict": [], "list": []},
        {"object": "os.system"},
        {"dict": {}},
        {"dict": [["a"]]},
        {"dict": [[[], 1]]},
        {"list": "abc"},
        {"bytes": "1"},
        {"array": ["1", "<f8", [1]]},
        {"array": ["0", "<f8", [2]]},
        {"array": ["0", "<f8", [-1]]},
        {"array": ["0", "<f8", [True]]},
        {"array": ["0", "<f8", 1]},
        {"array": ["0", "O", [1]]},
        {"array": ["0", "|V8", [1]]},
        {"array": ["0", "S8", [1]]},
        {"array": ["0", "M8[s]", [1]]},
        {"array": ["0", None, [1]]},
        {"array": ["0", "i" * 10_000, [1]]},
        {"array": ["0", "<u1", [2**62, 2**62]]},
        {"array": [["0"], "<f8", [1]]},
    ],
    ids=lambda document: str(document)[:40],
)
def test_what_pack_never_wrote_is_refused(document):
    with pytest.raises((ValueError, TypeError)):
        unpack(document, EIGHT)
