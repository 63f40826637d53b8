"""What the matmul tests share: layouts, random operands, and the definition."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
from tolerance import assert_close

import tk_jax

BF16 = jnp.bfloat16
TRANSPOSES = list(itertools.product((False, True), repeat=2))
# (M, N, K): around the tiles' 64, 128 and 256, rows that need padding and rows that do
# not, single rows, columns and steps, and all four configs.
SIZES = [
    (1, 1, 1),
    (1, 8, 8),
    (7, 9, 5),
    (8, 16, 24),
    (63, 65, 64),
    (64, 64, 63),
    (65, 63, 129),
    (127, 257, 191),
    (128, 256, 64),
    (129, 255, 193),
    (1, 4096, 1000),
    (1000, 1, 1023),
    (1000, 1000, 1000),
    (1025, 1023, 1024),
    (2048, 2048, 320),
    (1900, 2040, 136),
    (4090, 2300, 200),
    (3960, 2300, 72),
]
# Leading dimensions of a and b.
BATCHES = [
    ((), ()),
    ((3,), ()),
    ((), (3,)),
    ((3,), (3,)),
    ((1,), (4,)),
    ((2, 3), (3,)),
    ((2, 3), (2, 1)),
    ((2, 1), (1, 3)),
]


def transposes_id(transposes) -> str:
    return "".join("nt"[transpose] for transpose in transposes)


def operands(rng, transposes, batches=((), ()), sizes=(5, 9, 7), dtype=BF16):
    m, n, k = sizes
    a_matrix = (k, m) if transposes[0] else (m, k)
    b_matrix = (n, k) if transposes[1] else (k, n)
    return (
        jnp.asarray(rng.standard_normal((*batches[0], *a_matrix)), dtype),
        jnp.asarray(rng.standard_normal((*batches[1], *b_matrix)), dtype),
    )


def product(transposes, implementation=None):
    return functools.partial(
        tk_jax.matmul,
        transpose_a=transposes[0],
        transpose_b=transposes[1],
        implementation=implementation,
    )


def definition(a, b, transposes):
    """The product in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a = np.swapaxes(a, -1, -2) if transposes[0] else a
    b = np.swapaxes(b, -1, -2) if transposes[1] else b
    return np.matmul(a, b)


def check(result, a, b, transposes):
    exact = definition(a, b, transposes)
    # One rounding of the exact result: no sum in 16 bits is nearer.
    assert_close(result, exact, jnp.asarray(exact, jnp.float32).astype(result.dtype))
