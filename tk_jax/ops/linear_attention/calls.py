"""The calls of linear attention's six kernels, one function each.

Shapes and what is computed stand in ``cuda/kernels/linear_attention``. Gates are
float32 and [B, H, padded], where T is padded to whole chunks; states are [.., V, K].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tk_jax import _ffi
from tk_jax.ops.linear_attention import config


class Gates(NamedTuple):
    """What kernels take of gates; None where there is none."""

    sums: jax.Array  # [B, H, padded]: of logarithms of decays in each chunk, base 2
    weights: jax.Array | None = None  # [B, H, padded]: of tokens
    counts: jax.Array | None = None  # [B, padded]: of documents started in each chunk


def chunk_sums(x, y, like, *, scale: float, least: float):
    """Sums of x within chunks, and y: both [B, T, H] -> [B, H, padded].

    ``like`` [B, T, H, ..] says how many there are: x may have axes of size 1, and y may
    be None, as is then the second result.
    """
    batch, seqlen, num_heads = like.shape[:3]
    shape = (batch, num_heads, config.padded_tokens(seqlen))
    sums, moved = _ffi.call(
        "tk_linear_attention_chunk_sums_v1",
        (
            _ffi.result_type(like, shape),
            _ffi.result_type(like, None if y is None else shape),
        ),
        x,
        _ffi.optional(y),
        options=config.ChunkSumsOptions(seqlen=seqlen, scale=scale, least=least),
    )
    return sums, None if y is None else moved


def segment_sums(
    keys,
    values,
    gates: Gates,
    tiles: config.ScanConfig,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    of_all: bool = False,
):
    """What segments add to the state: [B, H, segments - 1, V, K], without the last.

    With ``reverse``, what they add to its gradient, without the first; with ``of_all``
    none is left out.
    """
    *leading, segments, value_dim, key_dim = _segment_states(keys, values, tiles)
    segments = segments if of_all else segments - 1
    (sums,) = _ffi.call(
        "tk_linear_attention_segment_sums_v1",
        (_ffi.result_type(keys, (*leading, segments, value_dim, key_dim)),),
        keys,
        values,
        *map(_ffi.optional, gates),
        options=config.SegmentSumsOptions(
            scale=scale,
            reverse=reverse,
            of_all=of_all,
            chunks_of_segment=tiles.chunks_of_segment,
        ),
        config=tiles.states,
    )
    return sums


def states(
    keys,
    values,
    gates: Gates,
    start,
    tiles: config.ScanConfig,
    *,
    stored_every: int,
    ends: bool,
    scale: float = 1.0,
    reverse: bool = False,
):
    """States before runs of ``stored_every`` chunks, and after segments if ``ends``.

    With ``reverse``, gradients of states after runs and before segments.
    ``start`` is what segments begin with, [B, H, segments, V, K] or None for zeros.
    """
    batch, seqlen, num_heads, value_dim = values.shape
    columns = config.round_up(value_dim, config.SLICE)
    runs = -(-seqlen // (stored_every * config.CHUNK))
    stored = (batch, num_heads, runs, columns, keys.shape[-1])
    ended = _segment_states(keys, values, tiles) if ends else None
    states, end = _ffi.call(
        "tk_linear_attention_states_v1",
        (_ffi.result_type(keys, stored, keys.dtype), _ffi.result_type(keys, ended)),
        keys,
        values,
        *map(_ffi.optional, gates),
        _ffi.optional(start),
        options=config.StatesOptions(
            scale=scale,
            reverse=reverse,
            chunks_of_segment=tiles.chunks_of_segment,
            stored_every=stored_every,
        ),
        config=tiles.states,
    )
    return states, end if ends else None


def outputs(
    q,
    k,
    v,
    gates: Gates,
    skip,
    start,
    tiles: config.ScanConfig,
    *,
    scale: float,
    ends: bool,
):
    """out, and states after segments if ``ends``; ``start`` as that of states."""
    ended = _segment_states(k, v, tiles) if ends else None
    out, end = _ffi.call(
        "tk_linear_attention_outputs_v1",
        (_ffi.result_type(q, v.shape, q.dtype), _ffi.result_type(q, ended)),
        q,
        k,
        v,
        *map(_ffi.optional, gates),
        _ffi.optional(_padded_columns(skip)),
        _ffi.optional(start),
        options=config.OutputsOptions(
            scale=scale, chunks_of_segment=tiles.chunks_of_segment
        ),
        config=tiles.outputs,
    )
    return out, end if ends else None


class Gradients(NamedTuple):
    """What the kernel of gradients returns."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    gate_parts: tuple  # four of [B, H, padded], for gate_gradients
    dweights: jax.Array | None  # [B, H, padded]
    dskip: jax.Array | None  # [B, H, V]: not summed over the batch


def gradients(
    q,
    k,
    v,
    dout,
    pair_states,
    pair_dstates,
    gates: Gates,
    skip,
    tiles: config.ScanConfig,
    *,
    scale: float,
) -> Gradients:
    """The gradients of chunks, from the states of pairs and those's gradients."""
    padded = _padded_columns(skip)
    rows = gates.sums.shape
    chunks = rows[-1] // config.CHUNK
    skipped = None if skip is None else (*rows[:2], chunks, padded.shape[-1])
    dq, dk, dv, *gate_parts, dweights, dskip = _ffi.call(
        "tk_linear_attention_gradients_v1",
        (
            *(_ffi.result_type(q, x.shape, q.dtype) for x in (q, k, v)),
            *(_ffi.result_type(q, rows) for _ in range(4)),
            _ffi.result_type(q, None if gates.weights is None else rows),
            _ffi.result_type(q, skipped),
        ),
        q,
        k,
        v,
        dout,
        pair_states,
        pair_dstates,
        *map(_ffi.optional, gates),
        _ffi.optional(padded),
        options=config.GradientsOptions(scale=scale),
        config=tiles.gradients,
    )
    if skip is not None:
        dskip = jnp.sum(dskip, axis=2)[..., : skip.shape[-1]]
    return Gradients(
        dq,
        dk,
        dv,
        tuple(gate_parts),
        None if gates.weights is None else dweights,
        None if skip is None else dskip,
    )


def gate_gradients(gate_parts, like):
    """The gradient of logarithms of decays, [B, T, H]; ``like`` is [B, T, H, ..]."""
    (dgates,) = _ffi.call(
        "tk_linear_attention_gate_gradients_v1",
        (_ffi.result_type(like, like.shape[:3]),),
        *gate_parts,
    )
    return dgates


def _segment_states(keys, values, tiles) -> tuple[int, ...]:
    batch, seqlen, num_heads, value_dim = values.shape
    segments = math.ceil(-(-seqlen // config.CHUNK) / tiles.chunks_of_segment)
    return (batch, num_heads, segments, value_dim, keys.shape[-1])


def _padded_columns(skip):
    """[H, V] -> [H, V padded to whole slices]"""
    if skip is None:
        return None
    missing = -skip.shape[-1] % config.SLICE
    return jnp.pad(skip, ((0, 0), (0, missing))) if missing else skip
