"""Maps of triangles of the tile library, and sums over them."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, FP16, NAMES, assert_same, integers, kernel

pytestmark = pytest.mark.usefixtures("tile_implementation")

KERNELS = {
    name: kernel("triangle", "triangles", name, threads=128, shared=True)
    for name in (FLOAT, BF16, FP16)
}
FOLDS = {
    name: kernel("triangle", "folds", name, threads=128, shared=True) for name in NAMES
}
ROW, COL = np.ogrid[:64, :64]


@pytest.mark.parametrize("name", KERNELS)
def test_triangles(rng, name):
    x = integers(rng, (64, 64), NAMES[name])
    # Beyond the diagonal nothing is looked at.
    rows, cols, more = (integers(rng, (64,), np.float32) for _ in range(3))
    wide = x.astype(np.float32)
    line = 2 * rows[:, None] - cols
    expected = [
        np.where(COL <= ROW, wide + line, 0),
        np.where(COL <= ROW, wide * more + line, 0),
        np.where(COL >= ROW, wide + line, 0),
        np.where(COL >= ROW, wide * more + line, 0),
        np.full((64, 64), more[37]),
        np.where(COL <= ROW, wide + 3, 0),
        np.where(COL >= ROW, wide + 3, 0),
        np.broadcast_to(np.where(COL == 37, more - 2, more), (64, 64)),
        np.broadcast_to(wide[16:32].sum(0), (64, 64)),
        np.broadcast_to(rows + wide[32:].sum(0), (64, 64)),
    ]
    (result,) = KERNELS[name](
        [((10, 64, 64), NAMES[name])], x, rows, cols, more, scalars=[37]
    )
    assert_same(result, np.stack(expected))


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_beyond_the_diagonal_is_zero(rng, name):
    """Also where the function would not be a number there."""
    x = np.where(COL <= ROW, 1, np.nan).astype(NAMES[name])
    ones = np.ones(64, np.float32)
    (result,) = KERNELS[name](
        [((10, 64, 64), NAMES[name])], x, ones, ones, ones, scalars=[0]
    )
    assert_same(result[0], np.where(COL <= ROW, 2, 0))
    assert np.isnan(result[2].astype(np.float32)[COL > ROW]).all()
    assert_same(np.tril(result[2].astype(np.float32), -1), np.zeros((64, 64)))


def folded(x, changed, terms, inside):
    """What a fold leaves of x, and its sums: each lane's start at one."""
    beside = np.where(inside & (ROW != COL), terms, 0).sum(1) + 4
    return np.where(inside, changed, x), beside, np.diag(terms)


@pytest.mark.parametrize("name", FOLDS)
def test_folds(rng, name):
    x = integers(rng, (64, 64), NAMES[name])
    rows, cols, more = (integers(rng, (64,), np.float32) for _ in range(3))
    wide = x.astype(np.float32)
    z = 2 * wide - 1
    lower = folded(
        wide,
        2 * wide - 2 * rows[:, None] + cols,
        wide * z + more[:, None] * more,
        COL <= ROW,
    )
    upper = folded(wide, z - cols, wide - rows[:, None], COL >= ROW)
    tiles, vectors = FOLDS[name](
        [((2, 64, 64), NAMES[name]), ((5, 64), np.float32)], x, rows, cols, more
    )
    assert_same(tiles, np.stack([lower[0], upper[0]]))
    assert_same(vectors, np.stack([*lower[1:], *upper[1:], np.diag(z)]))


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_beyond_the_diagonal_is_not_summed(rng, name):
    """Also where the function would not be a number there."""
    x = np.where(COL <= ROW, 1, np.nan).astype(NAMES[name])
    ones = np.ones(64, np.float32)
    tiles, vectors = FOLDS[name](
        [((2, 64, 64), NAMES[name]), ((5, 64), np.float32)], x, ones, ones, ones
    )
    assert_same(tiles[0], np.where(COL <= ROW, 1, np.nan))
    assert_same(vectors[0], 2 * np.arange(64) + 4)
    assert_same(vectors[1], np.full(64, 2))
    assert np.isnan(vectors[2, :63]).all()
    assert_same(vectors[2, 63], 4)
    assert_same(vectors[3:], np.stack([np.zeros(64), np.ones(64)]))
