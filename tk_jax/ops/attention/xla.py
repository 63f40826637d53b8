"""Attention in XLA operations, with memory linear in the sequence length.

Blocks of queries visit the keys that they can see in chunks, with an online softmax
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe and
Staats, "Self-attention Does Not Need O(n^2) Memory", 2021).

The derivative is written once, in forward mode: every sum over keys in it is a plain
sum, linear in the tangents. Reverse mode is its transpose, which visits the same chunks
and computes their probabilities again from lse: the backward pass of FlashAttention
(Dao et al., 2022, section 3.1). Both are ordinary JAX code and can be differentiated
again.

In here q is [N, G, T, D] and k, v are [N, S, D], with N = B * K and G = H / K.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tk_jax.ops.attention.config import AttentionOptions

# A step computes BLOCK_Q x CHUNK_KV scores per head, or T / MAX_BLOCKS x CHUNK_KV.
BLOCK_Q = 512
CHUNK_KV = 512
# The blocks are unrolled: under a causal mask, each sees another number of chunks.
MAX_BLOCKS = 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attention(options: AttentionOptions, q, k, v):
    """Returns out [B, T, H, D] and lse [B, T, H]; differentiable to any order."""
    return forward(options, q, k, v)


@attention.defjvp
def _attention_jvp(options, primals, tangents):
    out, lse = attention(options, *primals)
    out = checkpoint_name(out, "tk_attention_out")
    lse = checkpoint_name(lse, "tk_attention_lse")
    # The checkpoint keeps q, k, v, out and lse for the backward pass, not their padded
    # and chunked copies.
    tangent = jax.checkpoint(functools.partial(_tangent, options))
    return (out, lse), tangent(*primals, out, lse, *tangents)


def forward(options: AttentionOptions, q, k, v):
    """Returns out [B, T, H, D] and lse [B, T, H]."""
    outs, lses = [], []
    for (q_block,), chunks, is_visible in _blocks(options, (q,), (k, v)):

        def step(carry, chunk, q_block=q_block, is_visible=is_visible):
            row_max, row_sum, acc = carry
            index, k_chunk, v_chunk = chunk
            s = _dot("ngtd,ncd->ngtc", q_block, k_chunk) * options.scale
            s = jnp.where(is_visible(index), s, -jnp.inf)
            new_max = jnp.maximum(row_max, s.max(-1))
            # Rows that have seen no key yet: exp(-inf - 0) is 0, not NaN.
            shift = jnp.where(new_max == -jnp.inf, 0, new_max)
            p = jnp.exp(s - shift[..., None])
            decay = jnp.exp(row_max - shift)
            row_sum = row_sum * decay + p.sum(-1)
            pv = _dot("ngtc,ncd->ngtd", p.astype(v.dtype), v_chunk)
            return (new_max, row_sum, acc * decay[..., None] + pv), None

        rows = q_block.shape[:-1]
        start = (
            _filled(q_block, rows, -jnp.inf),
            _filled(q_block, rows, 0),
            _filled(q_block, q_block.shape, 0),
        )
        (row_max, row_sum, acc), _ = lax.scan(step, start, chunks)
        has_key = row_sum != 0
        outs.append(acc / jnp.where(has_key, row_sum, 1)[..., None])
        lses.append(jnp.where(has_key, row_max + jnp.log(row_sum), -jnp.inf))
    out, lse = _unfold_queries(outs, q.shape), _unfold_queries(lses, q.shape[:-1])
    return out.astype(q.dtype), lse


def backward(options: AttentionOptions, q, k, v, out, lse, dout, dlse):
    """Returns dq, dk, dv. ``dlse`` of size 0 stands for zeros."""
    if dlse.size == 0:
        dlse = jnp.zeros_like(lse)
    transpose = jax.linear_transpose(
        functools.partial(_tangent, options, q, k, v, out, lse), q, k, v
    )
    return transpose((dout, dlse))


def _tangent(options, q, k, v, out, lse, tq, tk, tv):
    """The tangents of out and lse for the tangents of q, k and v."""
    t_outs, t_lses = [], []
    queries, keys = (q, tq, out, lse), (k, tk, v, tv)
    for block, chunks, is_visible in _blocks(options, queries, keys):
        q_block, tq_block, out_block, lse_block = block
        shift = jnp.where(lse_block == -jnp.inf, 0, lse_block)[..., None]

        @jax.checkpoint
        def terms(
            chunk,
            q_block=q_block,
            tq_block=tq_block,
            shift=shift,
            is_visible=is_visible,
        ):
            index, k_chunk, tk_chunk, v_chunk, tv_chunk = chunk
            s = _dot("ngtd,ncd->ngtc", q_block, k_chunk) * options.scale
            p = jnp.exp(jnp.where(is_visible(index), s, -jnp.inf) - shift)
            ts = _dot("ngtd,ncd->ngtc", tq_block, k_chunk)
            ts = (ts + _dot("ngtd,ncd->ngtc", q_block, tk_chunk)) * options.scale
            p_ts = p * ts
            acc = _dot("ngtc,ncd->ngtd", p_ts, v_chunk)
            acc = acc + _dot("ngtc,ncd->ngtd", p.astype(v.dtype), tv_chunk)
            return acc, p_ts.sum(-1)

        def step(carry, chunk, terms=terms):
            return jax.tree.map(jnp.add, carry, terms(chunk)), None

        start = (
            _filled(q_block, q_block.shape, 0),
            _filled(q_block, q_block.shape[:-1], 0),
        )
        (acc, t_lse), _ = lax.scan(step, start, chunks)
        t_outs.append(acc - t_lse[..., None] * out_block)
        t_lses.append(t_lse)
    t_out = _unfold_queries(t_outs, q.shape)
    return t_out.astype(out.dtype), _unfold_queries(t_lses, q.shape[:-1])


def _blocks(options, queries, keys):
    """Yields blocks of queries, each with the chunks of keys that it can see.

    ``queries`` are arrays [B, T, H, ...], ``keys`` are arrays [B, S, K, D]. The chunks
    are arrays with a leading axis to scan over, the first of them the chunk's index;
    ``is_visible(index)`` is the mask of its scores.
    """
    seqlen_q, seqlen_kv = queries[0].shape[1], keys[0].shape[1]
    offset = options.causal_offset(seqlen_q, seqlen_kv)
    num_chunks = _ceil_div(seqlen_kv, CHUNK_KV)
    chunk = _ceil_div(seqlen_kv, num_chunks)
    block = _ceil_div(seqlen_q, min(_ceil_div(seqlen_q, BLOCK_Q), MAX_BLOCKS))
    num_kv_heads = keys[0].shape[2]
    queries = [_fold_queries(x, num_kv_heads) for x in queries]
    keys = [_fold_keys(x, num_chunks, chunk) for x in keys]

    for first in range(0, seqlen_q, block):
        last = min(first + block, seqlen_q) - 1
        end = min(max(last + offset + 1, 0), seqlen_kv)
        visited = _ceil_div(end, chunk) if options.is_causal else num_chunks

        def is_visible(index, first=first, last=last):
            key = index * chunk + lax.iota(jnp.int32, chunk)
            row = first + lax.iota(jnp.int32, last - first + 1)
            visible = (key < seqlen_kv)[None, :]
            if options.is_causal:
                visible &= key[None, :] <= row[:, None] + offset
            return visible

        chunks = (jnp.arange(visited), *(x[:visited] for x in keys))
        yield [x[:, :, first : last + 1] for x in queries], chunks, is_visible


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=_sum_dtype(a.dtype))


def _sum_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _filled(like, shape, value):
    """An array to sum in that varies over the same manual mesh axes as ``like``."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    filled = jnp.full(shape, value, _sum_dtype(like.dtype))
    return lax.pcast(filled, axes, to="varying") if axes else filled


def _fold_queries(x, num_kv_heads):
    """[B, T, H, ...] -> [B * K, G, T, ...]"""
    batch, seqlen, num_heads, *rest = x.shape
    groups = num_heads // num_kv_heads
    x = x.reshape(batch, seqlen, num_kv_heads, groups, *rest)
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(batch * num_kv_heads, groups, seqlen, *rest)


def _unfold_queries(blocks, shape):
    """Blocks of [B * K, G, T, ...] -> [B, T, H, ...] of ``shape``"""
    batch, seqlen, num_heads, *rest = shape
    x = jnp.concatenate(blocks, axis=2)
    return jnp.moveaxis(x.reshape(batch, num_heads, seqlen, *rest), 1, 2)


def _fold_keys(x, num_chunks, chunk):
    """[B, S, K, D] -> [chunks, B * K, chunk, D]"""
    batch, seqlen, num_kv_heads, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, num_chunks * chunk - seqlen), (0, 0), (0, 0)))
    x = x.reshape(batch, num_chunks, chunk, num_kv_heads, head_dim)
    return x.transpose(1, 0, 3, 2, 4).reshape(
        num_chunks, batch * num_kv_heads, chunk, head_dim
    )


def _ceil_div(a, b):
    return -(-a // b)
