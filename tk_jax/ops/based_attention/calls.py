"""The calls of Based attention's five kernels, one function each.

Shapes and what is computed stand in ``cuda/kernels/based_attention``. States are
[.., V, F] with the features in the kernels' order (``order.py``). ``counts`` is float32
[B, T padded to whole chunks], how many documents have started in each chunk, or None.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tk_jax import _ffi
from tk_jax.ops.based_attention import config
from tk_jax.ops.linear_attention.config import CHUNK, SLICE, GradientsOptions


class Start(NamedTuple):
    """What segments, numbered as they are walked, start from; all may be None."""

    state: jax.Array | None = None  # float32 [B, H, V, F]: where the first starts
    added: jax.Array | None = None  # what the others have added, of added_states
    # int32 [B, segments]: the first segment of which something is left, or -1: of
    # `state` too. None: of all.
    since: jax.Array | None = None

    def operands(self) -> list[jax.Array]:
        return [
            _ffi.optional(self.state),
            _ffi.optional(self.added),
            _ffi.optional(self.since, jnp.int32),
        ]


def added_states(
    keys,
    values,
    counts,
    tiles: config.ScanConfig,
    *,
    scale: float = 1.0,
    reverse: bool = False,
):
    """What each segment but the last one adds to the state, in the kernels' layout.

    float32 [B, H, slices, pieces, segments - 1, 64, columns of a piece].
    """
    return _states(
        keys, values, counts, Start(), tiles, scale, reverse, adds=True, final=False
    )[1]


def chunk_states(
    keys,
    values,
    counts,
    start: Start,
    tiles: config.ScanConfig,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    final: bool = False,
):
    """States at the starts of chunks, and after the last one if ``final``.

    With ``reverse``, gradients of states at the ends of chunks and before the first.
    """
    chunk_states, _, end = _states(
        keys, values, counts, start, tiles, scale, reverse, adds=False, final=final
    )
    return chunk_states, end if final else None


def _states(keys, values, counts, start, tiles, scale, reverse, *, adds, final):
    stored = None if adds else _chunk_states(keys, values)
    added = _added_states(keys, values, tiles) if adds else None
    last = _state(keys, values) if final else None
    return _ffi.call(
        "tk_based_attention_states_v1",
        (
            _ffi.result_type(keys, stored, keys.dtype),
            _ffi.result_type(keys, added),
            _ffi.result_type(keys, last),
        ),
        keys,
        values,
        _ffi.optional(counts),
        *start.operands(),
        options=config.BasedStatesOptions(
            scale=scale, reverse=reverse, chunks_of_segment=tiles.chunks_of_segment
        ),
        config=tiles.states,
    )


def outputs(
    q,
    k,
    v,
    counts,
    start: Start,
    tiles: config.ScanConfig,
    *,
    scale: float,
    final: bool,
    normalize: bool = False,
    sums=None,
    divisors: bool = False,
):
    """out, the state after the last chunk if ``final``, the divisors if ``divisors``.

    With ``normalize``, out is divided by the sums of weights, float32 [B, H, T padded
    to whole chunks], and ``sums`` is what segments begin with: [B, H, segments, 18, 16]
    as in ``normalizer.py``, or None.
    """
    last = _state(k, v) if final else None
    divided = _divisors(v) if divisors else None
    out, end, totals = _ffi.call(
        "tk_based_attention_outputs_v1",
        (
            _ffi.result_type(q, v.shape, q.dtype),
            _ffi.result_type(q, last),
            _ffi.result_type(q, divided),
        ),
        q,
        k,
        v,
        _ffi.optional(counts),
        *start.operands(),
        _ffi.optional(sums),
        options=config.BasedOutputsOptions(
            scale=scale,
            chunks_of_segment=tiles.chunks_of_segment,
            normalize=normalize,
        ),
        config=tiles.outputs,
    )
    return out, end if final else None, totals if divisors else None


class Divisors(NamedTuple):
    """What divisors change of gradients; all None where nothing is normalized."""

    # float32 [B, H, slices, T padded to whole chunks]: their gradients, in the first
    # slice of values alone
    changes: jax.Array | None = None
    sums: jax.Array | None = None  # what segments begin with, as for outputs


NO_DIVISORS = Divisors()


def query_gradients(
    q,
    k,
    v,
    dout,
    counts,
    start: Start,
    tiles: config.ScanConfig,
    *,
    scale: float,
    divisors: Divisors = NO_DIVISORS,
):
    """dq, from a walk through states."""
    return _walked_gradients(
        q, k, v, dout, counts, start, tiles, scale, divisors, reverse=False, final=False
    )[0]


def key_gradients(
    q,
    k,
    v,
    dout,
    counts,
    start: Start,
    tiles: config.ScanConfig,
    *,
    scale: float,
    final: bool,
    divisors: Divisors = NO_DIVISORS,
):
    """dk, dv, and the state's gradient before the first chunk if ``final``.

    From a walk in reverse, through gradients of states: ``start`` is of these, and the
    sums of ``divisors`` are of gradients.
    """
    dk, dv, dstate = _walked_gradients(
        q, k, v, dout, counts, start, tiles, scale, divisors, reverse=True, final=final
    )
    return dk, dv, dstate if final else None


def _walked_gradients(
    q, k, v, dout, counts, start, tiles, scale, divisors, *, reverse: bool, final: bool
):
    batch, seqlen, groups, dim = q.shape
    heads, slices = v.shape[2], -(-v.shape[3] // SLICE)
    whole = heads * slices == groups
    parts = (batch, seqlen, heads, slices, dim)
    dkeys, dv, last = _ffi.call(
        "tk_based_attention_walked_gradients_v1",
        (
            _ffi.result_type(
                q, q.shape if whole else parts, q.dtype if whole else jnp.float32
            ),
            _ffi.result_type(q, v.shape if reverse else None, q.dtype),
            _ffi.result_type(q, _state(k, v) if final else None),
        ),
        q,
        k,
        v,
        dout,
        _ffi.optional(counts),
        *start.operands(),
        _ffi.optional(divisors.changes),
        _ffi.optional(divisors.sums),
        options=config.BasedStatesOptions(
            scale=scale, reverse=reverse, chunks_of_segment=tiles.chunks_of_segment
        ),
        config=tiles.gradients,
    )
    if not whole:
        # The heads of a group, and the slices of each, one after another.
        dkeys = dkeys.reshape(batch, seqlen, groups, -1, dim).sum(3).astype(q.dtype)
    return dkeys, dv, last


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


def _state(keys, values) -> tuple[int, ...]:
    batch, _, num_heads, value_dim = values.shape
    return (batch, num_heads, value_dim, config.state_columns(keys.shape[-1]))


def _divisors(values) -> tuple[int, ...]:
    batch, seqlen, num_heads, _ = values.shape
    return (batch, num_heads, config.padded_tokens(seqlen))


def _added_states(keys, values, tiles) -> tuple[int, ...]:
    batch, seqlen, num_heads, value_dim = values.shape
    dim = keys.shape[-1]
    pieces = config.state_pieces(dim)
    columns = config.state_columns(dim) // pieces
    slices = -(-value_dim // SLICE)
    added = tiles.segments(seqlen) - 1
    return (batch, num_heads, slices, pieces, added, SLICE, columns)
