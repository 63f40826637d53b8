"""Masks of the tile library, whose rules speak of a warpgroup's 64 rows."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, NAMES, assert_same, kernel, normals

pytestmark = pytest.mark.usefixtures("tile_implementation")

KERNELS = {name: kernel("mask", "masks", name, threads=128) for name in (FLOAT, BF16)}
ARRAYS = {
    name: kernel("mask", "array_masks", name, threads=128) for name in (FLOAT, BF16)
}
ROW, COL = np.ogrid[:64, :48]


@pytest.mark.parametrize(
    ("dtype", "first", "second", "value"),
    [
        (FLOAT, 5, 20, -np.inf),
        (FLOAT, -17, 9, 0.0),
        (FLOAT, 31, 33, np.nan),
        (FLOAT, 0, 0, 1.0),
        (FLOAT, -64, -50, 2.0),
        (FLOAT, 64, 64, 2.0),
        (BF16, -3, 40, -np.inf),
    ],
)
def test_masks(rng, dtype, first, second, value):
    x = normals(rng, (64, 48), NAMES[dtype])
    keep = [
        first > COL,
        first > ROW,
        first >= COL - ROW,
        first <= COL - ROW,
        (first <= COL - ROW) & (second >= COL - ROW),
        (second > COL) & (first >= COL - ROW),
        (second > ROW) & (first <= COL - ROW),
        first + ROW * (ROW % 3) > COL,
    ]
    expected = np.stack([np.where(kept, x.astype(np.float32), value) for kept in keep])
    (result,) = KERNELS[dtype](
        [(expected.shape, NAMES[dtype])], x, scalars=[first, second, value]
    )
    assert_same(result, expected)


@pytest.mark.parametrize(
    ("shape", "at"),
    [
        ((64, 48), (0, 0)),
        ((100, 131), (13, 64)),
        ((33, 70), (16, 31)),
        ((5, 3), (8, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ARRAYS)
def test_masks_from_arrays(rng, dtype, shape, at):
    (rows, cols), (row, col) = shape, at
    # Neighbours that are one number as floats.
    known = np.array([2**31 - 1, 2**31 - 2, -(2**31), -(2**31) + 1], np.int32)
    row_ids, col_ids = rng.choice(known, rows), rng.choice(known, cols)
    kept = rng.random(shape) < 0.5

    numbers = rng.integers(-9, 9, shape)

    def cut(x):
        tile = np.zeros((64, 48), x.dtype)
        inside = x[row : row + 64, col : col + 48]
        tile[: inside.shape[0], : inside.shape[1]] = inside
        return tile

    keep = [row_ids[:, None] == col_ids[None, :], kept, kept.T]
    added = [3 + cut(kept), 3 + cut(numbers.T)]
    expected = np.stack([*(np.where(cut(x), 3, -np.inf) for x in keep), *added])
    (result,) = ARRAYS[dtype](
        [(expected.shape, NAMES[dtype])],
        *(row_ids, col_ids, kept, numbers.astype(NAMES[dtype])),
        scalars=[row, col, -np.inf],
    )
    assert_same(result, expected)
