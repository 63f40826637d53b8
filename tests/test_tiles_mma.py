"""Matrix products of a warpgroup: every form, width, depth and view."""

import numpy as np
import pytest
from tiles import BF16, FP16, NAMES, assert_same, integers, kernel

pytestmark = pytest.mark.usefixtures("tile_implementation")

# Type, N, K. Operands of 16, 48 and 176 columns have panels of 32 bytes, of 32, 96 and
# 160 columns of 64 bytes, of 64, 128 and 256 columns of 128 bytes.
SIZES = [
    (BF16, 16, 16),
    (BF16, 64, 64),
    (BF16, 96, 128),
    (BF16, 128, 64),
    (BF16, 256, 128),
    (BF16, 16, 128),
    (BF16, 256, 16),
    (BF16, 32, 96),
    (BF16, 160, 64),
    (BF16, 64, 160),
    (BF16, 48, 176),
    (FP16, 176, 48),
    (FP16, 64, 128),
    (FP16, 96, 16),
    (FP16, 256, 64),
    (FP16, 128, 32),
]
PRODUCTS = {
    size: kernel("mma", "products", *size, threads=128, shared=True) for size in SIZES
}
VIEWS = {
    name: kernel("mma", "products_of_views", name, threads=128, shared=True)
    for name in (BF16, FP16)
}
WIDTHS = {
    name: kernel("mma", "every_width", name, threads=128, shared=True)
    for name in (BF16, FP16)
}


def product(a, b):
    """Exact: operands are small whole numbers."""
    return a.astype(np.float32) @ b.astype(np.float32)


@pytest.mark.parametrize("accumulate", [True, False], ids=["add", "replace"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(rng, size, accumulate):
    name, n, k = size
    a, b = (integers(rng, shape, NAMES[name]) for shape in ((64, k), (k, n)))
    (result,) = PRODUCTS[size](
        [((12, 64, n), np.float32)],
        a,
        a.T.copy(),
        b,
        b.T.copy(),
        tiles={0: (64, k), 1: (k, 64), 2: (k, n), 3: (n, k), 4: (64, n)},
        scalars=[float(accumulate)],
    )
    ab = product(a, b)
    expected = np.stack([ab, ab + 3 if accumulate else ab] * 6)
    for i, form in enumerate(["AB", "ABt", "AtB", "AtBt", "AB rs", "ABt rs"]):
        np.testing.assert_array_equal(result[2 * i], ab, err_msg=f"mm_{form}")
    assert_same(result, expected)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("col", [0, 1])
@pytest.mark.parametrize("name", VIEWS)
def test_products_of_views(rng, name, row, col):
    a, b = (integers(rng, (128, 128), NAMES[name]) for _ in range(2))
    (result,) = VIEWS[name](
        [((8, 64, 64), np.float32)],
        a,
        a.T.copy(),
        b,
        b.T.copy(),
        tiles=dict.fromkeys(range(4), (128, 128)) | {4: (64, 64)},
        scalars=[row, col],
    )
    a = a[64 * row : 64 * row + 64]
    b = b[:, 64 * col : 64 * col + 64]
    whole, half = product(a, b), product(a[:, :64], b[:64])
    assert_same(result, np.stack([whole] * 6 + [half, whole]))


@pytest.mark.parametrize("name", WIDTHS)
def test_every_width(rng, name):
    a, bt = (integers(rng, (rows, 16), NAMES[name]) for rows in (64, 256))
    ab = product(a, bt.T)
    expected = np.concatenate([ab[:, :n] for n in range(16, 257, 16)], 1)
    (result,) = WIDTHS[name](
        [((2, *expected.shape), np.float32)], a, bt, tiles={2: (64, 16)}
    )
    assert_same(result, np.stack([expected, expected]))
