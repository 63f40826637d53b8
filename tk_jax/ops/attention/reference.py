"""The definition of attention, as short as it can be."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def attention_reference(
    q,
    k,
    v,
    *,
    scale=None,
    is_causal=False,
    causal_align="top_left",
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    mask=None,
    bias=None,
    logits_soft_cap=None,
    sinks=None,
    dtype=jnp.float32,
):
    """Returns out [..., T, H, Dv] and lse [..., T, H], computed and left in ``dtype``.

    ``dtype`` is float32 or, where x64 is enabled, float64. Memory is quadratic.
    """
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    seqlen_q, num_heads, head_dim = q.shape[-3:]
    seqlen_kv, num_kv_heads = k.shape[-3:-1]
    k, v = (jnp.repeat(x, num_heads // num_kv_heads, axis=-2) for x in (k, v))
    s = jnp.einsum("...thd,...shd->...hts", q, k, precision="highest")
    s = s * (head_dim**-0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    if bias is not None:
        s = s + bias.astype(dtype)

    # Arrays of one number for each batch element become [..., H=1, T=1, S=1].
    q_length = jnp.asarray(seqlen_q if query_seq_lengths is None else query_seq_lengths)
    kv_length = jnp.asarray(
        seqlen_kv if key_value_seq_lengths is None else key_value_seq_lengths
    )
    q_length, kv_length = (x[..., None, None, None] for x in (q_length, kv_length))
    row, key = jnp.arange(seqlen_q)[:, None], jnp.arange(seqlen_kv)
    position = row
    if causal_align == "bottom_right":
        position = (
            row + jnp.minimum(kv_length, seqlen_kv) - jnp.minimum(q_length, seqlen_q)
        )
    visible = (row < q_length) & (key < kv_length)
    if is_causal:
        visible &= key <= position
    if local_window_size is not None:
        left, right = jnp.broadcast_to(jnp.asarray(local_window_size), 2)
        visible &= (position - left <= key) & (key <= position + right)
    if q_segment_ids is not None:
        kv_segment_ids = q_segment_ids if kv_segment_ids is None else kv_segment_ids
        same = q_segment_ids[..., :, None] == kv_segment_ids[..., None, :]
        visible &= same[..., None, :, :]
    if mask is not None:
        visible &= mask
    s = jnp.where(visible, s, -jnp.inf)

    if sinks is None:
        sinks = jnp.full(num_heads, -jnp.inf)
    sinks = sinks.astype(dtype)[..., None, None]
    row_max = lax.stop_gradient(jnp.maximum(s.max(axis=-1, keepdims=True), sinks))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    p = jnp.exp(s - row_max)
    row_sum = p.sum(axis=-1, keepdims=True) + jnp.exp(sinks - row_max)
    # A row without a key and without a sink: out is 0, lse is -inf.
    out = jnp.einsum(
        "...hts,...shd->...thd",
        p / jnp.where(row_sum == 0, 1, row_sum),
        v,
        precision="highest",
    )
    lse = (row_max + jnp.log(row_sum))[..., 0]
    return out, jnp.swapaxes(lse, -1, -2)
