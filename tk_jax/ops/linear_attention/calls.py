"""The calls of linear attention's kernels, one function each.

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


def chunk_sums(x, like, *, scale: float, least: float):
    """Sums of x within chunks, [B, T, H] -> [B, H, padded].

    ``like`` [B, T, H, ..] says how many there are: x may have axes of size 1.
    """
    batch, seqlen, num_heads = like.shape[:3]
    shape = (batch, num_heads, config.padded_tokens(seqlen))
    (sums,) = _ffi.call(
        "tk_linear_attention_chunk_sums_v1",
        (_ffi.result_type(like, shape),),
        x,
        options=config.ChunkSumsOptions(seqlen=seqlen, scale=scale, least=least),
    )
    return sums


class Steps(NamedTuple):
    """Steps of state-space models, as callers have them."""

    raw: jax.Array  # [B, T, H], in any of config.STEP_DTYPES
    rates: jax.Array  # [1, H] or [B, H]
    biases: jax.Array | None  # the same


def step_gates(steps: Steps, skip, columns: int, options: config.StepOptions):
    """Gates with weights; and ``skip`` [H] as [H, columns], or None."""
    batch, seqlen, num_heads = steps.raw.shape
    shape = (batch, num_heads, config.padded_tokens(seqlen))
    like = steps.raw
    sums, weights, skip_columns = _ffi.call(
        "tk_linear_attention_step_gates_v1",
        (
            _ffi.result_type(like, shape),
            _ffi.result_type(like, shape),
            _ffi.result_type(like, None if skip is None else (num_heads, columns)),
        ),
        *map(_ffi.optional, steps),
        _ffi.optional(skip),
        options=options,
    )
    return Gates(sums, weights), None if skip is None else skip_columns


def step_gradients(
    steps: Steps, gate_parts, dweights, dskip, options: config.StepOptions
):
    """The gradient of raw steps, and ``head_parts`` for ``head_sums``.

    ``dskip`` [B, H, chunks, columns] may be None.
    """
    batch, seqlen, num_heads = steps.raw.shape
    chunks = -(-seqlen // config.CHUNK)
    return _ffi.call(
        "tk_linear_attention_step_gradients_v1",
        (
            _ffi.result_type(steps.raw, steps.raw.shape, steps.raw.dtype),
            _ffi.result_type(steps.raw, (batch, chunks, config.HEAD_PARTS, num_heads)),
        ),
        *map(_ffi.optional, steps),
        *gate_parts,
        dweights,
        _ffi.optional(dskip),
        options=options,
    )


def head_sums(head_parts, *, biases: bool, skip: bool):
    """The gradients of rates, biases and skip, [H] each: None where not asked for.

    ``head_parts`` [B, chunks, parts, H] are those of ``step_gradients``.
    """
    batch, chunks, parts, num_heads = head_parts.shape
    wanted = (True, biases, skip)
    sums = _ffi.call(
        "tk_linear_attention_head_sums_v1",
        tuple(
            _ffi.result_type(head_parts, (num_heads,) if is_wanted else None)
            for is_wanted in wanted
        ),
        head_parts.reshape(batch * chunks, parts, num_heads),
        vmap_method="broadcast_all",
    )
    return tuple(
        x if is_wanted else None for x, is_wanted in zip(sums, wanted, strict=True)
    )


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
    """What segments add to the state, and what they leave of it, but for the last.

    [B, H, segments - 1, V, K] and [B, H, segments - 1]. With ``reverse``, of its
    gradient, the last segment first and without the first; with ``of_all`` none is left
    out.
    """
    *leading, segments, value_dim, key_dim = _segment_states(keys, values, tiles)
    segments = segments if of_all else segments - 1
    return _ffi.call(
        "tk_linear_attention_segment_sums_v1",
        (
            _ffi.result_type(keys, (*leading, segments, value_dim, key_dim)),
            _ffi.result_type(keys, (*leading, segments)),
        ),
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


def segment_starts(first, kept, added):
    """Each segment's first state, [B, H, segments, V, K]: kept[s] x[s] + added[s].

    ``first`` [B, H, V, K] may be None; the others are as ``segment_sums`` returns them.
    """
    batch, heads, steps, *state = added.shape
    (starts,) = _ffi.call(
        "tk_linear_attention_segment_starts_v1",
        (_ffi.result_type(added, (batch, heads, steps + 1, *state)),),
        _ffi.optional(first),
        kept,
        added,
    )
    return starts


def _ends(keys, values, tiles, wanted: bool):
    """The types of states after segments and of their marks; of size 0 without."""
    ended = _segment_states(keys, values, tiles)
    segments = ended[2]
    columns = config.round_up(values.shape[-1], config.SLICE)
    marks = (*ended[:3], columns // config.MARKED_ROWS)
    return (
        _ffi.result_type(keys, ended if wanted or segments > 1 else None),
        _ffi.result_type(keys, marks if segments > 1 else None),
    )


def _spread(results, ends, marks, values, tiles, *, reverse=False, stored_every=0):
    """results and the last of ends, NaN where an earlier one is no finite number."""
    if not marks.size:
        return results, ends[:, :, -1] if ends.size else None
    ends, results = _ffi.call(
        "tk_linear_attention_spread_v1",
        (
            _ffi.result_type(ends, ends.shape),
            _ffi.result_type(results, results.shape, results.dtype),
        ),
        values,
        marks,
        ends,
        results,
        in_place={2: 0, 3: 1},
        options=config.SpreadOptions(
            reverse=reverse,
            chunks_of_segment=tiles.chunks_of_segment,
            stored_every=stored_every,
        ),
    )
    return results, ends[:, :, -1]


def states(
    keys,
    values,
    gates: Gates,
    start,
    tiles: config.ScanConfig,
    *,
    stored_every: int,
    final: bool,
    scale: float = 1.0,
    reverse: bool = False,
):
    """States before runs of ``stored_every`` chunks, and the last one if ``final``.

    With ``reverse``, gradients of states after runs, and that before the first token.
    ``start`` is what segments begin with, [B, H, segments, V, K] or None for zeros; the
    last comes first with ``reverse``.
    """
    batch, seqlen, num_heads, value_dim = values.shape
    columns = config.round_up(value_dim, config.SLICE)
    runs = -(-seqlen // (stored_every * config.CHUNK))
    stored = (batch, runs, num_heads, columns, keys.shape[-1])
    states, *ends = _ffi.call(
        "tk_linear_attention_states_v1",
        (
            _ffi.result_type(keys, stored, keys.dtype),
            *_ends(keys, values, tiles, final),
        ),
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
    return _spread(
        states, *ends, values, tiles, reverse=reverse, stored_every=stored_every
    )


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
    final: bool,
):
    """out, and the state after it if ``final``; ``start`` as that of states.

    ``skip`` [H, columns] has whole slices.
    """
    out, *ends = _ffi.call(
        "tk_linear_attention_outputs_v1",
        (_ffi.result_type(q, v.shape, q.dtype), *_ends(k, v, tiles, final)),
        q,
        k,
        v,
        *map(_ffi.optional, gates),
        _ffi.optional(skip),
        _ffi.optional(start),
        options=config.OutputsOptions(
            scale=scale, chunks_of_segment=tiles.chunks_of_segment
        ),
        config=tiles.outputs,
    )
    return _spread(out, *ends, v, tiles)


class Gradients(NamedTuple):
    """What the kernel of gradients returns."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    gate_parts: tuple  # four of [B, H, padded], for gate_gradients
    dweights: jax.Array | None  # [B, H, padded]
    dskip: jax.Array | None  # [B, H, chunks, columns]: of chunks


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
    rows = gates.sums.shape
    chunks = rows[-1] // config.CHUNK
    skipped = None if skip is None else (*rows[:2], chunks, skip.shape[-1])
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
        _ffi.optional(skip),
        options=config.GradientsOptions(scale=scale),
        config=tiles.gradients,
    )
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


def padded_columns(skip):
    """[H, V] -> [H, V padded to whole slices], as outputs and gradients take it."""
    if skip is None:
        return None
    missing = -skip.shape[-1] % config.SLICE
    return jnp.pad(skip, ((0, 0), (0, missing))) if missing else skip
