"""A differentiable scan of linear attention, composed of the kernels.

For each head, with a state S of V x K numbers::

    S[t]   = exp(log_decay[t]) S[t - 1] + w[t] v[t] k[t]^T
    out[t] = scale S[t] q[t] + skip * v[t]

where w is 1. Of state-space models, instead::

    w[t]         = clip(softplus(raw_steps[t] + biases), least, most)
    log_decay[t] = rates w[t]

The backward pass keeps nothing but the arguments: it computes the states at the starts
of chunks again, then their gradients from the end to the start, and from both all other
gradients chunk by chunk. Where there are few heads, a sequence is cut into segments: a
first pass finds what each adds to the state, a scan of those where each starts, and a
second pass, as the only one otherwise, goes through all of them side by side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tk_jax.ops.linear_attention import calls, config

_LOG2_E = math.log2(math.e)


class Arrays(NamedTuple):
    """The arrays of a scan; of q, k and v, K and V are multiples of 8.

    All others may be None. Raw steps come with rates and without decays; skip comes
    with raw steps.
    """

    q: jax.Array  # [B, T, G, K]
    k: jax.Array  # [B, T, G, K]
    v: jax.Array  # [B, T, H, V]
    log_decay: jax.Array | None = None  # float32 [B, T, H] or [H]
    raw_steps: jax.Array | None = None  # [B, T, H], in one of config.STEP_DTYPES
    rates: jax.Array | None = None  # float32 [H]
    biases: jax.Array | None = None  # float32 [H]
    skip: jax.Array | None = None  # float32 [H, V], or [H, 1] for all columns
    state: jax.Array | None = None  # float32 [B, H, V, K]: before the first token
    starts: jax.Array | None = None  # bool [B, T]: a document starts, with no state


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a scan."""

    op: str  # for errors
    scale: float
    return_state: bool
    steps: config.StepOptions | None = None  # with raw steps
    tiles: config.ScanConfig | None = None  # for tuning


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(settings: Settings, arrays: Arrays):
    """Returns out [B, T, H, V] and the final state [B, H, V, K].

    The state is None unless ``settings.return_state``.
    """
    return _forward(settings, arrays)


def _scan_fwd(settings, arrays):
    return _forward(settings, arrays), arrays


def _scan_bwd(settings, arrays, cotangents):
    dout, dfinal = cotangents
    run = _mapped(functools.partial(_run_backward, settings), _GRADIENT_HEADS)
    gradients = run(_with_shared_axes(arrays), (dout, dfinal))
    dgates, dskip = gradients.log_decay, gradients.skip
    if arrays.log_decay is not None:
        dgates = jnp.where(arrays.log_decay < config.LEAST_LOG_DECAY, 0, dgates)
        if arrays.log_decay.ndim == 1:
            dgates = jnp.sum(dgates, axis=(0, 1))
    gradients = gradients._replace(log_decay=dgates)
    if arrays.raw_steps is None:
        return (gradients,)
    is_summed = arrays.skip is not None and dskip is None
    drates, dbiases, summed = calls.head_sums(
        gradients.rates, biases=arrays.biases is not None, skip=is_summed
    )
    if is_summed:
        dskip = summed[:, None]
    elif dskip is not None:
        dskip = jnp.sum(dskip, axis=0)
    return (gradients._replace(rates=drates, biases=dbiases, skip=dskip),)


scan.defvjp(_scan_fwd, _scan_bwd)


def _forward(settings, arrays):
    run = _mapped(functools.partial(_run_forward, settings), (2, 1))
    return run(_with_shared_axes(arrays), ())


def _with_shared_axes(arrays):
    """What tokens or elements of the batch share gets axes of size 1 for them.

    A decay [H] becomes [1, 1, H]; rates and biases [H] become [1, H].
    """
    log_decay, rates, biases = arrays.log_decay, arrays.rates, arrays.biases
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None, None]
    return arrays._replace(
        log_decay=log_decay,
        rates=None if rates is None else rates[None],
        biases=None if biases is None else biases[None],
    )


# -- Under vmap -----------------------------------------------------------------------

