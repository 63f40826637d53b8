"""Copies between registers, shared memory and global memory of the tile library."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, FP16, NAMES, assert_same, kernel, normals, round_to

pytestmark = pytest.mark.usefixtures("tile_implementation")

# Type, rows, columns, warps. Widths of 16-bit tiles: panels of 32 (16, 48), 64 (32, 96)
# and 128 bytes (64, 128); of float tiles: of 64 (16, 48) and 128 bytes (32, 64, 128).
SHARED = [
    (BF16, 16, 16, 1),
    (FP16, 32, 64, 1),
    (BF16, 128, 32, 1),
    (BF16, 64, 16, 4),
    (BF16, 64, 48, 4),
    (FP16, 64, 32, 4),
    (BF16, 64, 96, 4),
    (FP16, 128, 64, 4),
    (BF16, 128, 128, 4),
    (FLOAT, 16, 16, 1),
    (FLOAT, 32, 64, 1),
    (FLOAT, 128, 32, 4),
    (FLOAT, 64, 48, 4),
    (FLOAT, 64, 128, 4),
]
SHARED_KERNELS = {
    case: kernel("copy", "shared_copies", *case, threads=32 * case[3], shared=True)
    for case in SHARED
}
VECTORS = {
    name: kernel("copy", "shared_vectors", name, shared=True) for name in (FLOAT, BF16)
}
GLOBAL = {
    name: kernel("copy", "global_copies", name, threads=128)
    for name in (FLOAT, BF16, FP16)
}
GLOBAL_VECTORS = {
    name: kernel("copy", "global_vectors", name) for name in (FLOAT, BF16, FP16)
}
SCALARS = kernel("copy", "scalar_loads", "int")
FRAGMENTS = {
    cols: kernel("copy", "fragments", cols, threads=128, shared=True)
    for cols in (16, 64)
}


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_copies(rng, case):
    name, rows, cols, _ = case
    dtype = NAMES[name]
    x = normals(rng, (rows, cols), dtype)
    outs = [((rows, cols), dtype)] * 5
    tiles = dict.fromkeys((0, 1, 3, 4, 5), (rows, cols))
    if name != FLOAT:
        outs += [((cols, rows), dtype), ((rows, cols), dtype)]
        tiles[6] = (cols, rows)
    stored, loaded, by_rows, by_cols, other, *transposed = SHARED_KERNELS[case](
        outs, x, tiles=tiles
    )
    wide = x.astype(np.float32)
    assert_same(stored, wide)
    assert_same(loaded, wide)
    assert_same(by_rows, wide)
    assert_same(by_cols, wide)
    # Registers of float for 16-bit tiles, which lose nothing, and of bf16 for float.
    assert_same(other, wide if name != FLOAT else round_to(wide, NAMES[BF16]))
    if transposed:
        assert_same(transposed[0], wide.T)
        assert_same(transposed[1], wide)


@pytest.mark.parametrize("name", VECTORS)
def test_shared_vectors(rng, name):
    rows, cols = normals(rng, 32), normals(rng, 64)
    x = normals(rng, (32, 64), NAMES[name])
    zeros = np.zeros((32, 64), np.float32)
    expected = [
        rows[:, None] - cols[None, :],
        zeros + 2 * rows[:, None],
        zeros + 2 * cols[None, :],
        cols[None, :] - 2 * x.astype(np.float32),
        np.where(cols > 0, 2, 1) * x.astype(np.float32),
        cols[None, :] - x.astype(np.float32),
        round_to(3 * x.astype(np.float32), NAMES[name]),
        zeros + cols[32:, None],
        zeros + np.concatenate([cols[32:], 2 * cols[32:]]),
    ]
    (result,) = VECTORS[name]([((9, 32, 64), np.float32)], rows, cols, x)
    assert_same(result, np.stack(expected))


@pytest.mark.parametrize(
    ("name", "shape", "at"),
    [
        (FLOAT, (64, 48), (0, 0)),
        (FLOAT, (77, 51), (13, 5)),
        (BF16, (77, 51), (16, 3)),
        (BF16, (61, 47), (0, 0)),
        (FP16, (100, 61), (63, 60)),
        (FP16, (1, 1), (0, 0)),
        (FLOAT, (50, 60), (50, 0)),
        (BF16, (50, 60), (0, 64)),
    ],
    ids=str,
)
def test_global_copies(rng, name, shape, at):
    """Any strides; what is outside reads as zero and is not written."""
    dtype, (rows, cols), (row, col) = NAMES[name], shape, at
    x = normals(rng, shape, dtype)
    # The same kernel reads x transposed: its rows are x's columns.
    pairs = normals(rng, (rows, 2), dtype)
    missing = -3.5
    f32 = np.float32
    tile, turned, written, written_t, values, numbers = GLOBAL[name](
        [
            ((64, 48), f32),
            ((64, 48), f32),
            (shape, dtype),
            ((cols, rows), dtype),
            ((64, 16), f32),
            ((rows, 2), dtype),
        ],
        x,
        pairs,
        scalars=[row, col, missing],
    )
    wide = x.astype(f32)
    assert_same(tile, cut(wide, row, col))
    assert_same(turned, cut(wide.T, row, col))
    expected = np.full(shape, 7, f32)
    expected[row : row + 64, col : col + 48] = wide[row : row + 64, col : col + 48]
    assert_same(written, expected)
    assert_same(written_t, expected.T)
    column = np.full(64, missing, f32)
    inside = pairs[row : row + 64, 1].astype(f32)
    column[: len(inside)] = inside
    assert_same(values, np.repeat(column[:, None], 16, 1))
    expected = np.full((rows, 2), 7, f32)
    expected[row : row + 64, 0] = inside
    assert_same(numbers, expected)


@pytest.mark.parametrize(
    ("name", "size", "first"),
    [(FLOAT, 16, 0), (BF16, 40, 16), (FP16, 21, 16), (FLOAT, 3, 0), (BF16, 5, 32)],
)
def test_global_vectors(rng, name, size, first):
    """Of one warp, with any stride."""
    pairs = normals(rng, (size, 2), NAMES[name])
    values, numbers = GLOBAL_VECTORS[name](
        [((16, 16), np.float32), ((size, 2), NAMES[name])], pairs, scalars=[first, 2.5]
    )
    inside = pairs[first : first + 16, 1].astype(np.float32)
    column = np.full(16, 2.5, np.float32)
    column[: len(inside)] = inside
    assert_same(values, np.repeat(column[:, None], 16, 1))
    expected = np.full((size, 2), 7, np.float32)
    expected[first : first + 16, 0] = inside
    assert_same(numbers, expected)


def test_scalar_loads():
    for last, bits in (
        (2**31 - 8, (30, 3, 28)),
        (-(2**31), (31, 31, 1)),
        (1, (0, 0, 1)),
    ):
        x = np.array([-(2**31) + 5, 7, last], np.int32)
        (tile,) = SCALARS([((16, 16), np.float32)], x)
        halves = [value for n in (x[-1], x[0]) for value in (n & 0xFFFF, n >> 16)]
        row = np.array([*halves, *bits, 0], np.float32)
        assert_same(tile, np.tile(row, (16, 2)))


def cut(x, row, col):
    """64 x 48 elements of x, zero outside."""
    tile = np.zeros((64, 48), np.float32)
    inside = x[row : row + 64, col : col + 48]
    tile[: inside.shape[0], : inside.shape[1]] = inside
    return tile


@pytest.mark.parametrize("cols", FRAGMENTS)
def test_fragments(rng, cols):
    x, y = normals(rng, (64, cols)), normals(rng, (64, cols))
    f32, flat = np.float32, (64 * cols,)
    sums, total, copies, copy = FRAGMENTS[cols](
        [(flat, f32), ((64, cols), f32), (flat, f32), ((64, cols), f32)], x, y
    )
    assert_same(total, x + y)
    assert_same(copy, y)
    # Their order is the library's own, but it holds every value once.
    assert_same(np.sort(sums), np.sort((x + y).ravel()))
    assert_same(np.sort(copies), np.sort(y.ravel()))


ZIP_SHARED_CASES = [(BF16, 48), (FP16, 64), (BF16, 112), (FLOAT, 80)]
ZIP_SHARED = {
    case: kernel("copy", "zip_shared", *case, threads=128, shared=True)
    for case in ZIP_SHARED_CASES
}


@pytest.mark.parametrize("case", ZIP_SHARED_CASES, ids=str)
def test_zip_with_a_shared_tile(rng, case):
    """With panels of each width."""
    name, width = case
    x = rng.standard_normal((64, width)).astype(NAMES[name])
    y = rng.standard_normal((64, width)).astype(np.float32)
    (got,) = ZIP_SHARED[case]([((64, width), np.float32)], x, y)
    np.testing.assert_allclose(got, 2 * y + x.astype(np.float32), rtol=1e-6, atol=1e-6)
