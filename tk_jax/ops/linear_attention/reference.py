"""The definition of linear attention, one token after another."""

from __future__ import annotations

import jax.numpy as jnp

from tk_jax.ops import _chunks


def linear_attention_reference(
    q,
    k,
    v,
    *,
    log_decay=None,
    scale=None,
    normalize=False,
    initial_state=None,
    segment_ids=None,
    features=lambda q, k: (q, k),
    dtype=jnp.float32,
):
    """Returns out [..., T, H, V] and the final state, computed and left in ``dtype``.

    ``dtype`` is float32 or, where x64 is enabled, float64. The state is the array
    [..., H, K, V], or with ``normalize`` the pair of it and [..., H, K]. ``features``
    makes other queries and keys of the scaled ones.
    """
    num_heads, seqlen = v.shape[-2], v.shape[-3]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(scale * q.astype(dtype), k.astype(dtype))
    q, k = (jnp.repeat(x, num_heads // x.shape[-2], axis=-2) for x in (q, k))
    v = v.astype(dtype)
    log_decay = jnp.zeros(num_heads) if log_decay is None else log_decay
    log_decay = jnp.broadcast_to(log_decay.astype(dtype), v.shape[:-1])
    if segment_ids is None:
        segment_ids = jnp.zeros(seqlen, jnp.int32)
    segment_ids = jnp.broadcast_to(segment_ids, v.shape[:-2])
    if initial_state is None:
        sums = jnp.zeros((*k.shape[:-3], *k.shape[-2:], v.shape[-1]), dtype)
        initial_state = (sums, sums[..., 0]) if normalize else sums
    states = initial_state if normalize else (initial_state, None)
    state, normalizer = (None if x is None else x.astype(dtype) for x in states)

    def step(carry, token):
        state, normalizer, previous = carry
        q, k, v, log_decay, segment = token
        kept = (segment == previous)[..., None] * jnp.exp(log_decay)  # [..., H]
        state = kept[..., None, None] * state + k[..., None] * v[..., None, :]
        out = jnp.einsum("...k,...kv->...v", q, state, precision="highest")
        if normalizer is not None:
            normalizer = kept[..., None] * normalizer + k
            total = jnp.sum(q * normalizer, axis=-1, keepdims=True)
            out = jnp.where(total == 0, 0, out / jnp.where(total == 0, 1, total))
        return (state, normalizer, segment), out

    tokens = [jnp.moveaxis(x, -3, 0) for x in (q, k, v)]
    tokens += [jnp.moveaxis(log_decay, -2, 0), jnp.moveaxis(segment_ids, -1, 0)]
    carry, out = _chunks.scan_tokens(
        step, (state, normalizer, segment_ids[..., 0]), tuple(tokens)
    )
    state, normalizer, _ = carry
    return jnp.moveaxis(out, 0, -3), (state, normalizer) if normalize else state
