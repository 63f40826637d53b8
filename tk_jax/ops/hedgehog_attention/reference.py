"""The definition of Hedgehog attention, all pairs of tokens at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def hedgehog_attention_reference(
    q,
    k,
    v,
    q_map,
    k_map,
    *,
    alpha,
    beta,
    window=64,
    scale=None,
    segment_ids=None,
    dtype=jnp.float32,
):
    """Returns out [..., T, H, V] and (sums, normalizer), computed in ``dtype``.

    ``dtype`` is float32 or, where x64 is enabled, float64. Memory is quadratic.
    """
    q, k, v, q_map, k_map = (x.astype(dtype) for x in (q, k, v, q_map, k_map))
    seqlen, num_heads, head_dim = q.shape[-3:]
    repeats = num_heads // k.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale
    alpha, beta = (
        jnp.broadcast_to(x, num_heads).astype(dtype)[:, None, None]
        for x in (alpha, beta)
    )
    if segment_ids is None:
        segment_ids = jnp.zeros(seqlen, jnp.int32)
    segment_ids = jnp.broadcast_to(segment_ids, q.shape[:-2])

    def features(x, weights):
        y = jnp.einsum("...thd,hdf->...thf", x, weights, precision="highest")
        return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], -1)

    def pairs(a, b):
        b = jnp.repeat(b, repeats, axis=-2)
        return jnp.einsum("...ihd,...jhd->...hij", a, b, precision="highest")

    # How many tokens of its segment precede each, and the block that it is in.
    token = jnp.arange(seqlen)
    starts = segment_ids[..., 1:] != segment_ids[..., :-1]
    starts = jnp.concatenate([jnp.ones_like(segment_ids[..., :1], bool), starts], -1)
    first = jnp.where(starts, token, 0)
    first = jax.lax.cummax(first, axis=first.ndim - 1)
    block = (token - first) // window
    seen = first[..., :, None] == first[..., None, :]
    seen &= token[:, None] >= token
    near = seen & (block[..., :, None] - block[..., None, :] <= 1)
    near, seen = near[..., None, :, :], seen[..., None, :, :]

    phi_k = features(k, k_map)
    s = jnp.where(near, scale * pairs(q, k), -jnp.inf)
    p = beta * jnp.exp(s - s.max(-1, keepdims=True))
    p = p + jnp.where(seen & ~near, alpha * pairs(features(q, q_map), phi_k), 0)
    p = p / p.sum(-1, keepdims=True)
    v_all = jnp.repeat(v, repeats, axis=-2)
    out = jnp.einsum("...hij,...jhv->...ihv", p, v_all, precision="highest")

    old = (first == first[..., -1:]) & (token < seqlen - 2 * window)
    phi_k = phi_k * old[..., None, None]
    sums = jnp.einsum("...tkf,...tkv->...kfv", phi_k, v, precision="highest")
    return out, (sums, phi_k.sum(-3))
