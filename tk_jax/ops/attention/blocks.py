"""Block maps: which blocks of queries and of keys meet under segment ids and a mask.

The kernels walk the blocks that a map marks, and compare or read elements only in those
that are not visible as a whole. A map is made by XLA, once for each pass, from the
smallest and largest id of each block (ids in any order: blocks whose ranges overlap are
visited) and from whether any, and all, of a block of the mask is set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

WORD_BITS = 32


def block_map(seqlens, blocks, segment_ids, mask, *, transposed=False):
    """int32 [B or 1, H or 1, rows, words, 2], ``BlockMap`` in attention.h.

    Args:
      seqlens: T and S.
      blocks: Rows and columns of a block: ``block_q`` and ``block_kv``.
      segment_ids: int32 [B, T] and [B, S], or None.
      mask: bool [B or 1, H or 1, T or 1, S or 1], or None.
      transposed: Rows of the map are blocks of keys.

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
    if mask is not None:
        visited &= _reduce_blocks(mask, blocks, False, jnp.any)
        whole &= _reduce_blocks(mask, blocks, True, jnp.all)
    words = [
        _pack(jnp.swapaxes(x, 2, 3) if transposed else x) for x in (visited, whole)
    ]
    return lax.bitcast_convert_type(jnp.stack(words, -1), jnp.int32)


def _range_of_blocks(ids, block):
    """[B, N] -> the smallest and the largest id of each block, [B, blocks] each"""
    limits = jnp.iinfo(ids.dtype)
    return (
        _blocks_of(ids, 1, block, limits.max).min(-1),
        _blocks_of(ids, 1, block, limits.min).max(-1),
    )


def _reduce_blocks(mask, blocks, neutral, reduce):
    """[b, h, T or 1, S or 1] -> [b, h, q_blocks or 1, kv_blocks or 1]"""
    for axis, block in zip((2, 3), blocks, strict=True):
        if mask.shape[axis] != 1:
            mask = reduce(_blocks_of(mask, axis, block, neutral), axis=axis + 1)
    return mask


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
