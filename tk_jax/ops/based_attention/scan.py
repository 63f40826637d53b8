"""A differentiable scan of Based attention, composed of the kernels.

For each head, with a state S of V x F numbers and features phi whose products are the
Taylor series of exp::

    S[t]   = S[t - 1] + v[t] phi(k[t])^T
    out[t] = S[t] phi(scale q[t])

The backward pass keeps nothing but the arguments: it computes the states at the starts
of chunks again, then their gradients from the end to the start, and from both all other
gradients chunk by chunk. Where there are few heads, a sequence is cut into segments: a
first pass finds what each adds to the state, a sum of those where each starts, and a
second pass, as the only one otherwise, goes through all of them side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tk_jax.ops.based_attention import calls, config, normalizer
from tk_jax.ops.linear_attention.calls import chunk_sums
from tk_jax.ops.linear_attention.config import CHUNK


class Arrays(NamedTuple):
    """The arrays of a scan; the last three may be None. V is a multiple of 8."""

    q: jax.Array  # [B, T, G, D]
    k: jax.Array  # [B, T, G, D]
    v: jax.Array  # [B, T, H, V]
    state: jax.Array | None = None  # float32 [B, H, V, F]: before the first token
    starts: jax.Array | None = None  # bool [B, T]: a document starts, with no state
    sums: jax.Array | None = None  # float32 [B, H, F]: normalizer.py's, for normalized


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a scan."""

    op: str  # for errors
    scale: float
    return_state: bool
    tiles: config.ScanConfig | None = None  # for tuning


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(settings: Settings, arrays: Arrays):
    """Returns out [B, T, H, V] and the final state [B, H, V, F].

    The state is None unless ``settings.return_state``.
    """
    return _mapped(functools.partial(_run_forward, settings))(arrays, ())


def _scan_fwd(settings, arrays):
    return scan(settings, arrays), arrays


def _scan_bwd(settings, arrays, cotangents):
    return (_mapped(functools.partial(_run_backward, settings))(arrays, cotangents),)


scan.defvjp(_scan_fwd, _scan_bwd)


def normalized(settings: Settings, arrays: Arrays):
    """out divided by the sums of weights, the final state, and the final sums.

    Where states are walked through; not differentiable. The final ones are None unless
    ``settings.return_state``.
    """
    return _mapped(functools.partial(_run_normalized, settings))(arrays, ())


def _mapped(run):
    """``run(arrays, cotangents)``, under vmap as one call of a larger batch."""
    mapped = custom_vmap(run)

    @mapped.def_vmap
    def add_axis(axis_size, in_batched, *given):
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = mapped(*jax.tree.map(fold, given, tuple(in_batched)))
        results = jax.tree.map(
            lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results
        )
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def _checked_tiles(settings, arrays) -> config.ScanConfig:
    q, v = arrays.q, arrays.v
    # Again, because vmap may have made the batch larger than the caller's.
    if lacking := config.unsupported(q, v):
        raise NotImplementedError(
            f"{settings.op}: the TK kernel does not support {lacking}; "
            "map over fewer elements at a time or use implementation='xla'"
        )
    return settings.tiles or config.scan_config(
        *q.shape[:2], v.shape[2], q.shape[3], v.shape[3]
    )


def _counts(starts):
    """[B, padded]: how many documents have started in the chunk so far."""
    if starts is None:
        return None
    ones = starts.astype(jnp.float32)[..., None]
    return chunk_sums(ones, None, ones, scale=1.0, least=0.0)[0][:, 0]


# -- Forward --------------------------------------------------------------------------


def _run_forward(settings, arrays, _):
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    start = _segment_starts(arrays, counts, tiles)
    settled = {"scale": settings.scale, "tiles": tiles}
    if config.walks(arrays.q.shape[-1]):
        out, ends = calls.outputs(
            *arrays[:3], counts, start, ends=settings.return_state, **settled
        )
    else:
        chunk_states, ends = calls.states(
            *arrays[1:3], counts, start, tiles, stores=True, ends=settings.return_state
        )
        out = calls.chunk_outputs(*arrays[:3], chunk_states, counts, **settled)
    return out, None if ends is None else ends[:, :, -1]


