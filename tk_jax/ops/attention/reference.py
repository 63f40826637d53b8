"""The definition of attention, as short as it can be."""

from __future__ import annotations

import jax.numpy as jnp


def attention_reference(
    q, k, v, *, scale=None, is_causal=False, causal_align="top_left", dtype=jnp.float32
):
    """Returns out [..., T, H, D] and lse [..., T, H], computed and left in ``dtype``.

    ``dtype`` is float32 or, where x64 is enabled, float64. Memory is quadratic.
    """
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    seqlen_q, num_heads, head_dim = q.shape[-3:]
    seqlen_kv, num_kv_heads = k.shape[-3:-1]
    k, v = (jnp.repeat(x, num_heads // num_kv_heads, axis=-2) for x in (k, v))
    s = jnp.einsum("...thd,...shd->...hts", q, k, precision="highest")
    s = s * (head_dim**-0.5 if scale is None else scale)
    if is_causal:
        offset = seqlen_kv - seqlen_q if causal_align == "bottom_right" else 0
        s = jnp.where(jnp.tri(seqlen_q, seqlen_kv, offset, dtype=bool), s, -jnp.inf)
    row_max = jnp.max(s, axis=-1, keepdims=True)
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    p = jnp.exp(s - row_max)
    row_sum = p.sum(axis=-1, keepdims=True)
    # A row without a key: out is 0, lse is -inf.
    out = jnp.einsum(
        "...hts,...shd->...thd",
        p / jnp.where(row_sum == 0, 1, row_sum),
        v,
        precision="highest",
    )
    lse = (row_max + jnp.log(row_sum))[..., 0]
    return out, jnp.swapaxes(lse, -1, -2)
