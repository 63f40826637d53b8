"""Products of the values of rows, of the tile library."""

import numpy as np
import pytest
from tiles import BF16, FP16, NAMES, assert_same, integers, kernel

pytestmark = pytest.mark.usefixtures("tile_implementation")

# (dim, columns of the tile, columns of a part of the products, which part)
CASES = [
    (8, 16, 48, 0),
    (16, 16, 160, 0),
    (24, 32, 176, 0),
    (24, 32, 176, 1),
    *((32, 32, 96, part) for part in range(6)),
]
KERNELS = {
    (name, *case): kernel(
        "products",
        "products",
        name,
        *(str(number) for number in case),
        threads=128,
        shared=True,
    )
    for name in (BF16, FP16)
    for case in CASES
}
FACTORS = (3, 2, 5)  # of values, of squares, of other products


def columns(dim):
    """(first, second, factor) of every column; None for a one or a missing factor."""
    found = [(a, None, FACTORS[0]) for a in range(dim)]
    for distance in range(dim // 2 + 1):
        factor = FACTORS[1] if distance == 0 else FACTORS[2]
        found += [(a, (a + distance) % dim, factor) for a in range(dim)]
    half = dim // 2
    found[-half:] = [(None, None, 1), *[(None, None, 0)] * (half - 1)]
    return found


@pytest.mark.parametrize("dim", (8, 16, 24, 32))
def test_every_product_is_there_once(dim):
    pairs = [(first, second) for first, second, factor in columns(dim) if factor]
    sets = {frozenset(pair) for pair in pairs}
    assert len(sets) == len(pairs) == 1 + dim + dim * (dim + 1) // 2


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_products(rng, case):
    name, dim, width, cols, part = case
    x = integers(rng, (64, width), NAMES[name])
    dproducts = integers(rng, (64, cols), np.float32)
    values = x.astype(np.float64)
    expected, plain, twice, scaled = np.zeros((4, 64, cols))
    scaled[:] = dproducts * FACTORS[2]  # beyond the last product, too
    gradient = np.ones((64, width))
    for col, (first, second, factor) in enumerate(columns(dim)[part * cols :][:cols]):
        one = np.ones(64)
        a, b = (one if i is None else values[:, i] for i in (first, second))
        expected[:, col] = factor * a * b
        plain[:, col] = (factor > 0) * a * b
        # What is said to be powers of two may be rounded before the second value.
        twice[:, col] = (factor * a).astype(NAMES[name]).astype(np.float64) * b
        scaled[:, col] = dproducts[:, col] * (factor or FACTORS[2])
        if first is not None:
            gradient[:, first] += factor * dproducts[:, col] * b
        if second is not None:
            gradient[:, second] += factor * dproducts[:, col] * a
    wide, narrow, without_factors, of_powers, times_factors, dx = KERNELS[case](
        [
            ((64, cols), np.float32),
            ((64, cols), NAMES[name]),
            ((64, 2 * cols), NAMES[name]),
            ((64, cols), NAMES[name]),
            ((64, cols), np.float32),
            ((64, width), np.float32),
        ],
        x,
        dproducts,
        scalars=FACTORS,
    )
    assert_same(wide, expected)
    assert_same(narrow, expected.astype(NAMES[name]))
    assert_same(without_factors, np.tile(plain, 2).astype(NAMES[name]))
    if name == BF16:
        assert_same(of_powers, twice.astype(NAMES[name]))
    else:
        assert_same(of_powers, narrow)
    assert_same(times_factors, scaled)
    assert_same(dx, gradient)


@pytest.mark.parametrize("name", (BF16, FP16))
def test_products_are_rounded_once(rng, name):
    """Of values with all their digits, and some that underflow or overflow."""
    x = (rng.standard_normal((64, 16)) * 2.0 ** rng.integers(-9, 9, (64, 1))).astype(
        NAMES[name]
    )
    values = x.astype(np.float64)
    powers = (4, 2, 8)
    _, narrow, without_factors, of_powers, _, _ = KERNELS[name, 16, 16, 160, 0](
        [
            ((64, 160), np.float32),
            ((64, 160), NAMES[name]),
            ((64, 320), NAMES[name]),
            ((64, 160), NAMES[name]),
            ((64, 160), np.float32),
            ((64, 16), np.float32),
        ],
        x,
        np.zeros((64, 160), np.float32),
        scalars=powers,
    )
    ones = np.ones(64)
    plain, scaled = [], []
    for first, second, factor in columns(16):
        a, b = (ones if i is None else values[:, i] for i in (first, second))
        plain.append((factor > 0) * a * b)
        # Of the columns without a first value, the factor is that of the one, or zero.
        known = factor if first is None else powers[FACTORS.index(factor)]
        scaled.append(known * a * b)

    def rounded(columns):
        with np.errstate(over="ignore"):
            return np.stack(columns, 1).astype(np.float32).astype(NAMES[name])

    assert_same(narrow, rounded(scaled))
    assert_same(of_powers, rounded(scaled))
    assert_same(without_factors, np.tile(rounded(plain), 2))
