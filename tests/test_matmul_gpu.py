"""matmul's kernel on the GPU: numbers, edges, determinism, gradients."""

import concurrent.futures
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import (
    BATCHES,
    BF16,
    SIZES,
    TRANSPOSES,
    check,
    operands,
    product,
    transposes_id,
)
from tolerance import assert_close

from tk_jax import _ffi
from tk_jax.ops.matmul import config
from tk_jax.ops.matmul.vjp import kernel_matmul

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels():
    """Fills the kernel cache with all that these tests run, in parallel."""
    specs = [
        spec
        for dtype, transposes, chosen in itertools.product(
            ("bfloat16", "float16"), TRANSPOSES, config.CONFIGS
        )
        for spec in _ffi.extension().matmul_specs(
            dtype=dtype,
            transpose_a=transposes[0],
            transpose_b=transposes[1],
            config=dataclasses.asdict(chosen),
        )
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(_ffi.extension().compile, specs))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills free memory with NaN: around the operands, and where results will lie."""
    poison = [jnp.full((2**size,), jnp.nan, BF16) for size in range(8, 27)]
    jax.block_until_ready(poison)
    del poison


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "M{}-N{}-K{}".format(*sizes))
def test_sizes(rng, sizes, transposes):
    a, b = operands(rng, transposes, sizes=sizes)
    check(product(transposes, "tk")(a, b), a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize(
    "sizes", [(7, 9, 5), (129, 192, 200), (1900, 2040, 72)], ids=str
)
def test_float16(rng, sizes, transposes):
    a, b = operands(rng, transposes, sizes=sizes, dtype=jnp.float16)
    check(product(transposes, "tk")(a, b), a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_batches(rng, batches, transposes):
    a, b = operands(rng, transposes, batches, (130, 72, 100))
    check(product(transposes, "tk")(a, b), a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
def test_many_tiles_of_a_batch(rng, transposes):
    """More tiles than multiprocessors: blocks go from one batch element to the next."""
    a, b = operands(rng, transposes, ((9,), (9,)), (520, 776, 264))
    check(product(transposes, "tk")(a, b), a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize(
    "chosen",
    [
        config.MatmulConfig(cluster_m=2),
        config.MatmulConfig(block_n=128, stages=6, cluster_m=2, group_m=2),
        config.MatmulConfig(block_m=256, block_n=128),
    ],
    ids=["clusters-wide", "clusters-narrow", "tall"],
)
def test_tiles_that_are_only_chosen_by_hand(rng, chosen, transposes):
    # An odd number of tiles along M: half of the last cluster has nothing to do.
    a, b = operands(rng, transposes, sizes=(1032, 2312, 328))
    options = config.MatmulOptions(*transposes)
    result = jax.jit(kernel_matmul, static_argnums=(2, 3))(
        a[None], b[None], options, chosen
    )
    check(result[0], a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
def test_large_and_tiny_values(rng, transposes):
    a, b = operands(rng, transposes, sizes=(72, 136, 264))
    a, b = a * jnp.asarray(1e18, BF16), b * jnp.asarray(1e-30, BF16)
    check(product(transposes, "tk")(a, b), a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("sizes", [(130, 72, 100), (131, 73, 101)], ids=str)
def test_nan_stays_in_its_row_and_column(rng, sizes, transposes):
    a, b = operands(rng, transposes, ((3,), (3,)), sizes)
    m, n, k = sizes
    a = a.at[(1, k - 1, m - 1) if transposes[0] else (1, m - 1, k - 1)].set(jnp.nan)
    b = b.at[(2, n - 1, 0) if transposes[1] else (2, 0, n - 1)].set(jnp.nan)
    result = product(transposes, "tk")(a, b)
    expected = np.zeros((3, m, n), bool)
    expected[1, m - 1] = expected[2, :, n - 1] = True
    np.testing.assert_array_equal(np.isnan(np.float32(result)), expected)
    check(result, a, b, transposes)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
def test_50_runs_give_equal_bits(rng, transposes):
    a, b = operands(rng, transposes, ((2,), (2,)), (1000, 776, 520))
    run = product(transposes, "tk")

    @jax.jit
    def differing_bits(first, a, b):
        first, again = (
            jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (first, run(a, b))
        )
        return jnp.sum(first != again)

    first = run(a, b)
    differing = [differing_bits(first, a, b) for _ in range(50)]
    assert sum(int(count) for count in differing) == 0


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize(
    "batches", [((), ()), ((3,), (3,)), ((3,), ()), ((), (3,))], ids=str
)
def test_gradients(rng, batches, transposes):
    sizes = (136, 72, 100)
    a, b = operands(rng, transposes, batches, sizes)
    result, pull_back = jax.vjp(product(transposes, "tk"), a, b)
    dc = jnp.asarray(rng.standard_normal(result.shape), BF16)
    # The gradient of a shared operand may be a sum of rounded gradients, so allowed is
    # what plain XLA makes of it.
    plain = jax.vjp(product(transposes, "xla"), a, b)[1](dc)
    exact = exact_gradients(a, b, dc, transposes)
    for name, ours, want, low in zip("ab", pull_back(dc), exact, plain, strict=True):
        assert_close(ours, want, low, what=f"d{name}")


def exact_gradients(a, b, dc, transposes):
    a, b, dc = (np.asarray(x, np.float64) for x in (a, b, dc))
    left = np.swapaxes(a, -1, -2) if transposes[0] else a
    right = np.swapaxes(b, -1, -2) if transposes[1] else b
    da = dc @ np.swapaxes(right, -1, -2)
    db = np.swapaxes(left, -1, -2) @ dc
    da = np.swapaxes(da, -1, -2) if transposes[0] else da
    db = np.swapaxes(db, -1, -2) if transposes[1] else db
    return (
        da.sum(axis=tuple(range(da.ndim - a.ndim))),
        db.sum(axis=tuple(range(db.ndim - b.ndim))),
    )


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap(rng, in_axes):
    batches = [() if axis is None else (3,) for axis in in_axes]
    a, b = operands(rng, (False, True), batches, (72, 136, 64))
    result = jax.vmap(product((False, True), "tk"), in_axes)(a, b)
    check(result, a, b, (False, True))


def test_scan_over_layers(rng):
    """The same call many times in one executable, its result the next one's operand."""
    x = jnp.asarray(rng.standard_normal((200, 256)), BF16)
    w = jnp.asarray(rng.standard_normal((5, 256, 256)) / 16, BF16)

    @functools.partial(jax.jit, static_argnums=2)
    def layers(x, w, implementation):
        run = product((False, True), implementation)
        return jax.lax.scan(lambda x, w: (run(x, w), None), x, w)[0]

    exact = np.asarray(x, np.float64)
    for layer in np.asarray(w, np.float64):
        exact = exact @ layer.T
    assert_close(layers(x, w, "tk"), exact, layers(x, w, "xla"))


def test_more_elements_than_32_bits_count():
    """The last tiles of a result of 2**31 + 2**18 elements are where they belong."""
    m, n = 2**16 + 8, 2**15
    a = jnp.zeros((m, 8), BF16).at[-1].set(3)
    b = jnp.zeros((8, n), BF16).at[:, -1].set(2).at[:, 0].set(1)
    result = product((False, False), "tk")(a, b)
    np.testing.assert_array_equal(
        np.float32(result[-1, jnp.array([0, 1, -1])]), [24, 0, 48]
    )
    assert int(jnp.count_nonzero(result)) == 2
