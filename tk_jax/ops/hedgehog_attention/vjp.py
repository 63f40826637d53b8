"""The kernels' form of the whole op: around them, the state that a sequence starts
with and the one that it leaves behind, in XLA operations.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tk_jax import _dispatch
from tk_jax.ops import _chunks
from tk_jax.ops.hedgehog_attention import kernels, xla
from tk_jax.ops.hedgehog_attention.config import (
    CHUNK,
    HedgehogOptions,
    HedgehogState,
    state_shapes,
    xla_config,
)
from tk_jax.ops.linear_attention.vjp import pad_columns

_WINDOWS = 2 * CHUNK  # tokens that a state has as keys and values


def xla_hedgehog_attention(options: HedgehogOptions, return_state: bool, inputs):
    """In XLA operations: out, and the final state or None."""
    if inputs.state is None:
        inputs = inputs._replace(state=zero_state(options, inputs))
        inputs = _dispatch.vary_together_in(inputs)
    out, state = xla.hedgehog_attention(options, xla_config(options), inputs)
    return out, state if return_state else None


def zero_state(options, inputs) -> HedgehogState:
    shapes = state_shapes(
        inputs.q_map.shape, inputs.k.shape, inputs.v.shape, options.window, 3
    )
    sums, dtype = _chunks.sum_dtype(inputs.k.dtype), inputs.k.dtype
    dtypes = (sums, sums, dtype, dtype, jnp.int32)
    return HedgehogState(*map(jnp.zeros, shapes, dtypes))


def kernel_hedgehog_attention(
    options: HedgehogOptions,
    return_state: bool,
    inputs: xla.Inputs,
    *,
    chunks_of_segment: int | None = None,
):
    """As ``xla_hedgehog_attention``, by kernels; the last argument is for tuning.

    Maps are rounded to the dtype of the tokens. The kernels' windows are chunks of the
    sequence. A state's latest tokens go before it, so far back that chunks are the
    windows of the whole sequence; what there is before the first token of all is not
    seen. With ``segment_ids``, that is so for the first segment, and in the others
    windows begin where they do.
    """
    *batch, seqlen, num_heads, _ = inputs.q.shape
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    q, k, v = (fold(x) for x in inputs[:3])
    state, starts = inputs.state, None
    if inputs.segment_ids is not None:
        starts = _chunks.segment_starts(inputs.segment_ids, (*batch, seqlen))
        starts = fold(starts)
    if state is not None:
        state = HedgehogState(*(fold(x) for x in state))
        # Within two windows there is nothing older.
        is_old = (state.length > _WINDOWS)[:, None, None]
        state = state._replace(
            sums=jnp.where(is_old[..., None], state.sums, 0),
            normalizer=jnp.where(is_old, state.normalizer, 0),
        )
    arrays = kernels.Arrays(
        q=q,
        k=k,
        v=v,
        q_map=inputs.q_map.astype(q.dtype),
        k_map=inputs.k_map.astype(q.dtype),
        alpha=_for_heads(inputs.alpha, num_heads),
        beta=_for_heads(inputs.beta, num_heads),
    )
    if state is not None:
        arrays = _continued(arrays, state, starts)
    elif starts is not None:
        none = jnp.zeros(starts.shape[:1], jnp.int32)
        positions = xla.token_positions(none, starts, starts.shape)
        arrays = arrays._replace(positions=positions)
    settings = kernels.Settings(options.scale, chunks_of_segment)
    out = kernels.attend(settings, _padded(arrays))[..., : v.shape[-1]]
    if state is not None:
        out = _taken(out, _WINDOWS + state.length % CHUNK, seqlen)
    out = out.reshape(*batch, *out.shape[1:])
    if not return_state:
        return out, None
    final = _final_state(inputs.k_map, k, v, state, starts)
    return out, HedgehogState(*(_chunks.unfold(x, batch) for x in final))


def _for_heads(weight, num_heads):
    return jnp.broadcast_to(weight.astype(jnp.float32), num_heads)


def _padded(arrays: kernels.Arrays) -> kernels.Arrays:
    """With zeros in columns up to what the copy engine reads."""

    def rows(x):
        return jnp.swapaxes(pad_columns(jnp.swapaxes(x, -1, -2)), -1, -2)

    sums = arrays.sums
    return arrays._replace(
        q=pad_columns(arrays.q),
        k=pad_columns(arrays.k),
        v=pad_columns(arrays.v),
        q_map=rows(arrays.q_map),
        k_map=rows(arrays.k_map),
        sums=None if sums is None else rows(sums),
    )


def _continued(
    arrays: kernels.Arrays, state: HedgehogState, starts=None
) -> kernels.Arrays:
    """With a state's tokens before the others, and its sums before those."""
    phase = state.length % CHUNK
    size = _WINDOWS + CHUNK + arrays.q.shape[1]
    first = phase + jnp.maximum(_WINDOWS - state.length, 0)
    positions = None
    if starts is not None:
        starts = _put(starts, phase + _WINDOWS, size)
        # What the sums are of is two windows away at least.
        before = jnp.full_like(state.length, _WINDOWS)
        positions = xla.token_positions(before, starts, starts.shape)
    return arrays._replace(
        q=_put(arrays.q, phase + _WINDOWS, size),
        k=_put(jnp.concatenate([state.keys, arrays.k], axis=1), phase, size),
        v=_put(jnp.concatenate([state.values, arrays.v], axis=1), phase, size),
        sums=jnp.swapaxes(state.sums, -1, -2),
        normalizer=state.normalizer,
        first=first.astype(jnp.int32),
        positions=positions,
    )


