"""The calls of Hedgehog attention's four kernels, one function each.

Shapes and what is computed stand in ``cuda/kernels/hedgehog_attention``. Numbers of
tokens are float32 and [B, H, padded], where T is padded to whole chunks; states are
[.., V, 2 F].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tk_jax import _ffi
from tk_jax.ops.hedgehog_attention import config

FEATURES = 2 * config.MAP


def sums(k, v, k_map, first, *, chunks_of_segment: int, segments: int):
    """What each of the first segments adds to the sums and the normalizer."""
    rows = (k.shape[0], k.shape[2], segments)
    return _ffi.call(
        "tk_hedgehog_attention_sums_v1",
        (
            _ffi.result_type(k, (*rows, v.shape[-1], FEATURES)),
            _ffi.result_type(k, (*rows, FEATURES)),
        ),
        k,
        v,
        k_map,
        _ffi.optional(first, jnp.int32),
        options=config.HedgehogSumsOptions(chunks_of_segment=chunks_of_segment),
    )


def outputs(
    q,
    k,
    v,
    q_map,
    k_map,
    alpha,
    beta,
    first,
    start,
    *,
    scale: float,
    chunks_of_segment: int,
):
    """out.

    ``start`` is what segments begin with: sums [B, K, segments, V, 2 F] and normalizer
    [B, K, segments, 2 F]; both None for zeros.
    """
    (out,) = _ffi.call(
        "tk_hedgehog_attention_outputs_v1",
        (_like(q, (*q.shape[:-1], v.shape[-1])),),
        q,
        k,
        v,
        q_map,
        k_map,
        alpha,
        beta,
        _ffi.optional(first, jnp.int32),
        *map(_ffi.optional, start),
        options=config.HedgehogOutputsOptions(
            scale=scale, chunks_of_segment=chunks_of_segment
        ),
    )
    return out


class QueryGradients(NamedTuple):
    """What the kernel of queries returns; numbers of tokens are [B, H, padded]."""

    dq: jax.Array
    features: jax.Array  # [B, T, H, 2 F]: alpha phi(q) / divisors
    dscores: jax.Array  # [B, T, H, F]: of q times its map
    largest: jax.Array
    peaks: jax.Array
    dbeta: jax.Array
    dalpha: jax.Array
    divisors: jax.Array
    delta: jax.Array  # dout times out


def queries(
    q, k, v, dout, q_map, states, normalizers, alpha, beta, first, scale
) -> QueryGradients:
    """From the states at the starts of chunks, and their normalizers."""
    results = _ffi.call(
        "tk_hedgehog_attention_queries_v1",
        (
            _like(q, q.shape),
            _like(q, (*q.shape[:-1], FEATURES)),
            _like(q, (*q.shape[:-1], config.MAP)),
            *(_ffi.result_type(q, _rows(q)) for _ in range(6)),
        ),
        q,
        k,
        v,
        dout,
        q_map,
        states,
        normalizers,
        alpha,
        beta,
        _ffi.optional(first, jnp.int32),
        options=config.HedgehogGradientsOptions(scale=scale),
    )
    return QueryGradients(*results)


def keys(
    q,
    k,
    v,
    dout,
    k_map,
    dstates,
    dnormalizers,
    found: QueryGradients,
    beta,
    first,
    scale,
):
    """dk, dv and the gradient of k times its map, [B, T, K, F]."""
    return _ffi.call(
        "tk_hedgehog_attention_keys_v1",
        (
            _like(q, k.shape),
            _like(q, v.shape),
            _like(q, (*k.shape[:-1], config.MAP)),
        ),
        q,
        k,
        v,
        dout,
        k_map,
        dstates,
        dnormalizers,
        found.divisors,
        found.delta,
        found.largest,
        found.peaks,
        beta,
        _ffi.optional(first, jnp.int32),
        options=config.HedgehogGradientsOptions(scale=scale),
    )


def _rows(q) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], config.padded_tokens(q.shape[1]))


def _like(x, shape):
    return jax.typeof(x).update(shape=shape)