# Where heads are, in the arguments and in their gradients before those are summed: one
# array has those of rates, of biases and, where all columns share it, of skip then.
_HEADS = Arrays(
    q=2,
    k=2,
    v=2,
    log_decay=2,
    raw_steps=2,
    rates=1,
    biases=1,
    skip=0,
    state=1,
    starts=None,
)
_GRADIENT_HEADS = _HEADS._replace(rates=3, biases=None, skip=1)
_COTANGENT_HEADS = (2, 1)


def _mapped(run, result_heads):
    """``run(arrays, cotangents)``, under vmap as one call of a larger batch.

    ``result_heads`` are the axes of heads in its results, whose first axis is that of
    the batch.
    """
    mapped = custom_vmap(run)

    @mapped.def_vmap
    def add_axis(axis_size, in_batched, arrays, cotangents):
        batched, cotangents_batched = in_batched

        def whole(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

        cotangents = jax.tree.map(whole, cotangents, cotangents_batched)
        if arrays.skip is None or not batched.skip:
            results = _over_batches(mapped, axis_size, batched, arrays, cotangents)
        elif arrays.starts is None or not batched.starts:
            arrays = jax.tree.map(
                whole, arrays._replace(starts=None), batched._replace(starts=None)
            )._replace(starts=arrays.starts)
            results = _over_heads(mapped, axis_size, arrays, cotangents, result_heads)
        else:
            # A skip for each element and documents for each: no axis has both.
            arrays = jax.tree.map(whole, arrays, batched)
            results = lax.map(lambda given: mapped(*given), (arrays, cotangents))
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def _over_batches(run, size, batched, arrays, cotangents):
    """The mapped axis becomes a part of the batch's."""
    batch = arrays.q.shape[0 + batched.q]
    shared = ("log_decay", "rates", "biases")

    def fold(x):
        return x.reshape(size * batch, *x.shape[2:])

    def whole(name, x):
        is_batched = getattr(batched, name)
        if name == "skip" or (name in shared and x.shape[0 + is_batched] == 1):
            if not is_batched:
                return x  # for all elements of the batch
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        elif not is_batched:
            x = jnp.broadcast_to(x, (size, *x.shape))
        return fold(x)

    arrays = Arrays(
        *(None if x is None else whole(name, x) for name, x in arrays._asdict().items())
    )
    results = run(arrays, jax.tree.map(fold, cotangents))
    return jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), results)


def _over_heads(run, size, arrays, cotangents, result_heads):
    """The mapped axis becomes a part of the heads', at the cost of a copy."""

    def fold(x, axis):
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def unfold(x, axis):
        x = x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def each(function, arrays, axes):
        items = (
            x if x is None or axis is None else function(x, axis)
            for x, axis in zip(arrays, axes, strict=False)
        )
        return type(arrays)(*items) if hasattr(arrays, "_fields") else tuple(items)

    results = run(each(fold, arrays, _HEADS), each(fold, cotangents, _COTANGENT_HEADS))
    return each(unfold, results, result_heads)


# -- Forward --------------------------------------------------------------------------


def _run_forward(settings, arrays, _):
    tiles = _checked_tiles(settings, arrays)
    gates, skip = _gates(settings, arrays)
    out, final = calls.outputs(
        *arrays[:3],
        gates,
        skip,
        _segment_starts(arrays.state, arrays.k, arrays.v, gates, tiles),
        tiles,
        scale=settings.scale,
        final=settings.return_state,
    )
    return out, final if settings.return_state else None


def _checked_tiles(settings, arrays) -> config.ScanConfig:
    q, v = arrays.q, arrays.v
    # Again, because vmap may have made the batch larger than the caller's.
    if lacking := config.unsupported(q, v):
        raise NotImplementedError(
            f"{settings.op}: the TK kernel does not support {lacking}; "
            "map over fewer elements at a time or use implementation='xla'"
        )
    return settings.tiles or config.scan_config(
        *q.shape[:3], v.shape[2], q.shape[3], v.shape[3]
    )