def _run_normalized(settings, arrays, _):
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    out, ends = calls.outputs(
        *arrays[:3],
        counts,
        _segment_starts(arrays, counts, tiles),
        tiles,
        scale=settings.scale,
        ends=settings.return_state,
        normalize=True,
        sums=_segment_sums(arrays, counts, tiles),
    )
    if not settings.return_state:
        return out, None, None
    starts = arrays.starts
    kept = None if starts is None else ~jnp.any(starts, axis=1, keepdims=True)
    last = _with_heads(normalizer.added(arrays.k, starts, arrays.k.shape[1]), arrays)
    last = normalizer.chained(arrays.sums, kept, last)[:, :, -1]
    return out, ends[:, :, -1], last


def _segment_sums(arrays, counts, tiles):
    """What normalizes at the starts of segments, [B, H, segments, 18, 16], or None."""
    segments = _segments(arrays.v, tiles)
    if segments == 1:
        if arrays.sums is None:
            return None
        sums = arrays.sums[:, :, None]
    else:
        tokens = tiles.chunks_of_segment * CHUNK
        added = normalizer.added(arrays.k, arrays.starts, tokens)
        kept = _kept(counts, segments, tiles)
        added = _with_heads(added, arrays)
        sums = normalizer.chained(arrays.sums, kept, added)[:, :, :-1]
    return normalizer.to_kernel(sums, arrays.q.shape[-1])


def _with_heads(x, arrays):
    """[B, G, ..] -> [B, H, ..]"""
    return jnp.repeat(x, arrays.v.shape[2] // x.shape[1], axis=1)


def _segment_starts(arrays, counts, tiles):
    """The states that segments start with, [B, H, segments, V, F]; None for zeros."""
    segments = _segments(arrays.v, tiles)
    if segments == 1:
        return None if arrays.state is None else arrays.state[:, :, None]
    _, ends = calls.states(arrays.k, arrays.v, counts, None, tiles)
    kept = _kept(counts, segments, tiles)
    return normalizer.chained(arrays.state, kept, ends)[:, :, :-1]


def _segments(v, tiles) -> int:
    chunks = -(-v.shape[1] // CHUNK)
    return -(-chunks // tiles.chunks_of_segment)


def _kept(counts, segments, tiles):
    """Whether a state is left after each segment, bool [B, segments]; None: always."""
    if counts is None:
        return None
    last = counts[:, CHUNK - 1 :: CHUNK]
    missing = segments * tiles.chunks_of_segment - last.shape[1]
    last = jnp.pad(last, [(0, 0), (0, missing)])
    return jnp.all(last.reshape(last.shape[0], segments, -1) == 0, axis=-1)


# -- Backward -------------------------------------------------------------------------


def _run_backward(settings, arrays, cotangents) -> Arrays:
    dout, dfinal = cotangents
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    chunk_states, _ = calls.states(
        arrays.k,
        arrays.v,
        counts,
        _segment_starts(arrays, counts, tiles),
        tiles,
        stores=True,
        ends=False,
    )
    chunk_dstates, dstate = _state_gradients(
        settings, arrays, counts, dout, dfinal, tiles
    )
    dq, dk, dv = calls.gradients(
        *arrays[:3],
        dout,
        chunk_states,
        chunk_dstates,
        counts,
        tiles,
        scale=settings.scale,
    )
    return Arrays(dq, dk, dv, dstate)


def _state_gradients(settings, arrays, counts, dout, dfinal, tiles):
    """Gradients of the states at the ends of chunks, and of the initial state."""
    walk = functools.partial(
        calls.states,
        arrays.q,
        dout,
        counts,
        tiles=tiles,
        scale=settings.scale,
        reverse=True,
    )
    segments = _segments(arrays.v, tiles)
    if segments == 1:
        ends = None if dfinal is None else dfinal[:, :, None]
    else:
        _, added = walk(start=None)
        kept = _kept(counts, segments, tiles)
        kept = None if kept is None else jnp.flip(kept, 1)
        ends = normalizer.chained(dfinal, kept, jnp.flip(added, 2))[:, :, :-1]
        ends = jnp.flip(ends, axis=2)
    wanted = arrays.state is not None
    chunk_dstates, dstarts = walk(start=ends, stores=True, ends=wanted)
    return chunk_dstates, dstarts[:, :, 0] if wanted else None
