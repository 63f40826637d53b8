"""The calls of Based attention's four kernels, one function each.

Shapes and what is computed stand in ``cuda/kernels/based_attention``. States are
[.., V, F] with the features in the kernels' order (``order.py``). ``counts`` is float32
[B, T padded to whole chunks], how many documents have started in each chunk, or None.
"""

from __future__ import annotations

import math

from tk_jax import _ffi
from tk_jax.ops.based_attention import config
from tk_jax.ops.linear_attention.config import CHUNK, GradientsOptions


def states(
    keys,
    values,
    counts,
    start,
    tiles: config.ScanConfig,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    stores: bool = False,
    ends: bool = True,
):
    """States at the starts of chunks if ``stores``, and after segments if ``ends``.

    With ``reverse``, gradients of states at the ends of chunks and before segments.
    ``start`` is what segments begin with, [B, H, segments, V, F] or None for zeros.
    """
    ended = _segment_states(keys, values, tiles) if ends else None
    chunk_states, end = _ffi.call(
        "tk_based_attention_states_v1",
        (
            _ffi.result_type(
                keys, _chunk_states(keys, values) if stores else None, keys.dtype
            ),
            _ffi.result_type(keys, ended),
        ),
        keys,
        values,
        _ffi.optional(counts),
        _ffi.optional(start),
        options=config.BasedStatesOptions(
            scale=scale, reverse=reverse, chunks_of_segment=tiles.chunks_of_segment
        ),
        config=tiles.states,
    )
    return chunk_states if stores else None, end if ends else None


def outputs(
    q,
    k,
    v,
    counts,
    start,
    tiles: config.ScanConfig,
    *,
    scale: float,
    ends: bool,
    normalize: bool = False,
    sums=None,
):
    """out, and states after segments if ``ends``; ``start`` as that of states.

    With ``normalize``, out is divided by the sums of weights, and ``sums`` is what
    segments begin with: [B, H, segments, 18, 16] as in ``normalizer.py``, or None.
    """
    ended = _segment_states(k, v, tiles) if ends else None
    out, end = _ffi.call(
        "tk_based_attention_outputs_v1",
        (_ffi.result_type(q, v.shape, q.dtype), _ffi.result_type(q, ended)),
        q,
        k,
        v,
        _ffi.optional(counts),
        _ffi.optional(start),
        _ffi.optional(sums),
        options=config.BasedOutputsOptions(
            scale=scale,
            chunks_of_segment=tiles.chunks_of_segment,
            normalize=normalize,
        ),
        config=tiles.outputs,
    )
    return out, end if ends else None


def chunk_outputs(q, k, v, chunk_states, counts, tiles: config.ScanConfig, *, scale):
    """out, from the states at the starts of chunks."""
    (out,) = _ffi.call(
        "tk_based_attention_chunk_outputs_v1",
        (_ffi.result_type(q, v.shape, q.dtype),),
        q,
        k,
        v,
        chunk_states,
        _ffi.optional(counts),
        options=GradientsOptions(scale=scale),
        config=tiles.outputs,
    )
    return out


def gradients(
    q,
    k,
    v,
    dout,
    chunk_states,
    chunk_dstates,
    counts,
    tiles: config.ScanConfig,
    *,
    scale: float,
):
    """dq, dk, dv of chunks between their states and those's gradients."""
    return _ffi.call(
        "tk_based_attention_gradients_v1",
        tuple(_ffi.result_type(q, x.shape, q.dtype) for x in (q, k, v)),
        q,
        k,
        v,
        dout,
        chunk_states,
        chunk_dstates,
        _ffi.optional(counts),
        options=GradientsOptions(scale=scale),
        config=tiles.gradients,
    )


def _chunk_states(keys, values) -> tuple[int, ...]:
    batch, seqlen, num_heads, value_dim = values.shape
    features = config.state_columns(keys.shape[-1])
    return (batch, num_heads, -(-seqlen // CHUNK), value_dim, features)


def _segment_states(keys, values, tiles) -> tuple[int, ...]:
    batch, seqlen, num_heads, value_dim = values.shape
    segments = math.ceil(-(-seqlen // CHUNK) / tiles.chunks_of_segment)
    features = config.state_columns(keys.shape[-1])
    return (batch, num_heads, segments, value_dim, features)
