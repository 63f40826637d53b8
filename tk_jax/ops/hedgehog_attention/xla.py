"""Hedgehog attention in XLA operations: chunks, in memory linear in the length.

A step has before it the latest two windows of keys and values, in which all tokens
are that its queries may see through the softmax, wherever their blocks begin; what is
older is in the sums of linear attention. In here, of C tokens in B sequences, K heads
of keys and values with R heads of queries each::

    q      [B, C, K, R, D]      k, v   [B, C or 2 window + C, K, D or V]
    scores [B, K, R, C, 2 window + C]
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tk_jax.ops import _chunks
from tk_jax.ops.hedgehog_attention.config import (
    HedgehogConfig,
    HedgehogOptions,
    HedgehogState,
)
from tk_jax.ops.linear_attention.chunk import divide


class Inputs(NamedTuple):
    """The arrays of a call."""

    q: jax.Array  # [*batch, T, H, D]
    k: jax.Array  # [*batch, T, K, D]
    v: jax.Array  # [*batch, T, K, V]
    q_map: jax.Array  # [H, D, F]
    k_map: jax.Array  # [K, D, F]
    alpha: jax.Array  # [H] or []
    beta: jax.Array  # [H] or []
    state: HedgehogState
    segment_ids: jax.Array | None  # int32, broadcast to [*batch, T]


def hedgehog_attention(
    options: HedgehogOptions, config: HedgehogConfig, inputs: Inputs
):
    """Returns out [*batch, T, H, V] and the final state; differentiable to any order.

    Between the passes nothing is kept but the arguments: the backward pass computes the
    states at the starts of chunks again, and keeps them while it runs.
    """
    return _chunks.recomputed(functools.partial(_folded, options, config))(inputs)


class _Carry(NamedTuple):
    sums: jax.Array  # [B, K, 2 F, V]
    normalizer: jax.Array  # [B, K, 2 F]
    keys: jax.Array  # [B, 2 window, K, D]
    values: jax.Array  # [B, 2 window, K, V]
    positions: jax.Array  # int32 [B, 2 window]: in their segments, negative for none


def _folded(options, config, inputs):
    *batch, seqlen, num_heads, _ = inputs.q.shape
    num_kv_heads = inputs.k.shape[-2]
    heads = (num_kv_heads, num_heads // num_kv_heads)
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    dtype = _chunks.sum_dtype(inputs.q.dtype)
    state = HedgehogState(*(fold(x) for x in inputs.state))
    q, k, v = (fold(x) for x in inputs[:3])

    starts = None
    if inputs.segment_ids is not None:
        starts = fold(_chunks.segment_starts(inputs.segment_ids, (*batch, seqlen)))
    arrays = {
        "q": q.reshape(*q.shape[:2], *heads, q.shape[-1]),
        "k": k,
        "v": v,
        "positions": token_positions(state.length, starts, q.shape[:2]),
    }
    latest = jnp.arange(-2 * options.window, 0, dtype=jnp.int32)
    carry = _Carry(*state[:4], state.length[:, None] + latest)
    step = _Step(
        options,
        _chunks.precision(inputs.q.dtype),
        q_map=inputs.q_map.reshape(*heads, *inputs.q_map.shape[1:]).astype(dtype),
        k_map=inputs.k_map.astype(dtype),
        mixing=[
            jnp.broadcast_to(x.astype(dtype), num_heads).reshape(*heads, 1, 1)
            for x in (inputs.alpha, inputs.beta)
        ],
    )
    carry, out = _chunks.scan_chunks(step, carry, arrays, config.chunk)
    final = _final_state(options, carry)
    out = out.reshape(*batch, seqlen, num_heads, v.shape[-1])
    return out, HedgehogState(*(_chunks.unfold(x, batch) for x in final))


def token_positions(length, starts, shape):
    """int32 [B, T]: how many tokens of its segment precede each."""
    token = jnp.arange(shape[1], dtype=jnp.int32)
    continued = length[:, None] + token
    if starts is None:
        return continued
    first = lax.cummax(jnp.where(starts, token, -1), axis=1)
    return jnp.where(first < 0, continued, token - first)


class _Step:
    def __init__(self, options, precision, *, q_map, k_map, mixing):
        self.options, self.precision = options, precision
        self.q_map, self.k_map, self.mixing = q_map, k_map, mixing

    def __call__(self, carry, piece):
        dtype = carry.sums.dtype
        keys, values, positions = (
            jnp.concatenate(pair, axis=1)
            for pair in (
                (carry.keys, piece["k"]),
                (carry.values, piece["v"]),
                (carry.positions, piece["positions"]),
            )
        )
        q, k, v = (x.astype(dtype) for x in (piece["q"], keys, values))
        phi_k = self.features("bjkd,kdf->bjkf", k, self.k_map)
        out = self.attend(carry, q, k, v, phi_k, piece["positions"])

        # As many of the oldest tokens as there are in the chunk leave the windows.
        count = q.shape[1]
        leaving = positions[:, :count]
        segment = jnp.cumsum((leaving == 0).astype(jnp.int32), axis=1)
        last = segment[:, -1:]
        added = ((segment == last) & (leaving >= 0)).astype(dtype)
        kept = (last[:, 0] == 0).astype(dtype)[:, None, None]
        phi_k = phi_k[:, :count] * added[..., None, None]
        sums = self.product("bjkf,bjkv->bkfv", phi_k, v[:, :count])
        carry = _Carry(
            kept[..., None] * carry.sums + sums,
            kept * carry.normalizer + phi_k.sum(1),
            keys[:, count:],
            values[:, count:],
            positions[:, count:],
        )
        return carry, out.astype(piece["v"].dtype)

    def attend(self, carry, q, k, v, phi_k, positions):
        window = self.options.window
        alpha, beta = self.mixing
        order = jnp.arange(q.shape[1], dtype=jnp.int32)
        # How far back each key is: those before the segment are further than the query
        # is into it.
        distance = 2 * window + order[:, None] - jnp.arange(k.shape[1], dtype=jnp.int32)
        at = positions[..., None]
        seen = (distance >= 0) & (distance <= at)
        near = seen & (at // window - (at - distance) // window <= 1)
        near, far = (x[:, None, None] for x in (near, seen & ~near))

        s = self.product("bikrd,bjkd->bkrij", q, k) * self.options.scale
        s = jnp.where(near, s, -jnp.inf)
        p = beta * jnp.exp(s - s.max(-1, keepdims=True))
        phi_q = self.features("bikrd,krdf->bikrf", q, self.q_map)
        phi_q = phi_q * alpha[..., 0]
        linear = self.product("bikrf,bjkf->bkrij", phi_q, phi_k)
        p = p + jnp.where(far, linear, 0)

        # What is older than the keys here is of the same segment, or not seen at all.
        older = positions > 2 * window + order
        phi_q = jnp.where(older[..., None, None, None], phi_q, 0)
        numerators = self.product("bkrij,bjkv->bikrv", p, v)
        numerators += self.product("bikrf,bkfv->bikrv", phi_q, carry.sums)
        denominators = jnp.moveaxis(p.sum(-1), -1, 1)
        denominators += self.product("bikrf,bkf->bikr", phi_q, carry.normalizer)
        return divide(numerators, denominators)

    def features(self, equation, x, weights):
        y = self.product(equation, x, weights)
        return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)

    def product(self, equation, *operands):
        return jnp.einsum(equation, *operands, precision=self.precision)


def _final_state(options, carry: _Carry) -> HedgehogState:
    """With zeros for what belongs to another segment than the last token."""
    length = carry.positions[:, -1] + 1
    is_old = (length > 2 * options.window)[:, None, None]
    steps_back = jnp.arange(2 * options.window - 1, -1, -1, dtype=jnp.int32)
    own = (steps_back < length[:, None])[..., None, None]
    return HedgehogState(
        jnp.where(is_old[..., None], carry.sums, 0),
        jnp.where(is_old, carry.normalizer, 0),
        jnp.where(own, carry.keys, 0),
        jnp.where(own, carry.values, 0),
        length,
    )
