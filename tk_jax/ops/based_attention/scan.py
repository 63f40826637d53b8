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
from jax import lax
from jax.custom_batching import custom_vmap

from tk_jax.ops.based_attention import calls, config
from tk_jax.ops.linear_attention.calls import chunk_sums
from tk_jax.ops.linear_attention.config import CHUNK


class Arrays(NamedTuple):
    """The arrays of a scan; the last two may be None. V is a multiple of 8."""

    q: jax.Array  # [B, T, G, D]
    k: jax.Array  # [B, T, G, D]
    v: jax.Array  # [B, T, H, V]
    state: jax.Array | None = None  # float32 [B, H, V, F]: before the first token
    starts: jax.Array | None = None  # bool [B, T]: a document starts, with no state


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


def _segment_starts(arrays, counts, tiles):
    """The states that segments start with, [B, H, segments, V, F]; None for zeros."""
    segments = _segments(arrays.v, tiles)
    if segments == 1:
        return None if arrays.state is None else arrays.state[:, :, None]
    _, ends = calls.states(arrays.k, arrays.v, counts, None, tiles)
    return _chained(arrays.state, _kept(counts, segments, tiles), ends)


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


def _chained(first, kept, added):
    """x[0] = first, x[s + 1] = (x[s] if kept[s], else 0) + added[s], on the third axis.

    ``first`` is [B, H, V, F] or None for zeros, ``added`` [B, H, segments, V, F].
    """
    first = jnp.zeros_like(added[:, :, :1]) if first is None else first[:, :, None]
    values = jnp.concatenate([first, added[:, :, :-1]], axis=2)
    if kept is None:
        return jnp.cumsum(values, axis=2)
    kept = jnp.pad(kept[:, :-1], [(0, 0), (1, 0)])[:, None, :, None, None]

    def after(one, other):
        (is_kept, value), (other_kept, other_value) = one, other
        return is_kept & other_kept, jnp.where(other_kept, value, 0) + other_value

    return lax.associative_scan(after, (kept, values), axis=2)[1]


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
    return Arrays(dq, dk, dv, dstate, None)


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
        ends = jnp.flip(_chained(dfinal, kept, jnp.flip(added, 2)), axis=2)
    wanted = arrays.state is not None
    chunk_dstates, dstarts = walk(start=ends, stores=True, ends=wanted)
    return chunk_dstates, dstarts[:, :, 0] if wanted else None
