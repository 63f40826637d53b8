"""Attention in XLA operations, with memory linear in the sequence length.

Blocks of queries visit the keys that they can see in chunks, with an online softmax
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe and
Staats, "Self-attention Does Not Need O(n^2) Memory", 2021). Chunks that the causal mask
or the window hides from a whole block are left out.

The derivative is written once, in forward mode: every sum over keys in it is a plain
sum, linear in the tangents. Reverse mode is its transpose, which visits the same chunks
and computes their probabilities again from lse: the backward pass of FlashAttention
(Dao et al., 2022, section 3.1). Both are ordinary JAX code and can be differentiated
again.

In here q is [N, G, T, D], k is [N, S, D] and v is [N, S, Dv], with N = B * K, G = H / K
and B the product of all batch dimensions. A mask or a bias keeps the size 1 of an axis
that it is the same along; it is broadcast to a block's scores of one chunk at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tk_jax.ops._chunks import sum_dtype
from tk_jax.ops.attention.config import (
    NO_SOFT_CAP,
    AttentionOptions,
    Extras,
    symbolic_size,
)

# A step computes BLOCK_Q x CHUNK_KV scores per head, or T / MAX_BLOCKS x CHUNK_KV.
BLOCK_Q = 512
CHUNK_KV = 512
# The blocks are unrolled: under a causal mask, each sees another number of chunks.
MAX_BLOCKS = 8

NO_EXTRAS = Extras()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attention(options: AttentionOptions, q, k, v, extras: Extras = NO_EXTRAS):
    """As ``forward``, differentiable to any order."""
    return forward(options, q, k, v, extras)


@attention.defjvp
def _attention_jvp(options, primals, tangents):
    q, k, v, extras = primals
    tq, tk, tv, t_extras = tangents
    results = out, lse, lse_rest = named(attention(options, q, k, v, extras))
    # The checkpoint keeps q, k, v, out and lse for the backward pass, not their padded
    # and chunked copies.
    tangent = jax.checkpoint(functools.partial(_tangent, options))
    linear = (tq, tk, tv, t_extras.bias, t_extras.sinks)
    tangents = tangent(q, k, v, extras, out, lse, *linear)
    if lse_rest is None:
        return results, (*tangents, None)
    # They are linear in the weights, which are made from lse alone.
    tangents = [corrected(x, lse_rest) for x in tangents]
    return results, (*tangents, jnp.zeros_like(lse_rest))


def named(results):
    """The results of ``forward``, by the names that ``checkpoint_policies`` save."""
    names = ("tk_attention_out", "tk_attention_lse", "tk_attention_lse")
    return tuple(
        None if x is None else checkpoint_name(x, name)
        for x, name in zip(results, names, strict=True)
    )


def corrected(x, lse_rest):
    """[..., T, H] or [..., T, H, Dv], linear in weights of exp(s - lse), for the exact.

    Unless lse is far from zero, where it has no digits left for how many keys it is the
    sum over, 16-bit numbers remain the same in every bit.
    """
    ones = (1,) * (x.ndim - lse_rest.ndim)
    share = jnp.exp(-lse_rest).reshape(*lse_rest.shape, *ones)
    return (x.astype(share.dtype) * share).astype(x.dtype)


def forward(options: AttentionOptions, q, k, v, extras: Extras = NO_EXTRAS):
    """Returns out [..., T, H, Dv], lse [..., T, H] and lse_rest [..., T, H].

    lse_rest is what rounding took off lse. It matters beside a bias, which may be -1e9
    for all keys of a query, and is None without one.
    """
    grid = _Grid(options, q.shape, k.shape)
    q_rows = grid.fold_queries(q)
    keys = (grid.fold_keys(k), grid.fold_keys(v))
    chunked = grid.chunk_extras(extras)
    outs, lses, rests = [], [], []
    for block in grid.blocks(extras):
        q_block = block.take_rows(q_rows)

        def step(carry, chunk, block=block, q_block=q_block):
            row_max, row_sum, acc = carry
            index, (k_chunk, v_chunk), extra = chunk
            s = _scores(options, q_block, k_chunk)
            s = block.mask(index, extra, _soft_cap(options, s)[0])
            new_max = jnp.maximum(row_max, s.max(-1))
            # Rows that have seen no key yet: exp(-inf - 0) is 0, not NaN.
            shift = jnp.where(new_max == -jnp.inf, 0, new_max)
            p = jnp.exp(s - shift[..., None])
            decay = jnp.exp(row_max - shift)
            row_sum = row_sum * decay + p.sum(-1)
            pv = _dot("ngtc,ncd->ngtd", p.astype(v.dtype), v_chunk)
            return (new_max, row_sum, acc * decay[..., None] + pv), None

        rows = q_block.shape[:-1]
        row_max, row_sum = _filled(q_block, rows, -jnp.inf), _filled(q_block, rows, 0)
        if extras.sinks is not None:
            # The sink is a key with this score and the value 0, seen by all.
            row_max = jnp.maximum(
                row_max, grid.spread_sinks(extras.sinks, row_max.dtype)
            )
            row_sum = jnp.where(row_max == -jnp.inf, 0, row_sum + 1)
        start = (row_max, row_sum, _filled(q_block, (*rows, v.shape[-1]), 0))
        visited = block.take_chunks(keys, chunked)
        (row_max, row_sum, acc), _ = lax.scan(step, start, visited)
        has_key = row_sum != 0
        outs.append(acc / jnp.where(has_key, row_sum, 1)[..., None])
        log_sum = jnp.log(jnp.where(has_key, row_sum, 1))
        lses.append(jnp.where(has_key, row_max + log_sum, -jnp.inf))
        rests.append(jnp.where(has_key, _rounding_of(lses[-1], row_max, log_sum), 0))
    out = grid.unfold_queries(outs).astype(q.dtype)
    lse_rest = None if extras.bias is None else grid.unfold_queries(rests)
    return out, grid.unfold_queries(lses), lse_rest


def backward(
    options: AttentionOptions,
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    extras: Extras = NO_EXTRAS,
):
    """Returns dq, dk, dv, dbias, dsinks; None for a bias or sinks that are None.

    ``dlse`` of size 0 stands for zeros.
    """
    if dlse.size == 0:
        dlse = jnp.zeros_like(lse)
    transpose = jax.linear_transpose(
        functools.partial(_tangent, options, q, k, v, extras, out, lse),
        *(q, k, v, extras.bias, extras.sinks),
    )
    return transpose((dout, dlse))


def _tangent(options, q, k, v, extras, out, lse, tq, tk, tv, t_bias, t_sinks):
    """The tangents of out and lse for those of q, k, v, bias and sinks."""
    grid = _Grid(options, q.shape, k.shape)
    queries = [grid.fold_queries(x) for x in (q, tq, out, lse)]
    keys = [grid.fold_keys(x) for x in (k, tk, v, tv)]
    chunked = [grid.chunk_extras(x) for x in (extras, Extras(bias=t_bias))]
    t_outs, t_lses = [], []
    for block in grid.blocks(extras):
        q_block, tq_block, out_block, lse_block = map(block.take_rows, queries)
        shift = jnp.where(lse_block == -jnp.inf, 0, lse_block)[..., None]

        @jax.checkpoint
        def terms(chunk, block=block, q_block=q_block, tq_block=tq_block, shift=shift):
            index, (k_chunk, tk_chunk, v_chunk, tv_chunk), extra, t_extra = chunk
            s, slope = _soft_cap(options, _scores(options, q_block, k_chunk))
            p = jnp.exp(block.mask(index, extra, s) - shift)
            ts = _dot("ngtd,ncd->ngtc", tq_block, k_chunk)
            ts = (ts + _dot("ngtd,ncd->ngtc", q_block, tk_chunk)) * options.scale
            if slope is not None:
                ts = ts * slope
            if t_extra.bias is not None:
                ts = ts + grid.spread(t_extra.bias.astype(ts.dtype))
            p_ts = p * ts
            acc = _dot("ngtc,ncd->ngtd", p_ts, v_chunk.astype(p_ts.dtype))
            acc = acc + _dot("ngtc,ncd->ngtd", p.astype(v.dtype), tv_chunk)
            return acc, p_ts.sum(-1)

        def step(carry, chunk, terms=terms):
            return jax.tree.map(jnp.add, carry, terms(chunk)), None

        start = (
            _filled(q_block, out_block.shape, 0),
            _filled(q_block, lse_block.shape, 0),
        )
        (acc, t_lse), _ = lax.scan(step, start, block.take_chunks(keys, *chunked))
        if t_sinks is not None:
            sinks = grid.spread_sinks(extras.sinks, t_lse.dtype)
            p_sink = jnp.exp(sinks - shift[..., 0])
            t_lse = t_lse + p_sink * grid.spread_sinks(t_sinks, t_lse.dtype)
        t_outs.append(acc - t_lse[..., None] * out_block.astype(t_lse.dtype))
        t_lses.append(t_lse)
    t_out = grid.unfold_queries(t_outs).astype(out.dtype)
    return t_out, grid.unfold_queries(t_lses)


def _rounding_of(total, a, b):
    """What rounding took off total = a + b: fast two-sum, Dekker 1971."""
    a_is_larger = abs(a) > abs(b)
    larger, smaller = jnp.where(a_is_larger, a, b), jnp.where(a_is_larger, b, a)
    return larger - total + smaller


def _scores(options, q, k):
    """The scaled product of a block's queries and a chunk's keys."""
    # Rounded once: in a multiply-add with minus a rounded maximum, scores of 2**30
    # would exceed it by up to 32.
    return lax.optimization_barrier(_dot("ngtd,ncd->ngtc", q, k) * options.scale)


def _soft_cap(options, s):
    """The scores capped, and the derivative of that; None without a cap."""
    cap = options.soft_cap
    if cap == NO_SOFT_CAP:
        return s, None
    tanh = jnp.tanh(s / cap)
    return cap * tanh, 1 - tanh * tanh


class _Grid:
    """Blocks of queries, chunks of keys, and the layouts that they are taken from."""

    def __init__(self, options: AttentionOptions, q_shape, k_shape):
        *self.batch, self.seqlen_q, self.num_heads, _ = q_shape
        self.seqlen_kv, self.num_kv_heads = k_shape[-3:-1]
        self.groups = self.num_heads // self.num_kv_heads
        self.options = options
        self.num_chunks = _ceil_div(self.seqlen_kv, CHUNK_KV)
        self.chunk = CHUNK_KV
        if not symbolic_size(self.seqlen_kv):
            self.chunk = _ceil_div(self.seqlen_kv, self.num_chunks)
        self.folded = math.prod(self.batch) * self.num_kv_heads  # N

    def blocks(self, extras: Extras):
        if symbolic_size(self.seqlen_q):  # Blocks are unrolled: a number of them.
            yield _Block(self, extras, 0, self.seqlen_q)
            return
        num_blocks = min(_ceil_div(self.seqlen_q, BLOCK_Q), MAX_BLOCKS)
        size = _ceil_div(self.seqlen_q, num_blocks)
        for first in range(0, self.seqlen_q, size):
            yield _Block(self, extras, first, min(first + size, self.seqlen_q))

    def fold_queries(self, x):
        """[*batch, T, H, ...] -> [N, G, T, ...]"""
        rest = x.shape[len(self.batch) + 2 :]
        x = jnp.moveaxis(x, len(self.batch), len(self.batch) + 1)
        return x.reshape(self.folded, self.groups, self.seqlen_q, *rest)

    def unfold_queries(self, blocks):
        """Blocks of [N, G, T, ...] -> [*batch, T, H, ...]"""
        x = jnp.concatenate(blocks, axis=2)
        rest = x.shape[3:]
        x = x.reshape(*self.batch, self.num_heads, self.seqlen_q, *rest)
        return jnp.moveaxis(x, len(self.batch), len(self.batch) + 1)

    def fold_keys(self, x):
        """[*batch, S, K, D] -> [chunks, N, chunk, D]"""
        x = jnp.moveaxis(x, -2, -3)
        x = x.reshape(self.folded, *x.shape[-2:])
        return jnp.moveaxis(self._chunk_axis(x, 1), 1, 0)

    def chunk_extras(self, extras: Extras) -> Extras:
        """Those that differ by key, as [chunks, ...] with chunks of the last axis."""

        def chunk(x):
            if x is None:
                return None
            if x.shape[-1] != self.seqlen_kv:
                return jnp.broadcast_to(x, (self.num_chunks, *x.shape))
            return jnp.moveaxis(self._chunk_axis(x, x.ndim - 1), -2, 0)

        names = ("kv_segment_ids", "mask", "bias")
        return Extras(**{name: chunk(getattr(extras, name)) for name in names})

    def _chunk_axis(self, x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, self.num_chunks * self.chunk - self.seqlen_kv)
        x = jnp.pad(x, padding)
        sizes = (self.num_chunks, self.chunk)
        return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])

    def spread(self, x):
        """[*b, H or 1, t, c] -> [N, G, t, c]; what has only [t, c] stays as it is."""
        if x.ndim < 3:
            return x
        sizes = x.shape[-2:]
        x = jnp.broadcast_to(x, (*self.batch, self.num_heads, *sizes))
        return x.reshape(self.folded, self.groups, *sizes)

    def spread_sinks(self, sinks, dtype):
        """[*b, H] -> [N, G, 1]"""
        return self.spread(sinks[..., None, None].astype(dtype))[..., 0]


@dataclasses.dataclass
class _Block:
    """Queries ``first`` to ``end`` - 1, and the chunks of keys that they can see."""

    grid: _Grid
    extras: Extras
    first: int
    end: int

    def take_rows(self, x):
        return x[:, :, self.first : self.end]

    def take_chunks(self, keys, *extras: Extras):
        """What to scan over: the chunks' indices, keys, and rows of extras."""
        begin, end = self._chunk_range()
        keys, extras = jax.tree.map(lambda x: x[begin:end], (keys, extras))
        extras = [
            x._replace(mask=self._rows_of(x.mask), bias=self._rows_of(x.bias))
            for x in extras
        ]
        return jnp.arange(begin, end), keys, *extras

    def mask(self, index, extra: Extras, s):
        """The scores of a chunk: bias added, and -inf for keys out of sight."""
        if extra.bias is not None:
            s = s + self.grid.spread(extra.bias.astype(s.dtype))
        return jnp.where(self.grid.spread(self._is_visible(index, extra)), s, -jnp.inf)

    def _chunk_range(self):
        grid, options = self.grid, self.grid.options
        if symbolic_size(grid.seqlen_q, grid.seqlen_kv):
            return 0, grid.num_chunks
        begin, end = 0, grid.seqlen_kv
        offset = self._offset()
        if isinstance(offset, int):
            if options.left is not None:
                begin = max(self.first + offset - options.left, 0)
            if options.right is not None:
                end = min(self.end + offset + options.right, end)
        if begin >= end:
            return 0, 0
        return begin // grid.chunk, _ceil_div(end, grid.chunk)

    def _offset(self):
        """The offset of positions: a number, or where lengths decide, [*b, 1, 1, 1]."""
        grid = self.grid
        lengths = (grid.seqlen_q, grid.seqlen_kv)
        given = (self.extras.query_seq_lengths, self.extras.key_value_seq_lengths)
        if grid.options.bottom_right:
            lengths = [
                length if array is None else _per_batch(array)
                for length, array in zip(lengths, given, strict=True)
            ]
        return grid.options.offset(*lengths)

    def _is_visible(self, index, extra: Extras):
        """[*b, H or 1, t, chunk], or fewer axes where it is the same for all."""
        grid, options, extras = self.grid, self.grid.options, self.extras
        # All of one rank: jax may be set to refuse to add axes by itself.
        by_batch = extras._replace(bias=None, sinks=None)
        same_for_all = all(x is None for x in by_batch)
        rank = 2 if same_for_all else len(grid.batch) + 3
        ones = (1,) * (rank - 2)
        key = lax.broadcasted_iota(jnp.int32, (*ones, 1, grid.chunk), rank - 1)
        key = index * grid.chunk + key
        row = (*ones, self.end - self.first, 1)
        row = lax.broadcasted_iota(jnp.int32, row, rank - 2) + self.first
        visible = key < grid.seqlen_kv
        if options.left is not None:
            visible &= key >= row + self._offset() - options.left
        if options.right is not None:
            visible &= key <= row + self._offset() + options.right
        if extras.query_seq_lengths is not None:
            visible &= row < _per_batch(extras.query_seq_lengths)
        if extras.key_value_seq_lengths is not None:
            visible &= key < _per_batch(extras.key_value_seq_lengths)
        if extras.q_segment_ids is not None:
            ids = extras.q_segment_ids[..., None, self.first : self.end, None]
            visible &= ids == extra.kv_segment_ids[..., None, None, :]
        if extra.mask is not None:
            visible &= extra.mask
        return visible

    def _rows_of(self, x):
        """[..., T or 1, c] -> the block's rows of it"""
        if x is None or x.shape[-2] == 1:
            return x
        return x[..., self.first : self.end, :]


def _per_batch(x):
    """[*b] -> [*b, 1, 1, 1]"""
    return x[..., None, None, None]


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=sum_dtype(a.dtype))


def _filled(like, shape, value):
    """An array to sum in that varies over the same manual mesh axes as ``like``."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    filled = jnp.full(shape, value, sum_dtype(like.dtype))
    return lax.pcast(filled, axes, to="varying") if axes else filled


def _ceil_div(a, b):
    return -(-a // b)
