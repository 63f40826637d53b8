"""How arrays of any rank and size become what the matmul kernel takes.

The kernel takes operands ``[batch or 1, rows, columns]``; one of batch 1 is shared, not
copied. Its copy engine wants rows that begin at multiples of 16 bytes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from tk_jax import _check
from tk_jax.ops.matmul.config import MatmulOptions

# 16 bytes of a 16-bit type.
_ROW_MULTIPLE = 8
# The kernel counts rows in 32 bits, rounded up to whole tiles.
MAX_SIZE = _check.INT32_MAX - 255


def sizes(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], options: MatmulOptions
) -> tuple[int, int, int]:
    """``(M, N, K)`` of a product; b's K is not looked at."""
    m, k = a_shape[-1:-3:-1] if options.transpose_a else a_shape[-2:]
    n = b_shape[-2] if options.transpose_b else b_shape[-1]
    return m, n, k


def broadcast_batch(a_shape, b_shape) -> tuple[int, ...]:
    return jnp.broadcast_shapes(tuple(a_shape[:-2]), tuple(b_shape[:-2]))


def fold_batch(
    a: jax.Array, b: jax.Array, options: MatmulOptions
) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """Folds all leading dimensions into one, and returns the shape of the result.

    Leading dimensions of ``a`` over which ``b`` is shared become rows of ``a`` where
    its layout permits: one product of many rows instead of many products. An operand
    without any batch stays a batch of 1. An operand that has some of the batch
    dimensions and lacks others is expanded, which copies it.
    """
    batch = broadcast_batch(a.shape, b.shape)
    m, n, _ = sizes(a.shape, b.shape, options)
    a_lead = _pad_rank(a.shape[:-2], len(batch))
    b_lead = _pad_rank(b.shape[:-2], len(batch))
    kept = len(batch)
    rows = m
    if not options.transpose_a:
        while kept and b_lead[kept - 1] == 1:
            if rows * batch[kept - 1] > MAX_SIZE:
                break
            kept -= 1
            rows *= batch[kept]
    if kept < len(batch):
        a = a.reshape(*a_lead[:kept], rows, a.shape[-1])
        b = b.reshape(*b_lead[:kept], *b.shape[-2:])
    return (
        _flatten_batch(a, batch[:kept]),
        _flatten_batch(b, batch[:kept]),
        (*batch, m, n),
    )


def _pad_rank(lead: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(lead)) + tuple(lead)


def _flatten_batch(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    matrix = x.shape[-2:]
    if math.prod(x.shape[:-2]) == 1:
        return x.reshape(1, *matrix)
    if _pad_rank(x.shape[:-2], len(batch)) != batch:
        x = jnp.broadcast_to(x, (*batch, *matrix))
    return x.reshape(math.prod(batch), *matrix)


def fold_into_depth(
    x: jax.Array, y: jax.Array, options: MatmulOptions
) -> tuple[jax.Array, jax.Array, MatmulOptions]:
    """Makes ``sum over the batch of op(x) @ op(y)`` one product of batch 1.

    The batch joins the summed dimension. That is a reshape for an operand whose summed
    dimension comes first in memory, and a transposition that copies for one where it
    comes last.
    """
    return (
        _stack(x, depth_first=options.transpose_a),
        _stack(y, depth_first=not options.transpose_b),
        options,
    )


def fold_into_depth_copies(
    x_shape: tuple[int, ...], y_shape: tuple[int, ...], options: MatmulOptions
) -> int:
    """Elements that :func:`fold_into_depth` copies."""
    copies = 0 if options.transpose_a else math.prod(x_shape)
    return copies + (math.prod(y_shape) if options.transpose_b else 0)


def _stack(x: jax.Array, *, depth_first: bool) -> jax.Array:
    if depth_first:
        return x.reshape(1, -1, x.shape[-1])
    return jnp.moveaxis(x, 0, 1).reshape(1, x.shape[1], -1)


def pad_rows(
    a: jax.Array, b: jax.Array, options: MatmulOptions
) -> tuple[jax.Array, jax.Array]:
    """Zero-pads what is contiguous in a, b or the result to a multiple of 16 bytes.

    N is contiguous in the result, M only in a transposed a, K in an a or b that is
    stored with K last. Zeros in K add nothing; rows and columns of the result that come
    of padding are for the caller to drop.
    """
    m, n, k = sizes(a.shape, b.shape, options)
    pad_m = -m % _ROW_MULTIPLE if options.transpose_a else 0
    pad_n = -n % _ROW_MULTIPLE
    k_is_last = not options.transpose_a or options.transpose_b
    pad_k = -k % _ROW_MULTIPLE if k_is_last else 0
    a_pads = (pad_k, pad_m) if options.transpose_a else (pad_m, pad_k)
    b_pads = (pad_n, pad_k) if options.transpose_b else (pad_k, pad_n)
    return _pad(a, a_pads), _pad(b, b_pads)


def _pad(x: jax.Array, pads: tuple[int, int]) -> jax.Array:
    if not any(pads):
        return x
    return jnp.pad(x, ((0, 0), (0, pads[0]), (0, pads[1])))
