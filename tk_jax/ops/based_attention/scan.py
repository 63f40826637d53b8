"""A differentiable scan of Based attention, composed of the kernels.

For each head, with a state S of V x F numbers and features phi whose products are the
Taylor series of exp::

    S[t]   = S[t - 1] + v[t] phi(k[t])^T
    out[t] = S[t] phi(scale q[t])

The backward pass keeps nothing but the arguments. Where a kernel keeps the whole state
on chip, one walk through the states finds the gradients of q, and one in reverse,
through the states' gradients, all others. Otherwise it computes the states at the
starts of chunks again, then their gradients from the end to the start, and from both
all other gradients chunk by chunk. Where there are few heads, a sequence is cut into
segments: a first pass finds what each adds to the state, and a second one, as the only
one otherwise, goes through all of them side by side; each starts from the sum of those
before it.
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
from tk_jax.ops.linear_attention.config import CHUNK, SLICE


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


class NormalizedResults(NamedTuple):
    """Or their cotangents. States and sums may be None."""

    out: jax.Array  # [B, T, H, V], divided by the sums of weights
    state: jax.Array | None  # float32 [B, H, V, F], after the last token
    sums: jax.Array | None  # float32 [B, H, F], likewise


def normalized(settings: Settings, arrays: Arrays, *, divisors: bool = False):
    """The NormalizedResults, and the sums of weights if ``divisors``, else None.

    Where states are walked through; not differentiable. The final ones are None unless
    ``settings.return_state``.
    """
    run = functools.partial(_run_normalized, settings, divisors)
    return _mapped(run)(arrays, ())


def normalized_gradients(
    settings: Settings, arrays: Arrays, out, divisors, cotangents: NormalizedResults
) -> Arrays:
    """The pull-back of ``normalized``, from what it has returned."""
    run = functools.partial(_run_normalized_backward, settings)
    return _mapped(run)(arrays, (out, divisors, cotangents))


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
    return chunk_sums(ones, ones, scale=1.0, least=0.0)[:, 0]


# -- Forward --------------------------------------------------------------------------


def _run_forward(settings, arrays, _):
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    start = _start(arrays, counts, tiles)
    settled = {"scale": settings.scale, "tiles": tiles}
    if config.walks(arrays.q.shape[-1]):
        out, last, _ = calls.outputs(
            *arrays[:3], counts, start, final=settings.return_state, **settled
        )
        return out, last
    chunk_states, last = calls.chunk_states(
        *arrays[1:3], counts, start, tiles, final=settings.return_state
    )
    return calls.chunk_outputs(*arrays[:3], chunk_states, counts, **settled), last


def _run_normalized(settings, divisors, arrays, _):
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    out, state, divisors = calls.outputs(
        *arrays[:3],
        counts,
        _start(arrays, counts, tiles),
        tiles,
        scale=settings.scale,
        final=settings.return_state,
        normalize=True,
        sums=_segment_sums(arrays, counts, tiles),
        divisors=divisors,
    )
    if not settings.return_state:
        return NormalizedResults(out, None, None), divisors
    starts = arrays.starts
    kept = None if starts is None else ~jnp.any(starts, axis=1, keepdims=True)
    last = _with_heads(normalizer.added(arrays.k, starts, arrays.k.shape[1]), arrays)
    last = normalizer.chained(arrays.sums, kept, last)[:, :, -1]
    return NormalizedResults(out, state, last), divisors


def _segment_sums(arrays, counts, tiles):
    """What normalizes at the starts of segments, [B, H, segments, 18, 16], or None."""
    segments = tiles.segments(arrays.v.shape[1])
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


def _start(arrays, counts, tiles) -> calls.Start:
    segments = tiles.segments(arrays.v.shape[1])
    if segments == 1:
        return calls.Start(arrays.state)
    added = calls.added_states(arrays.k, arrays.v, counts, tiles)
    return calls.Start(arrays.state, added, _since(_kept(counts, segments, tiles)))


def _kept(counts, segments, tiles, *, reverse=False):
    """Whether a state is left after each segment, bool [B, segments]; None: always.

    With ``reverse``, segments are numbered from the last on.
    """
    if counts is None:
        return None
    last = counts[:, CHUNK - 1 :: CHUNK]
    missing = segments * tiles.chunks_of_segment - last.shape[1]
    last = jnp.pad(last, [(0, 0), (0, missing)])
    kept = jnp.all(last.reshape(last.shape[0], segments, -1) == 0, axis=-1)
    return jnp.flip(kept, 1) if reverse else kept


def _since(kept):
    """Start.since of segments whose states are left after them, bool [B, segments]."""
    if kept is None:
        return None
    ended = jnp.where(kept, -1, jnp.arange(kept.shape[1], dtype=jnp.int32))
    before = jnp.pad(ended[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    return jax.lax.cummax(before, axis=1)


# -- Backward -------------------------------------------------------------------------


def _run_backward(settings, arrays, cotangents) -> Arrays:
    dout, dfinal = cotangents
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    if config.walks(arrays.q.shape[-1]):
        return _walk_back(settings, arrays, counts, dout, dfinal, tiles)
    settled = {"scale": settings.scale, "tiles": tiles}
    start = _start(arrays, counts, tiles)
    chunk_states, _ = calls.chunk_states(arrays.k, arrays.v, counts, start, tiles)
    chunk_dstates, dstate = calls.chunk_states(
        arrays.q,
        dout,
        counts,
        _start_in_reverse(settings, arrays, counts, dout, dfinal, tiles),
        reverse=True,
        final=arrays.state is not None,
        **settled,
    )
    dq, dk, dv = calls.gradients(
        *arrays[:3],
        dout,
        chunk_states,
        chunk_dstates,
        counts,
        **settled,
    )
    return Arrays(dq, dk, dv, dstate)


def _run_normalized_backward(settings, arrays, given) -> Arrays:
    out, divisors, cotangents = given
    tiles = _checked_tiles(settings, arrays)
    counts = _counts(arrays.starts)
    dout, changes = normalizer.divided_gradients(cotangents.out, out, divisors)
    dsums, dsum = _segment_sums_in_reverse(
        settings, arrays, counts, changes, cotangents.sums, tiles
    )
    slices = -(-arrays.v.shape[-1] // SLICE)
    missing = divisors.shape[2] - changes.shape[2]
    changes = jnp.pad(
        changes[:, :, None], [(0, 0), (0, 0), (0, slices - 1), (0, missing)]
    )
    gradients = _walk_back(
        settings,
        arrays,
        counts,
        dout,
        cotangents.state,
        tiles,
        calls.Divisors(changes, _segment_sums(arrays, counts, tiles)),
        calls.Divisors(changes, dsums),
    )
    return gradients._replace(sums=dsum)


def _walk_back(
    settings,
    arrays,
    counts,
    dout,
    dfinal,
    tiles,
    divisors=calls.NO_DIVISORS,
    divisors_in_reverse=calls.NO_DIVISORS,
) -> Arrays:
    """Gradients of all but the sums, from a walk through states and one back."""
    start = _start(arrays, counts, tiles)
    dstart = _start_in_reverse(settings, arrays, counts, dout, dfinal, tiles)
    walked = (*arrays[:3], dout, counts)
    settled = {"scale": settings.scale, "tiles": tiles}
    dq = calls.query_gradients(*walked, start, divisors=divisors, **settled)
    dk, dv, dstate = calls.key_gradients(
        *walked,
        dstart,
        divisors=divisors_in_reverse,
        final=arrays.state is not None,
        **settled,
    )
    return Arrays(dq, dk, dv, dstate)


def _segment_sums_in_reverse(settings, arrays, counts, changes, dfinal, tiles):
    """What sums' gradients are at the ends of segments, and before the first token.

    [B, H, segments, 18, 16], from the last on, and [B, H, F]; or None where they are
    zero, or nobody asks.
    """
    segments = tiles.segments(arrays.v.shape[1])
    wanted = arrays.sums is not None
    if segments == 1 and not wanted:
        if dfinal is None:
            return None, None
        sums = dfinal[:, :, None]
    else:
        tokens = tiles.chunks_of_segment * CHUNK
        added = normalizer.changed(
            arrays.q, changes, arrays.starts, tokens, settings.scale
        )
        kept = _kept(counts, segments, tiles, reverse=True)
        sums = normalizer.chained(dfinal, kept, jnp.flip(added, 2))
        sums, last = sums[:, :, :-1], sums[:, :, -1]
    dim = arrays.q.shape[-1]
    return normalizer.gradient_to_kernel(sums, dim), last if wanted else None


def _start_in_reverse(settings, arrays, counts, dout, dfinal, tiles) -> calls.Start:
    """Gradients of states, from the end to the start."""
    segments = tiles.segments(arrays.v.shape[1])
    if segments == 1:
        return calls.Start(dfinal)
    added = calls.added_states(
        arrays.q, dout, counts, tiles, scale=settings.scale, reverse=True
    )
    kept = _kept(counts, segments, tiles, reverse=True)
    return calls.Start(dfinal, added, _since(kept))
