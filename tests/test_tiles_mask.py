"""Masks of the tile library, whose rules speak of a warpgroup's 64 rows."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, NAMES, assert_same, kernel, normals

pytestmark = pytest.mark.usefixtures("tile_implementation")

KERNELS = {name: kernel("mask", "masks", name, threads=128) for name in (FLOAT, BF16)}
ARRAYS = {
    name: kernel("mask", "array_masks", name, threads=128) for name in (FLOAT, BF16)
}
BITS = {
    (name, cols): kernel("mask", "bit_masks", name, cols, threads=128)
    for name, cols in [(FLOAT, n) for n in (16, 32, 48, 80, 96, 128)] + [(BF16, 64)]
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

    equal = cut(row_ids[:, None] == col_ids[None, :])
    added = [3 + cut(kept), 3 + cut(numbers.T)]
    expected = np.stack([np.where(equal, 3, -np.inf), *added])
    (result,) = ARRAYS[dtype](
        [(expected.shape, NAMES[dtype])],
        *(row_ids, col_ids, kept, numbers.astype(NAMES[dtype])),
        scalars=[row, col, -np.inf],
    )
    assert_same(result, expected)


@pytest.mark.parametrize("shares", [None, "words", "rows"])
@pytest.mark.parametrize(("dtype", "cols"), BITS)
def test_masks_from_bits(rng, dtype, cols, shares):
    # Tiles side by side: where their columns are not whole words, each second one
    # starts in the middle of one.
    for row, tile in ((0, 0), (5, 1), (9, 2), (64, 3)):
        first = cols * tile
        words = rng.integers(0, 2**32, (-(-(first + cols) // 32), row + 64), np.uint32)
        seen = words
        if shares == "words":
            seen = np.broadcast_to(words[:1], words.shape)
        elif shares == "rows":
            seen = np.broadcast_to(words[:, :1], words.shape)
        bits = seen[:, None, :] >> np.arange(32, dtype=np.uint32)[:, None] & 1
        bits = bits.reshape(-1, seen.shape[1]).T
        kept = bits[row : row + 64, first : first + cols]
        expected = np.where(kept, 3, -np.inf)
        scalars = [row, first, -np.inf, {None: 0, "words": 1, "rows": 2}[shares]]
        (result,) = BITS[dtype, cols](
            [(expected.shape, NAMES[dtype])], words, scalars=scalars
        )
        assert_same(result, expected)
