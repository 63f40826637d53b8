"""Reductions, running sums and transposition of the tile library."""

import numpy as np
import pytest
from tiles import (
    BF16,
    FLOAT,
    FP16,
    NAMES,
    assert_same,
    integers,
    kernel,
    normals,
    round_to,
)

pytestmark = pytest.mark.usefixtures("tile_implementation")

SHAPE = (32, 48)
TYPES = (FLOAT, BF16, FP16)
ROWS = {name: kernel("reduce", "row_reductions", name) for name in TYPES}
COLS = {name: kernel("reduce", "col_reductions", name) for name in TYPES}
SUMS = {name: kernel("reduce", "running_sums", name) for name in TYPES}
STORED = {
    name: kernel("reduce", "stored_row_sums", name, threads=128) for name in TYPES
}
REVERSED = {name: kernel("reduce", "reversed", name) for name in TYPES}
TRANSPOSED = {
    (name, size): kernel("reduce", "transposed", name, size)
    for name, size in ((BF16, 16), (BF16, 48), (FP16, 64))
}
START = -6.5


def reductions(x, y, axis):
    """What the kernel reduces: x; then x and y into a vector that starts as START."""
    both = np.concatenate([x, y], axis)
    yield np.sum(x, axis)
    yield np.fmax.reduce(x, axis, initial=-np.inf)
    yield np.fmin.reduce(x, axis, initial=np.inf)
    yield np.prod(x, axis)
    yield np.fmax.reduce(np.abs(x), axis, initial=abs(START))
    yield np.sum(both, axis)
    yield np.fmax.reduce(both, axis, initial=START)
    yield np.fmin.reduce(both, axis, initial=START)
    yield np.prod(both, axis)
    yield np.fmax.reduce(np.abs(both), axis, initial=abs(START))


def operands(rng, name, case):
    """Powers of two and their negatives: every order of a sum or product is exact."""
    x, y = (
        rng.choice([0.25, 0.5, 1, 2, 4], SHAPE) * rng.choice([-1, 1], SHAPE)
        for _ in range(2)
    )
    if case == "special":
        # A row and a column of each kind.
        for i, value in enumerate([np.nan, np.inf, -np.inf, 0.0, -9.0, 9.0]):
            x[3 * i + 1, 5 * i + 2] = y[3 * i + 2, 5 * i + 3] = value
        x[20] = y[20] = np.nan
        x[:, 40] = y[:, 40] = np.nan
        x[25, 30], x[25, 31] = np.inf, -np.inf
    return (values.astype(np.float32).astype(NAMES[name]) for values in (x, y))


@pytest.mark.parametrize("case", ["finite", "special"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("axis", [1, 0], ids=["rows", "cols"])
def test_reductions(rng, axis, name, case):
    x, y = operands(rng, name, case)
    wide = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(invalid="ignore"):
        vectors = np.stack(list(reductions(*wide, axis)))
    if axis == 1:
        largest = [np.fmax.reduce(values, 1, initial=-np.inf) for values in wide]
        any_row = np.full((1, SHAPE[0]), np.any(largest[0] < largest[1]))
        with np.errstate(invalid="ignore"):
            dot = np.sum(wide[0] * (wide[0] + wide[1]), 1, keepdims=True).T
        vectors = np.concatenate([vectors, dot, any_row])
    # Each vector comes spread over a tile, so that every lane has its say.
    expected = np.repeat(np.expand_dims(vectors, axis + 1), 16, axis + 1)
    run = (ROWS if axis == 1 else COLS)[name]
    (result,) = run([(expected.shape, np.float32)], x, y, scalars=[START])
    assert_same(result, expected)


@pytest.mark.parametrize("lesser", [None, 17], ids=["no-row", "one-row"])
def test_any_row(rng, lesser):
    """The answer is the same in every lane, also where one row alone says yes."""
    x = np.ones(SHAPE, np.float32)
    y = np.ones(SHAPE, np.float32)
    if lesser is not None:
        y[lesser, 5] = 2
    (result,) = ROWS[FLOAT]([((12, 32, 16), np.float32)], x, y, scalars=[START])
    assert_same(result[11], np.full((32, 16), lesser is not None))


@pytest.mark.parametrize("name", TYPES)
def test_stored_row_sums(rng, name):
    x, y = (integers(rng, (64, 48), NAMES[name]) for _ in range(2))
    of_x, of_y = (z.astype(np.float32).sum(1) for z in (x, y))
    one, first, second = STORED[name](
        [((64,), np.float32), ((64,), np.float32), ((64, 3), np.float32)], x, y
    )
    assert_same(one, of_x + 2)
    assert_same(first, of_x + 2)
    assert_same(second[:, 0], of_y + 4)


@pytest.mark.parametrize("name", TYPES)
def test_running_sums(rng, name):
    x = integers(rng, SHAPE, NAMES[name])
    along, down = (np.cumsum(x.astype(np.float32), axis) for axis in (1, 0))
    (result,) = SUMS[name]([((4, *SHAPE), np.float32)], x)
    assert_same(result[:2], np.stack([along, down]))
    assert_same(result[2:], round_to(np.stack([along, down]), NAMES[name]))


@pytest.mark.parametrize("name", [FLOAT, BF16])
def test_running_sums_know_nothing_of_what_follows(rng, name):
    x = integers(rng, SHAPE, NAMES[name])
    x[4, 21], x[9, 14], x[15, 7], x[29, 40] = np.inf, -np.inf, np.nan, 1e30
    expected = np.stack([np.cumsum(x.astype(np.float32), axis) for axis in (1, 0)])
    (result,) = SUMS[name]([((4, *SHAPE), np.float32)], x)
    # Beyond 1e30 the whole numbers are lost, in an order that is the kernel's own.
    assert_same(result[0, :29], expected[0, :29])
    assert_same(result[0, 29, :40], expected[0, 29, :40])
    assert_same(result[1, :29], expected[1, :29])


@pytest.mark.parametrize("name", TYPES)
def test_reversed_columns(rng, name):
    x = normals(rng, SHAPE, NAMES[name])
    (result,) = REVERSED[name]([((2, *SHAPE), NAMES[name])], x)
    assert_same(result, np.stack([x[:, ::-1], x]).astype(np.float32))


@pytest.mark.parametrize(("name", "size"), TRANSPOSED)
def test_transpose_and_columns(rng, name, size):
    x = normals(rng, (size, size), NAMES[name])
    turned, parts = TRANSPOSED[name, size](
        [((2, size, size), x.dtype), ((size // 16, size, 16), x.dtype)], x
    )
    assert_same(turned, np.stack([x.T, x.T]).astype(np.float32))
    assert_same(parts, np.stack(np.split(x, size // 16, 1)).astype(np.float32))
