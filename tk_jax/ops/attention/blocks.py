"""What kernels read of segment ids and masks: block maps, and a mask's bits.

The kernels walk the blocks that a map marks, and compare or test elements only in those
that are not visible as a whole. A map is made by XLA, once for each pass, from the
smallest and largest id of each block (ids in any order: blocks whose ranges overlap are
visited) and from whether any, and all, of a block of the mask is set. The mask itself
is packed, a bit for each of its elements: it is read once, here, and the kernels test
a bit where they would load a byte.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD_BITS = 32
_ALL = np.uint32(2**WORD_BITS - 1)


def mask_bits(mask, blocks, *, transposed=False):
    """uint32 [B or 1, H or 1, words or 1, rows or 1], ``MaskBits`` in attention.h.

    Args:
      mask: bool [B or 1, H or 1, T or 1, S or 1].
      blocks: Queries and keys of a block: zeros fill the last ones.
      transposed: Rows are keys and columns queries, not the other way round.

    Bit c % 32 of word c / 32 is column c; of one for all, words are zeros or ones.
    """
    axis = 2 if transposed else 3
    is_shared = mask.shape[axis] == 1
    mask = _whole_blocks(mask, blocks)
    if is_shared:
        bits = jnp.where(mask, _ALL, jnp.uint32(0))
    elif transposed:
        # Bit by bit: as a sum XLA takes three times as long over it.
        queries = _blocks_of(mask, axis, WORD_BITS, False)
        bits = functools.reduce(
            operator.or_,
            (
                jnp.where(
                    lax.index_in_dim(queries, i, axis + 1, keepdims=False),
                    jnp.uint32(1 << i),
                    jnp.uint32(0),
                )
                for i in range(WORD_BITS)
            ),
        )
    else:
        # As a sum: bit by bit, XLA takes four times as long over words in this order.
        bits = _pack(mask)
    if not transposed:
        bits = jnp.swapaxes(bits, 2, 3)
    # Made once, and not again wherever it is used.
    return lax.optimization_barrier(bits)


def block_map(seqlens, blocks, segment_ids, bits, *, transposed=False, of_keys=False):
    """int32 [B or 1, H or 1, rows, words, 2], ``BlockMap`` in attention.h.

    Args:
      seqlens: T and S.
      blocks: Rows and columns of a block: ``block_q`` and ``block_kv``.
      segment_ids: int32 [B, T] and [B, S], or None.
      bits: What ``mask_bits`` made for these blocks, or None.
      transposed: Rows of the map are blocks of keys.
      of_keys: Rows of ``bits`` are keys.

    Of the last axis the first has bits of blocks to visit, the second of blocks that
    are visible as a whole; bit 0 of word 0 is column 0.
    """
    sizes = tuple(-(-n // block) for n, block in zip(seqlens, blocks, strict=True))
    visited = whole = jnp.ones((1, 1, *sizes), jnp.bool_)
    if segment_ids is not None:
        (q_low, q_high), (kv_low, kv_high) = (
            _range_of_blocks(ids, block)
            for ids, block in zip(segment_ids, blocks, strict=True)
        )
        q_low, q_high = (x[:, None, :, None] for x in (q_low, q_high))
        kv_low, kv_high = (x[:, None, None, :] for x in (kv_low, kv_high))
        visited &= (q_low <= kv_high) & (kv_low <= q_high)
        whole &= (q_low == kv_high) & (q_high == kv_low) & (q_low == q_high)
    if bits is not None:
        step = -1 if of_keys else 1
        any_set, all_set = _reduce_bits(bits, seqlens[::step], blocks[::step])
        if not of_keys:
            any_set, all_set = (jnp.swapaxes(x, 2, 3) for x in (any_set, all_set))
        visited &= any_set
        whole &= all_set
    words = [
        _pack(jnp.swapaxes(x, 2, 3) if transposed else x) for x in (visited, whole)
    ]
    return lax.bitcast_convert_type(jnp.stack(words, -1), jnp.int32)


def _reduce_bits(bits, seqlens, blocks):
    """[b, h, words or 1, rows or 1] -> whether any, and whether all of a block is set.

    ``seqlens`` and ``blocks`` are of rows and of columns. Each result is a bool
    [b, h, column blocks or 1, row blocks or 1]; what fills the last blocks does not
    count.
    """
    (num_rows, num_columns), (block_rows, block_columns) = seqlens, blocks
    some = every = bits
    if bits.shape[3] != 1:
        filler = lax.broadcasted_iota(jnp.int32, (1, 1, 1, bits.shape[3]), 3)
        every = every | jnp.where(filler >= num_rows, _ALL, jnp.uint32(0))
    part = WORD_BITS
    column_blocks = -(-num_columns // block_columns)
    if bits.shape[2] != 1 or column_blocks * block_columns <= WORD_BITS:
        word = lax.broadcasted_iota(jnp.int32, (1, 1, bits.shape[2], 1), 2)
        own = jnp.maximum(num_columns - WORD_BITS * word, 0)
        shifts = jnp.minimum(own, WORD_BITS - 1).astype(jnp.uint32)
        every = every | jnp.where(own < WORD_BITS, _ALL << shifts, jnp.uint32(0))
        # Blocks consist of these parts of words, and all rows' parts are joined first:
        # what is left to reduce lies side by side.
        part = math.gcd(block_columns, WORD_BITS)
        split = functools.partial(
            _parts_of_blocks, part=part, block=block_columns, blocks=column_blocks
        )
        some = functools.reduce(operator.or_, split(some))
        every = functools.reduce(operator.and_, split(every))
    full = jnp.uint32(2**part - 1)
    if bits.shape[3] != 1:
        some, every = (x.reshape(*x.shape[:3], -1, block_rows) for x in (some, every))
        some = lax.reduce(some, jnp.uint32(0), lax.bitwise_or, (4,))
        every = lax.reduce(every, _ALL, lax.bitwise_and, (4,))
    return some != 0, every == full


def _parts_of_blocks(words, *, part, block, blocks):
    """[b, h, words, rows] -> the parts of blocks of columns: [b, h, blocks, rows]"""
    shape = (1, 1, 1, WORD_BITS // part, 1)
    shifts = part * lax.broadcasted_iota(jnp.uint32, shape, 3)
    parts = (words[:, :, :, None] >> shifts) & jnp.uint32(2**part - 1)
    parts = parts.reshape(*words.shape[:2], -1, words.shape[3])
    parts = parts[:, :, : blocks * block // part]
    parts = parts.reshape(*words.shape[:2], blocks, block // part, words.shape[3])
    return [parts[:, :, :, i] for i in range(block // part)]


def _range_of_blocks(ids, block):
    """[B, N] -> the smallest and the largest id of each block, [B, blocks] each"""
    limits = jnp.iinfo(ids.dtype)
    return (
        _blocks_of(ids, 1, block, limits.max).min(-1),
        _blocks_of(ids, 1, block, limits.min).max(-1),
    )


def _whole_blocks(mask, blocks):
    """Zeros fill the last block of queries, and of keys, of what is not shared."""
    padding = [(0, 0)] * 2
    for size, block in zip(mask.shape[2:], blocks, strict=True):
        padding.append((0, -size % block if size != 1 else 0))
    return jnp.pad(mask, padding)


def _blocks_of(x, axis, block, filler):
    """[..., N, ...] -> [..., blocks, block, ...]"""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, padding, constant_values=filler)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def _pack(bits: jax.Array):
    """bool [..., N] -> uint32 [..., ceil(N / 32)]"""
    words = _blocks_of(bits, bits.ndim - 1, WORD_BITS, False)
    weights = jnp.uint32(1) << jnp.arange(WORD_BITS, dtype=jnp.uint32)
    return jnp.where(words, weights, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)
