"""What the kernels take of a call's extras, in one order: :class:`Operands`."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tk_jax.ops.attention import blocks, config, tiling

# Of sinks in the kernels.
_LARGEST = 2.0**127


class Operands(NamedTuple):
    """The arrays that stand after the kernels' others, of size 0 where there is none.

    Axes of size 1 are kept where that is possible.
    """

    query_seq_lengths: jax.Array  # int32 [B]
    key_value_seq_lengths: jax.Array  # int32 [B]
    q_segment_ids: jax.Array  # int32 [B, T]
    kv_segment_ids: jax.Array  # int32 [B, S]
    # Bits of the mask: blocks.mask_bits. Of kernels whose rows are queries, and of
    # those whose rows are keys.
    mask: jax.Array
    transposed_mask: jax.Array
    bias: jax.Array  # [B or 1, H or 1, T or 1, S or 1], of q's dtype or float32
    sinks: jax.Array  # float32 [B or 1, H]
    # Of query blocks over key blocks, and the other way round: blocks.block_map.
    key_map: jax.Array
    query_map: jax.Array


def forward(extras: config.Extras, batch, q, k, tiles) -> Operands | tuple[()]:
    """Those of the forward kernel; none at all where there are no extras."""
    return _operands(extras, batch, q, k, (tiles.block_q, tiles.block_kv), None)


def backward(extras: config.Extras, batch, q, k, tiles) -> Operands | tuple[()]:
    """Those of the backward pass.

    The kernel of narrow heads has rows of keys alone, and so its blocks in either map;
    of wide heads, dq's has rows of queries, and blocks of its own.
    """
    block = None
    if tiles.dq_block_kv:
        block = (tiling.WIDE_DQ_BLOCK_Q, tiles.dq_block_kv)
    return _operands(extras, batch, q, k, block, (tiles.block_q, tiles.block_kv))


def of_bias_gradient(extras: config.Extras, batch, q, k) -> Operands:
    """Those of the pass for a bias's gradient, which visits every block."""
    block = (tiling.BIAS_BLOCK_Q, tiling.BIAS_BLOCK_KV)
    return _operands(extras, batch, q, k, block, None, mapped=False)


def _operands(extras, batch, q, k, block, transposed_block, mapped=True):
    """``block``, ``transposed_block``: of kernels with rows of queries, of keys."""
    if all(x is None for x in extras):
        return ()

    def whole(x, dtype, rank):
        """[*b, ...] -> [B, ...]"""
        if x is None:
            return jnp.zeros((0,) * (1 + rank), dtype)
        shape = x.shape[x.ndim - rank :]
        return fold(jnp.broadcast_to(x, (*batch, *shape)), rank).astype(dtype)

    def shared(x, dtype, rank):
        """[*b, ...] -> [B or 1, ...]"""
        if x is not None and math.prod(x.shape[: x.ndim - rank]) == 1:
            return x.reshape(1, *x.shape[x.ndim - rank :]).astype(dtype)
        return whole(x, dtype, rank)

    segment_ids = (
        whole(extras.q_segment_ids, jnp.int32, 1),
        whole(extras.kv_segment_ids, jnp.int32, 1),
    )
    mask = shared(extras.mask, jnp.bool_, 3)
    has_segments, has_mask = extras.q_segment_ids is not None, mask.size != 0

    def mask_bits(block, transposed):
        if block is None or not has_mask:
            return jnp.zeros((0,) * 4, jnp.uint32)
        return blocks.mask_bits(mask, block, transposed=transposed)

    bits = mask_bits(block, transposed=False)
    transposed_bits = mask_bits(transposed_block, transposed=True)

    def block_map(transposed):
        wanted = mapped and (has_segments or has_mask)
        if not wanted or (transposed and transposed_block is None):
            return jnp.zeros((0,) * 5, jnp.int32)
        of_keys = transposed or block is None
        own_bits = transposed_bits if of_keys else bits
        return blocks.block_map(
            (q.shape[1], k.shape[1]),
            transposed_block if of_keys else block,
            segment_ids if has_segments else None,
            own_bits if has_mask else None,
            transposed=transposed,
            of_keys=of_keys,
        )

    return Operands(
        whole(extras.query_seq_lengths, jnp.int32, 0),
        whole(extras.key_value_seq_lengths, jnp.int32, 0),
        *segment_ids,
        mask=bits,
        transposed_mask=transposed_bits,
        # One of q's dtype goes as it is, any other in float32.
        bias=shared(extras.bias, _bias_dtype(extras.bias, q.dtype), 3),
        sinks=bounded(shared(extras.sinks, jnp.float32, 1)),
        key_map=block_map(transposed=False),
        query_map=block_map(transposed=True),
    )


def _bias_dtype(bias, dtype):
    return dtype if bias is None or bias.dtype == dtype else jnp.float32


def bounded(sinks):
    """Sinks of which the kernels can take the multiple 1 / ln 2; infinities stay.

    Where a sink is all that a row sees it is its lse, which the backward pass takes in
    base 2: of the least number of a dtype there is no such multiple.
    """
    return jnp.where(jnp.isinf(sinks), sinks, jnp.clip(sinks, -_LARGEST, _LARGEST))


def fold(x, rank):
    """[*batch, ...] -> [B, ...], where ... are ``rank`` axes"""
    split = x.ndim - rank
    return x.reshape(math.prod(x.shape[:split]), *x.shape[split:])


def unfold(x, batch):
    """[B, ...] -> [*batch, ...]"""
    return x.reshape(*batch, *x.shape[1:])
