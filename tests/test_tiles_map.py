"""Elementwise operations, conversions and coordinates of the tile library."""

import numpy as np
import pytest
from tiles import BF16, FLOAT, FP16, NAMES, assert_same, kernel, normals, round_to

pytestmark = pytest.mark.usefixtures("tile_implementation")

SHAPE = (32, 16)
SPECIAL = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 0.5]

UNARY = [(FLOAT, FLOAT), (BF16, FLOAT), (FP16, FP16), (FLOAT, BF16)]
BINARY = [(FLOAT, FLOAT, FLOAT), (BF16, FLOAT, FP16), (FLOAT, BF16, BF16)]
CONVERT = [
    (FLOAT, BF16),
    (FLOAT, FP16),
    (BF16, FLOAT),
    (FP16, FLOAT),
    (BF16, FP16),
    (FP16, BF16),
]
PARTS = {name: kernel("map", "parts", name) for name in (FLOAT, BF16)}
UNARY_KERNELS = {types: kernel("map", "unary", *types) for types in UNARY}
BINARY_KERNELS = {types: kernel("map", "binary", *types) for types in BINARY}
CONVERT_KERNELS = {
    types: kernel("map", "convert", *types, threads=128) for types in CONVERT
}
VECTORS = kernel("map", "vectors")
COORDINATES = kernel("map", "coordinates", threads=128)


def small_tanh(x):
    """Of a few hundredths of x; of an infinity, the polynomial makes the same."""
    return np.where(np.isinf(x), x, np.tanh(np.float32(0.06) * x))


def softplus(x):
    return np.logaddexp(x, 0.0)


# Each function of float64, and the relative error that the hardware's own is allowed
# beside what the destination's type rounds away. exp scales its argument first, whose
# rounding grows with it; tanh is the coarse one of the special-function unit.
UNARY_OPS = {
    "exp2": (np.exp2, 1e-6),
    "exp": (np.exp, 2e-6),
    "log2": (np.log2, 1e-6),
    "log": (np.log, 1e-6),
    "abs": (np.abs, 0),
    "neg": (np.negative, 0),
    "relu": (lambda x: np.maximum(x, 0.0), 0),
    "tanh": (np.tanh, 1e-3),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-6),
    "reciprocal": (lambda x: 1 / x, 1e-6),
    "convert": (lambda x: x, 0),
    "map": (lambda x: 2 * x + 1, 1e-7),
    "log of one": (np.log, 3e-7),
    "fma": (lambda x: np.float32(x * x + 1), 0),
    "mul": (lambda x: np.float32(x) * np.float32(0.3) + np.float32(1), 0),
    "max_nan": (lambda x: np.maximum(x, 1.0), 0),
    "accurate_tanh": (np.tanh, 4e-7),
    "small_tanh": (small_tanh, 5e-7),
    "accurate_tanh of half": (lambda x: np.tanh(0.5 * x), 4e-7),
    # Small, but for the square with an infinity in it.
    "accurate_tanh of little": (lambda x: np.tanh(np.float32(0.06) * x), 5e-7),
    "softplus": (softplus, 2e-6),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 2e-6),
    "SmallTanhFactor": (
        lambda x: np.where(np.isinf(x), x, 3 * np.tanh(np.float32(0.06) * x)),
        5e-7,
    ),
    "its limit": (lambda x: np.full_like(x, 0.55 / 0.06), 1e-6),
    "its limit where floats end": (lambda x: np.full_like(x, -1), 0),
    "all_within, beside an infinity": (np.zeros_like, 0),
    "all_within": (np.ones_like, 0),
    "all_within, of less": (np.zeros_like, 0),
    "map_within": (
        lambda x: x + np.where(np.arange(32)[:, None] < 16, -1.0, 1.0),
        1e-7,
    ),
    "fill": (lambda x: np.full_like(x, 2.5), 0),
    "zero": (np.zeros_like, 0),
    "neg in place": (np.negative, 0),
}
# The space between values of a type, relative to them.
EPSILON = {FLOAT: 2.0**-23, BF16: 2.0**-7, FP16: 2.0**-10}


@pytest.mark.parametrize("name", PARTS)
def test_parts(rng, name):
    x = normals(rng, (32, 64), NAMES[name])
    part, moved = PARTS[name]([((32, 32), x.dtype), (x.shape, x.dtype)], x)
    assert_same(part, x[:, 16:48])
    assert_same(moved, np.concatenate([x[:, 48:], x[:, 16:]], 1))


