"""Masks of the tile library, whose rules speak of a warpgroup's 64 rows."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, NAMES, assert_same, kernel, normals

pytestmark = pytest.mark.usefixtures("tile_implementation")

KERNELS = {name: kernel("mask", "masks", name, threads=128) for name in (FLOAT, BF16)}
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
    ]
    expected = np.stack([np.where(kept, x.astype(np.float32), value) for kept in keep])
    (result,) = KERNELS[dtype](
        [(expected.shape, NAMES[dtype])], x, scalars=[first, second, value]
    )
    assert_same(result, expected)
