"""Linear attention in XLA operations: chunks, in memory linear in the length."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from tk_jax.ops import _chunks
from tk_jax.ops.linear_attention import chunk as chunks
from tk_jax.ops.linear_attention.config import (
    LinearAttentionConfig,
    LinearAttentionOptions,
)


def linear_attention(
    options: LinearAttentionOptions,
    q,
    k,
    v,
    log_decay,
    state,
    segment_ids,
    *,
    features=chunks.DOT,
    config: LinearAttentionConfig = LinearAttentionConfig(),  # noqa: B008 (frozen)
):
    """Returns out [*batch, T, H, V] and the final state; differentiable to any order.

    Between the passes nothing is kept but the arguments: the backward pass computes the
    states at the starts of chunks again, and keeps them while it runs. Products are of
    float32 numbers (float64 for float64 inputs), in which gates and states are.

    Args:
      q: [*batch, T, G, K], as k.
      v: [*batch, T, H, V], with G dividing H.
      log_decay: [*batch, T, H] or [H], or None for no decay.
      state: [*batch, H, F, V], or the pair of that and [*batch, H, F].
      segment_ids: int32, broadcast to [*batch, T], or None.
      features: What ``chunk.Dot`` is an example of.
    """
    run = functools.partial(_folded, options, features, config)
    return _chunks.recomputed(run)(q, k, v, log_decay, state, segment_ids)


def _folded(options, features, config, q, k, v, log_decay, state, segment_ids):
    *batch, seqlen, groups, _ = k.shape
    num_heads = v.shape[-2]
    heads = (groups, num_heads // groups)
    dtype = _chunks.sum_dtype(q.dtype)
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))

    def split_heads(x, axis):
        """[B, ..., H, ...] -> [B, ..., G, R, ...]"""
        return x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])

    arrays = {"q": fold(q), "k": fold(k)}
    arrays["v"] = split_heads(fold(v), 2)
    per_head = None
    if log_decay is not None:
        log_decay = log_decay.astype(dtype)
        if log_decay.ndim == 1:
            per_head = split_heads(log_decay[None, None], 2)
        else:
            arrays["log_decay"] = split_heads(fold(log_decay), 2)
    if segment_ids is not None:
        arrays["starts"] = fold(_chunks.segment_starts(segment_ids, (*batch, seqlen)))
    carry = chunks.State(
        *(split_heads(fold(x), 1) for x in (state if options.normalize else (state,)))
    )

    def step(carry, piece):
        q, k, v = (piece[name].astype(dtype) for name in ("q", "k", "v"))
        log_decay = piece.get("log_decay")
        if per_head is not None:
            log_decay = jnp.broadcast_to(per_head, (1, k.shape[1], *heads))
        carry, out, total = chunks.attend(
            features,
            carry,
            q * options.scale,
            k,
            v,
            chunks.decays(log_decay, piece.get("starts"), k.shape[1]),
            _chunks.precision(piece["q"].dtype),
        )
        if total is not None:
            out = chunks.divide(out, total)
        return carry, out.astype(piece["v"].dtype)

    carry, out = _chunks.scan_chunks(step, carry, arrays, config.chunk)
    out = _chunks.unfold(out, batch).reshape(v.shape)
    final = tuple(
        _chunks.unfold(x, batch).reshape(*batch, num_heads, *x.shape[3:])
        for x in carry
        if x is not None
    )
    return out, final if options.normalize else final[0]
