"""Based attention by kernels: what stands between the public arrays and theirs.

The platform is chosen, and the arrays alone kept for the backward pass, by linear
attention's ``vjp.differentiable``.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from tk_jax.ops import _chunks
from tk_jax.ops.based_attention import config, order, scan
from tk_jax.ops.linear_attention import chunk as chunks
from tk_jax.ops.linear_attention.config import LinearAttentionOptions
from tk_jax.ops.linear_attention.vjp import document_starts, pad_columns


def kernel_based_attention(
    options: LinearAttentionOptions,
    return_state: bool,
    q,
    k,
    v,
    log_decay,
    state,
    segment_ids,
    *,
    tiles: config.ScanConfig | None = None,
):
    """As ``linear_attention.xla.linear_attention`` with the features, by kernels.

    ``log_decay`` is None; ``state`` may be None for zeros, and the state that is
    returned is, unless ``return_state``. ``tiles`` is for tuning.
    """
    del log_decay
    *batch, seqlen, _, dim = q.shape
    value_dim = v.shape[-1]
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    unfold = functools.partial(_chunks.unfold, batch=batch)
    if options.normalize:
        # The denominators are the outputs of values that are one.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        if state is not None:
            state = jnp.concatenate([state[0], state[1][..., None]], axis=-1)
    arrays = scan.Arrays(
        q=fold(q),
        k=fold(k),
        v=pad_columns(fold(v)),
        state=None if state is None else order.to_kernel(pad_columns(fold(state)), dim),
        starts=document_starts(segment_ids, (*batch, seqlen)),
    )
    settings = scan.Settings("based_attention", options.scale, return_state, tiles)
    out, state = scan.scan(settings, arrays)
    out = unfold(out)
    if state is not None:
        state = unfold(order.to_public(state, dim))
    if not options.normalize:
        return out[..., :value_dim], None if state is None else state[..., :value_dim]
    out = out.astype(jnp.float32)
    out = chunks.divide(out[..., :value_dim], out[..., value_dim])
    if state is not None:
        state = state[..., :value_dim], state[..., value_dim]
    return out.astype(v.dtype), state
