import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_paths import EACH_PATH, path_taken
from strategies import horizons, law, seeds, trailing_shapes

from ppo._scan import as_arrays, reverse_scan_, reverse_scan_plain_, scan_blocks

many_horizons = horizons | st.integers(1, 700)


def recurrence(seed, shape, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    x, c = torch.as_tensor(rng.uniform(-1, 1, size=(2, *shape))).to(dtype)
    c[torch.as_tensor(rng.random(c.shape) < 0.05)] = 0.0
    return x, c


def plain(x, c):
    """Row by row in float64."""
    return reverse_scan_plain_(x.to(torch.float64, copy=True), c.double())


def in_blocks(x, c):
    """The same from `scan_blocks`, and the blocks it came in."""
    solution, blocks = torch.empty_like(x), []
    terms, factors, result = as_arrays(x, c, solution)

    def fill(block, part, decay):
        part[...] = terms[block]
        decay[...] = factors[block]

    for block, part in scan_blocks(terms, fill):
        result[block] = part
        part[...] = torch.nan  # it is the caller's until the next block
        blocks.append(block)
    return solution, blocks


@EACH_PATH
@law
@given(many_horizons, trailing_shapes, seeds)
def test_the_scan_equals_the_plain_one(path, horizon, shape, seed):
    x, c = recurrence(seed, (horizon, *shape))
    solution = x.clone()
    with path_taken(path):
        assert reverse_scan_(solution, c.clone()) is solution
    torch.testing.assert_close(solution, plain(x, c), rtol=1e-12, atol=1e-12)
    assert torch.equal(solution[-1], x[-1])


@EACH_PATH
@law
@given(many_horizons, trailing_shapes, seeds)
def test_blocks_go_on_where_the_ones_behind_them_began(path, horizon, shape, seed):
    x, c = recurrence(seed, (horizon, *shape))
    with path_taken(path):
        solution, blocks = in_blocks(x, c)
    torch.testing.assert_close(solution, plain(x, c), rtol=1e-12, atol=1e-12)
    rows = [t for block in reversed(blocks) for t in range(horizon)[block]]
    assert rows == list(range(horizon))
    if "blocks" in path:
        assert all(x[block][1:].nbytes < 300 for block in blocks)


# On both sides of every limit: 8 and 16 rows, 2**13 numbers, 2**18 bytes; one column and several.
SHAPES = [(8,), (9,), (16,), (17,), (2**13,), (2**13 + 1,), (2**13 + 1, 1), (1, 2**13 + 1)]
SHAPES += [(16, 2**12), (17, 2**12), (128, 64), (128, 65), (2**16,), (2**16 + 1,), (257, 16, 16)]
SHAPES += [(3, 2**17), (2047, 100), (5, 0), (20, 0, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_at_the_limits_are_solved_like_any_other(shape, dtype):
    x, c = recurrence(0, shape, dtype)
    expected = plain(x, c).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    in_parts, _ = in_blocks(x, c)
    torch.testing.assert_close(in_parts, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reverse_scan_(x, c), expected, rtol=tolerance, atol=tolerance)


def test_large_arrays_come_in_blocks_that_fit_the_cache():
    for shape in ((128, 4096), (2048, 256), (4000, 128)):
        _, blocks = in_blocks(*recurrence(0, shape, torch.float32))
        sizes = [4 * (block.stop - block.start) * shape[1] for block in blocks]
        assert len(sizes) > 1
        assert max(sizes) <= 2**19 <= 2.2 * min(sizes)


@law
@given(horizons, trailing_shapes, seeds)
def test_tensors_elsewhere_are_one_block(horizon, shape, seed):
    x, c = recurrence(seed, (horizon, *shape))

    def fill(block, part, decay):
        part.copy_(x[block])
        decay.copy_(c[block])

    ((block, part),) = scan_blocks(x, fill)
    assert block == slice(0, horizon)
    torch.testing.assert_close(part, plain(x, c), rtol=1e-12, atol=1e-12)


def test_tensors_without_data_are_never_read():
    x, c = (torch.empty(300, 2, device="meta") for _ in range(2))
    assert reverse_scan_(x, c) is x


@EACH_PATH
def test_numbers_that_overflow_make_no_noise(path):
    x = torch.ones(60)
    x[7], x[40:42] = -torch.inf, torch.finfo(torch.float32).max
    with path_taken(path):
        solution = reverse_scan_(x, torch.ones(60))
    assert torch.equal(solution[42:], torch.arange(18.0, 0.0, -1.0))
    assert torch.equal(solution[8:41], torch.full((33,), torch.inf))
    assert solution[:8].isnan().all()