def _put(x, start, size):
    """Tokens [B, T, ..] from ``start`` [B] on, among zeros: [B, size, ..]."""

    def one(x, start):
        zeros = jnp.zeros((size, *x.shape[1:]), x.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, x, start, axis=0)

    return jax.vmap(one)(x, start)


def _taken(x, start, size):
    """``size`` tokens of [B, T, ..] from ``start`` [B] on."""
    take = functools.partial(lax.dynamic_slice_in_dim, slice_size=size, axis=0)
    return jax.vmap(take)(x, start)


def _final_state(
    k_map, k, v, state: HedgehogState | None, starts=None
) -> HedgehogState:
    """What is left for the tokens that follow: as xla.py says."""
    batch, seqlen = k.shape[:2]
    if state is None:
        length, _ = _dispatch.vary_together(jnp.zeros((batch,), jnp.int32), k)
        before = [(0, 0), (_WINDOWS, 0), (0, 0), (0, 0)]
        k, v = jnp.pad(k, before), jnp.pad(v, before)
    else:
        length = state.length
        k = jnp.concatenate([state.keys, k], axis=1)
        v = jnp.concatenate([state.values, v], axis=1)
    if starts is None:
        length = length + seqlen
    else:
        length = xla.token_positions(length, starts, starts.shape)[:, -1] + 1
    # Of the tokens here, those before the latest two windows, as far as they are there
    # and of the last segment.
    token = jnp.arange(_WINDOWS + seqlen, dtype=jnp.int32)
    is_token = token >= _WINDOWS + seqlen - length[:, None]
    is_token = is_token[..., None, None]
    dtype = _chunks.sum_dtype(k.dtype)
    product = functools.partial(jnp.einsum, precision=_chunks.precision(k.dtype))
    old_k, old_v = (x[:, :seqlen].astype(dtype) for x in (k, v))
    scores = product("btkd,kdf->btkf", old_k, k_map.astype(dtype))
    phi = jnp.concatenate([jax.nn.softmax(scores), jax.nn.softmax(-scores)], axis=-1)
    phi = jnp.where(is_token[:, :seqlen], phi, 0)
    sums, normalizer = product("btkf,btkv->bkfv", phi, old_v), phi.sum(1)
    if state is not None:
        older, older_normalizer = state.sums, state.normalizer
        if starts is not None:
            is_same = ~jnp.any(starts, axis=1)[:, None, None]
            older = jnp.where(is_same[..., None], older, 0)
            older_normalizer = jnp.where(is_same, older_normalizer, 0)
        sums, normalizer = sums + older, normalizer + older_normalizer
    return HedgehogState(
        sums,
        normalizer,
        jnp.where(is_token[:, seqlen:], k[:, seqlen:], 0),
        jnp.where(is_token[:, seqlen:], v[:, seqlen:], 0),
        length,
    )
