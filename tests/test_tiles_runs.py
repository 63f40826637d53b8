"""Moves of float tiles and of vectors of columns in runs of four."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, FP16, NAMES, assert_same, integers, kernel

pytestmark = pytest.mark.usefixtures("tile_implementation")

# The type of the vector, columns of the tile, whether rows are whole runs.
CASES = [
    (FLOAT, 16, "true"),
    (BF16, 64, "true"),
    (FP16, 32, "true"),
    (FLOAT, 64, "false"),
    (BF16, 16, "false"),
    (FP16, 48, "false"),
]
RUNS = {case: kernel("runs", "runs", *case, threads=128) for case in CASES}


@pytest.mark.parametrize("at", [(0, 0), (20, 8), (70, 4)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs(rng, case, at):
    """What is outside reads as zero, or as the number given, and is not written."""
    name, width, whole = case
    dtype, (row, col) = NAMES[name], at
    rows, cols = 81, width + (4 if whole == "true" else 3)
    x = integers(rng, (rows, cols))
    y = integers(rng, (cols,), dtype)
    other, end = 9.0, width - 5
    f32 = np.float32
    tile, same, twice, sums, order = RUNS[case](
        [
            ((rows, cols), f32),
            ((rows, cols), f32),
            ((cols,), dtype),
            ((cols,), f32),
            ((16, width), f32),
        ],
        x,
        y,
        scalars=(row, col, other, end),
    )
    here = np.s_[row : row + 64, col : col + width]
    kept = np.arange(cols) - col < end
    expected = np.full((rows, cols), 7, f32)
    expected[here] = np.where(kept, x * y.astype(f32), other)[here]
    assert_same(tile, expected)
    assert_same(same, expected)

    inside = np.s_[col : col + width]
    assert_same(twice[inside], 2 * y.astype(f32)[inside])
    assert_same(sums[inside], x[row : row + 16, inside].sum(0))
    places = np.arange(width)
    within = places % 16
    places += within % 8 // 2 * 4 + within // 8 * 2 + within % 2 - within
    padded = np.append(y.astype(f32)[col:], np.full(width, other))
    assert_same(order, np.broadcast_to(padded[places], (16, width)))


PAIRS = kernel("runs", "pairs", threads=32)


@pytest.mark.parametrize("at", [(0, 0), (7, 10), (20, 30), (40, 2)], ids=str)
def test_pairs(rng, at):
    """As they are in the tile: what is outside reads as zero and is not written."""
    row, col = at
    x = integers(rng, (30, 34))
    f32 = np.float32
    moved, tile = PAIRS([(x.shape, f32), ((16, 32), f32)], x, scalars=(row, col))
    here = np.s_[row : row + 16, col : col + 32]
    expected = np.full_like(x, 7)
    expected[here] = x[here]
    assert_same(moved, expected)
    padded = np.zeros((100, 100), f32)
    padded[:30, :34] = x
    assert_same(tile, padded[here])


GROUP_PAIRS_CASES = [(BF16, 48), (FP16, 96), (FLOAT, 32)]
GROUP_PAIRS = {
    case: kernel("runs", "group_pairs", *case, threads=128)
    for case in GROUP_PAIRS_CASES
}


@pytest.mark.parametrize("at", [(0, 0), (20, 6), (75, 48), (90, 0)], ids=str)
@pytest.mark.parametrize("case", GROUP_PAIRS_CASES, ids=str)
def test_pairs_of_a_warpgroup(rng, case, at):
    """Of any type; what is outside reads as zero."""
    name, width = case
    row, col = at
    x = rng.standard_normal((82, 54)).astype(NAMES[name])
    (tile,) = GROUP_PAIRS[case]([((64, width), np.float32)], x, scalars=(row, col))
    padded = np.zeros((200, 200), np.float32)
    padded[:82, :54] = x.astype(np.float32)
    assert_same(tile, padded[row : row + 64, col : col + width])


ROUNDED_CASES = [(BF16, 32), (BF16, 64), (FP16, 128)]
ROUNDED = {
    case: kernel("runs", "rounded", *case, threads=128) for case in ROUNDED_CASES
}


@pytest.mark.parametrize("at", [(0, 0), (20, 8), (75, 24)], ids=str)
@pytest.mark.parametrize("case", ROUNDED_CASES, ids=str)
def test_rounded(rng, case, at):
    """In the tile's own order, to the nearest even; what is outside is not written."""
    name, width = case
    dtype, (row, col) = NAMES[name], at
    x = rng.standard_normal((81, width + 16)).astype(np.float32)
    (moved,) = ROUNDED[case]([(x.shape, dtype)], x, scalars=(row, col))
    here = np.s_[row : row + 64, col : col + width]
    expected = np.full(x.shape, 7, dtype)
    expected[here] = x[here].astype(dtype)
    assert_same(moved, expected)