@pytest.mark.parametrize("types", UNARY, ids="-".join)
def test_unary(rng, types):
    src, dst = (NAMES[name] for name in types)
    x = (normals(rng, SHAPE) * 2).clip(-8, 8).astype(src)
    x[0, : len(SPECIAL)] = SPECIAL
    shape = (len(UNARY_OPS), *SHAPE)
    (result,) = UNARY_KERNELS[types]([(shape, dst)], x, scalars=[2.5])
    exact = x.astype(np.float64)
    for i, (name, (function, error)) in enumerate(UNARY_OPS.items()):
        with np.errstate(all="ignore"):
            expected = function(exact)
        np.testing.assert_allclose(
            result[i].astype(np.float64),
            expected,
            rtol=error + (EPSILON[types[1]] if error or types[1] != FLOAT else 0),
            # log2 near 1, where the result is near 0.
            atol=1e-6 if name.startswith("log") else 0,
            err_msg=name,
        )


def binary_expected(a, b, rows, cols, number):
    """In the kernel's order, float32 throughout."""
    operands = (b, np.float32(number), rows[:, None], cols[None, :])
    functions = (np.add, np.subtract, np.multiply, np.divide, np.fmax, np.fmin)
    for function in functions:
        for operand in operands:
            yield function(a, operand)
    yield a - 2 * b
    yield rows[:, None] - 2 * a
    yield cols[None, :] - 2 * a
    yield rows[:, None] - cols[None, :]


@pytest.mark.parametrize("types", BINARY, ids="-".join)
def test_binary(rng, types):
    dst, first, second = (NAMES[name] for name in types)
    a, b = normals(rng, SHAPE, first), normals(rng, SHAPE, second)
    a[1, : len(SPECIAL)] = SPECIAL
    b[2, : len(SPECIAL)] = SPECIAL
    a[3, :8] = b[3, :8] = [np.inf, np.nan, 0, 1, 1, 0, np.nan, -np.inf]
    rows, cols = normals(rng, SHAPE[0]), normals(rng, SHAPE[1])
    with np.errstate(all="ignore"):
        wide = (a.astype(np.float32), b.astype(np.float32))
        expected = np.stack(list(binary_expected(*wide, rows, cols, 0.75)))
    (result,) = BINARY_KERNELS[types](
        [(expected.shape, dst)], a, b, rows, cols, scalars=[0.75]
    )
    assert_same(result, round_to(expected, dst))


def test_vectors(rng):
    rows, cols = normals(rng, SHAPE[0]), normals(rng, SHAPE[1])
    by_row = [rows, rows * rows, rows - 2 * (rows * rows), 0 * rows + 0.75, 0 * rows]
    by_col = [cols, cols * cols, cols - 2 * (cols * cols), 0 * cols + 0.75, 0 * cols]
    expected = np.zeros((10, *SHAPE), np.float32)
    expected[0::2] = np.stack(by_row)[:, :, None]
    expected[1::2] = np.stack(by_col)[:, None, :]
    (result,) = VECTORS([(expected.shape, np.float32)], rows, cols, scalars=[0.75])
    assert_same(result, expected)


def test_coordinates():
    row = np.arange(128)[:, None] + np.zeros(48)
    col = np.arange(48)[None, :] + np.zeros((128, 1))
    expected = np.stack(
        [100 * (row % 32) + col, 100 * row + col, row % 32, row, col]
    ).astype(np.float32)
    (result,) = COORDINATES([(expected.shape, np.float32)])
    assert_same(result, expected + 0.5)


def all_halves(dtype):
    """Every bit pattern, as 64 columns."""
    return np.arange(2**16, dtype=np.uint16).view(dtype).reshape(-1, 64)


def around_halves(dtype):
    """What rounding to ``dtype`` can get wrong: each value, the middle between it and
    the next, the floats on either side of that middle, and large and tiny floats."""
    halves = np.sort(all_halves(dtype).astype(np.float32).ravel())
    halves = halves[np.isfinite(halves)]
    middles = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    extremes = [np.inf, np.nan, largest, smallest, smallest / 4, 1e-45, 0.0]
    extremes += [65519.9, 65520.0, 65536.0, 3.39e38, 3.3961776e38]
    extremes = np.float32([*extremes, *np.negative(extremes)])
    below = np.nextafter(middles, np.float32(-np.inf))
    above = np.nextafter(middles, np.float32(np.inf))
    values = np.concatenate([halves, middles, below, above, extremes])
    rest = -len(values) % (64 * 64)
    return np.concatenate([values, np.zeros(rest, np.float32)]).reshape(-1, 64)


@pytest.mark.parametrize("types", CONVERT, ids="-".join)
def test_convert_rounds_to_nearest_even(types):
    src, dst = (NAMES[name] for name in types)
    x = around_halves(dst) if src == np.float32 else all_halves(src)
    (result,) = CONVERT_KERNELS[types]([(x.shape, dst)], x, grid=len(x) // 64)
    wide = x.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = wide.astype(dst)
    nan = np.isnan(wide)
    np.testing.assert_array_equal(np.isnan(result.astype(np.float32)), nan)
    unsigned = np.uint32 if dst == np.float32 else np.uint16
    np.testing.assert_array_equal(
        result.view(unsigned)[~nan], expected.view(unsigned)[~nan]
    )
