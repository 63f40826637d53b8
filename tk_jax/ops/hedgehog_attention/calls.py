"""The calls of Hedgehog attention's five kernels, one function each.

Shapes and what is computed stand in ``cuda/kernels/hedgehog_attention``. Numbers of
tokens are float32 and [B, H, padded], where T is padded to whole chunks, or 64 to each
tile of packed documents; states are [.., V, 2 F].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tk_jax import _ffi
from tk_jax.ops import _chunks
from tk_jax.ops.hedgehog_attention import config

FEATURES = 2 * config.MAP


class Documents(NamedTuple):
    """How documents are packed: which tiles there are."""

    tiles: jax.Array  # int32 [B, most + 2, 4]
    counts: jax.Array  # int32 [B]
    windows: jax.Array  # float32 [B, most * 64]


def _operands(documents: Documents | None):
    if documents is not None:
        return documents
    return [_ffi.optional(None, x) for x in (jnp.int32, jnp.int32, jnp.float32)]


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
    states_of_segment: int = 0,
    documents: Documents | None = None,
    shares: int = 0,
):
    """out.

    ``start`` is what segments begin with: sums [B, K, states, V, 2 F] and normalizer
    [B, K, states, 2 F]; both None for zeros. A segment begins with the sum of the first
    one, where there is one more, and of ``states_of_segment`` for each segment before.
    With ``documents``, segments are of ``chunks_of_segment`` of the ``shares`` that
    tiles are dealt out in, and have a state each.
    """
    (out,) = _ffi.call(
        "tk_hedgehog_attention_outputs_v1",
        (_like(q, (*q.shape[:-1], v.shape[-1])),),
        q,
        k,
        v,
        q_map,
        k_map,
        # One operand: what they come from, gates mostly, is then one kernel of XLA.
        _mixing_weights(alpha, beta, q.dtype),
        _ffi.optional(first, jnp.int32),
        *map(_ffi.optional, start),
        *_operands(documents),
        options=config.HedgehogOutputsOptions(
            scale=scale,
            chunks_of_segment=chunks_of_segment,
            states_of_segment=states_of_segment,
            shares=shares,
        ),
    )
    return out


def _mixing_weights(alpha, beta, dtype):
    """alpha and beta, [2, H], by one factor for each head: out is a quotient of both.

    The larger is about 2^12, so that float16 has room for both and for what is far
    less, and beta is a number of ``dtype``: weights are rounded to it, the divisor is
    not, and the largest weight of a near key is beta itself. Of a query that sees one
    key, out would be as wrong as beta is rounded.
    """
    top = jax.lax.reduce_precision(jnp.maximum(alpha, beta), 8, 0)  # a power of two
    unit = jnp.where((top > 0) & jnp.isfinite(top), top / 2**12, 1)
    alpha, beta = alpha / unit, beta / unit
    rounded = _chunks.rounded(beta, dtype)
    factor = jnp.where(rounded > 0, rounded / beta, 1)
    return jnp.stack([alpha * factor, jnp.where(rounded > 0, rounded, beta)])


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
    q, k, v, dout, q_map, states, normalizers, alpha, beta, first, scale, documents=None
) -> QueryGradients:
    """From the states at the starts of chunks, and their normalizers."""
    rows = _rows(q, documents)
    results = _ffi.call(
        "tk_hedgehog_attention_queries_v1",
        (
            _like(q, q.shape),
            _like(q, (*q.shape[:-1], FEATURES)),
            _like(q, (*q.shape[:-1], config.MAP)),
            *(_ffi.result_type(q, rows) for _ in range(6)),
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
        *_operands(documents),
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
    documents=None,
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
        *_operands(documents),
        options=config.HedgehogGradientsOptions(scale=scale),
    )


def document_states(
    keys,
    values,
    documents: Documents,
    *,
    shares: int,
    k_map=None,
    delta=None,
    first=None,
    start=(None, None),
    stored: bool = False,
    ended: int | None = None,
):
    """Sums before far tiles, and at the ends of shares, each with its normalizer.

    Forward of k, v and ``k_map``. In reverse, of features, dout and ``delta``: the
    gradients after the tiles that far ones see from afar, and at the starts of shares.
    ``start`` is what shares begin with, [B, heads, shares, V, 2 F] and [.., 2 F]. With
    ``stored``, states are [B, heads, chunks, padded V, 2 F] with what each chunk's tile
    has, if one that begins there has any; with ``ended``, those of the first so many
    shares are returned too.
    """
    batch, seqlen, heads, value_dim = values.shape
    rows = (batch, heads, -(-seqlen // config.CHUNK))
    columns = -(-value_dim // config.SLICE) * config.SLICE
    ends = (batch, heads, ended)
    shapes = (
        (*rows, columns, FEATURES) if stored else None,
        (*rows, FEATURES) if stored else None,
        None if ended is None else (*ends, value_dim, FEATURES),
        None if ended is None else (*ends, FEATURES),
    )
    dtypes = (keys.dtype, *[jnp.float32] * 3)
    results = _ffi.call(
        "tk_hedgehog_attention_document_states_v1",
        [_ffi.result_type(keys, *pair) for pair in zip(shapes, dtypes, strict=True)],
        keys,
        values,
        _ffi.optional(k_map, keys.dtype),
        _ffi.optional(delta),
        _ffi.optional(first, jnp.int32),
        *map(_ffi.optional, start),
        *documents,
        options=config.HedgehogDocumentStatesOptions(
            reverse=delta is not None, shares=shares
        ),
    )
    return results[:2], results[2:]


def _rows(q, documents) -> tuple[int, ...]:
    if documents is not None:
        return (q.shape[0], q.shape[2], documents.windows.shape[1])
    return (q.shape[0], q.shape[2], config.padded_tokens(q.shape[1]))


def _like(x, shape):
    return jax.typeof(x).update(shape=shape)