def _gates(settings, arrays) -> tuple[calls.Gates, jax.Array | None]:
    """Gates, and skip as whole slices of columns."""
    v = arrays.v
    skip = arrays.skip
    if arrays.raw_steps is not None:
        is_shared = skip is not None and skip.shape[1] == 1
        gates, columns = calls.step_gates(
            _steps(arrays),
            skip[:, 0] if is_shared else None,
            config.round_up(v.shape[3], config.SLICE),
            settings.steps,
        )
        skip = columns if is_shared else calls.padded_columns(skip)
    elif arrays.log_decay is not None:
        least = config.LEAST_LOG_DECAY
        sums = calls.chunk_sums(arrays.log_decay, v, scale=_LOG2_E, least=least)
        gates = calls.Gates(sums)
    else:
        batch, seqlen, num_heads = v.shape[:3]
        shape = (batch, num_heads, config.padded_tokens(seqlen))
        gates = calls.Gates(jnp.zeros(shape, jnp.float32))
    if arrays.starts is not None:
        ones = arrays.starts.astype(jnp.float32)[..., None]
        counts = calls.chunk_sums(ones, ones, scale=1.0, least=0.0)
        gates = gates._replace(counts=counts[:, 0])
    return gates, skip


def _steps(arrays) -> calls.Steps:
    return calls.Steps(arrays.raw_steps, arrays.rates, arrays.biases)


def _segment_starts(first, keys, values, gates, tiles, **direction):
    """The states that segments start with, [B, H, segments, V, K]; None for zeros."""
    if tiles.chunks_of_segment * config.CHUNK >= gates.sums.shape[-1]:
        return None if first is None else first[:, :, None]
    added, kept = calls.segment_sums(keys, values, gates, tiles, **direction)
    return calls.segment_starts(first, kept, added)


# -- Backward -------------------------------------------------------------------------


def _run_backward(settings, arrays, cotangents) -> Arrays:
    """Gradients; of log_decay as [B, T, H], of skip as [B, H, V].

    In place of those of rates, and of biases and a skip that all columns share, is what
    ``calls.head_sums`` takes.
    """
    dout, dfinal = cotangents
    tiles = _checked_tiles(settings, arrays)
    gates, skip = _gates(settings, arrays)
    pair_states, _ = calls.states(
        arrays.k,
        arrays.v,
        gates,
        _segment_starts(arrays.state, arrays.k, arrays.v, gates, tiles),
        tiles,
        stored_every=config.PAIR,
        final=False,
    )
    pair_dstates, dstate = _state_gradients(
        settings, arrays, gates, dout, dfinal, tiles
    )
    found = calls.gradients(
        *arrays[:3],
        dout,
        pair_states,
        pair_dstates,
        gates,
        skip,
        tiles,
        scale=settings.scale,
    )
    gradients = Arrays(found.dq, found.dk, found.dv, state=dstate)
    if arrays.log_decay is not None:
        dgates = calls.gate_gradients(found.gate_parts, arrays.v)
        return gradients._replace(log_decay=dgates)
    if arrays.raw_steps is None:
        return gradients
    is_shared = skip is not None and arrays.skip.shape[1] == 1
    draw, head_parts = calls.step_gradients(
        _steps(arrays),
        found.gate_parts,
        found.dweights,
        found.dskip if is_shared else None,
        settings.steps,
    )
    dskip = None
    if skip is not None and not is_shared:
        dskip = jnp.sum(found.dskip, axis=2)[..., : arrays.skip.shape[1]]
    return gradients._replace(raw_steps=draw, rates=head_parts, skip=dskip)


def _state_gradients(settings, arrays, gates, dout, dfinal, tiles):
    """Gradients of the states after pairs of chunks, and of the initial state."""
    walk = (arrays.q, dout, gates._replace(weights=None))
    how = {"scale": settings.scale, "reverse": True}
    dstates, dstate = calls.states(
        *walk,
        _segment_starts(dfinal, *walk, tiles, **how),
        tiles,
        stored_every=config.PAIR,
        final=arrays.state is not None,
        **how,
    )
    return dstates, None if arrays.state is None else dstate
