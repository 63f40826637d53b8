"""A differentiable Hedgehog attention, composed of the kernels.

Windows are chunks of 64 tokens from the first one on. The forward pass is one kernel;
where there are few heads, a sequence is cut into segments, and another one finds first
what each adds to the sums for those after it.

The backward pass takes four steps, between which arrays are in memory: the sums before
each chunk, from k and v; all that depends on a chunk's queries; the gradients of the
sums, back from the end, from phi(q) over the divisors and dout; and the gradients of a
chunk's keys and values. The gradients of the maps are products over all tokens of what
the two kernels of gradients leave behind: linear attention's sums of segments.

With packed documents, tiles are what chunks are otherwise (``documents.py``). The sums
of both directions come from a kernel of tiles, which chunks are too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tk_jax.ops.hedgehog_attention import calls, config, documents
from tk_jax.ops.linear_attention import calls as linear_calls
from tk_jax.ops.linear_attention import config as linear_config


class Arrays(NamedTuple):
    """The arrays of a call; the last four may be None. D and V are multiples of 8."""

    q: jax.Array  # [B, T, H, D]
    k: jax.Array  # [B, T, K, D]
    v: jax.Array  # [B, T, K, V]
    q_map: jax.Array  # [H, D, F], in the dtype of q
    k_map: jax.Array  # [K, D, F], in the dtype of q
    alpha: jax.Array  # float32 [H]
    beta: jax.Array  # float32 [H]
    sums: jax.Array | None = None  # float32 [B, K, V, 2 F]: before the first token
    normalizer: jax.Array | None = None  # float32 [B, K, 2 F]
    first: jax.Array | None = None  # int32 [B]: the first token that is one
    # int32 [B, T]: tokens of its document before each, where several are packed
    positions: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a call."""

    scale: float
    chunks_of_segment: int | None = None  # for tuning


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, arrays: Arrays):
    """Returns out [B, T, H, V]."""
    (out,) = _mapped(functools.partial(_run_forward, settings), (2,))(arrays, ())
    return out


def _attend_fwd(settings, arrays):
    return attend(settings, arrays), arrays


def _attend_bwd(settings, arrays, dout):
    run = _mapped(functools.partial(_run_backward, settings), _GRADIENT_HEADS)
    gradients = run(arrays, (dout,))
    over_batch = (
        jnp.sum(getattr(gradients, name), axis=0)
        for name in ("q_map", "k_map", "alpha", "beta")
    )
    q_map, k_map, alpha, beta = over_batch
    return (
        gradients._replace(
            q_map=q_map.astype(arrays.q_map.dtype),
            k_map=k_map.astype(arrays.k_map.dtype),
            alpha=alpha,
            beta=beta,
        ),
    )


attend.defvjp(_attend_fwd, _attend_bwd)


# -- Under vmap -----------------------------------------------------------------------

# What each head has for itself, for all elements of the batch alike.
_SHARED = ("q_map", "k_map", "alpha", "beta")
# What all heads have together, for each element of the batch.
_PLACES = ("first", "positions")
# Where heads are: in the arguments, and in gradients that are not summed yet.
_HEADS = Arrays(2, 2, 2, 0, 0, 0, 0, 1, 1, None, None)
_GRADIENT_HEADS = Arrays(2, 2, 2, 1, 1, 1, 1, 1, 1, None, None)
_COTANGENT_HEADS = (2,)


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
        if not any(getattr(batched, name) for name in _SHARED):
            results = _over_batches(mapped, axis_size, batched, arrays, cotangents)
        elif not any(getattr(batched, name) for name in _PLACES):
            places = {name: getattr(arrays, name) for name in _PLACES}
            none = dict.fromkeys(_PLACES)
            everything = jax.tree.map(
                whole, arrays._replace(**none), batched._replace(**none)
            )
            everything = everything._replace(**places)
            results = _over_heads(
                mapped, axis_size, everything, cotangents, result_heads
            )
        else:
            # Maps of each element and first tokens of each: no axis has both.
            arrays = jax.tree.map(whole, arrays, batched)
            results = lax.map(lambda given: mapped(*given), (arrays, cotangents))
        return results, jax.tree.map(lambda _: True, results)

    return mapped


def _over_batches(run, size, batched, arrays, cotangents):
    """The mapped axis becomes a part of the batch's."""
    batch = arrays.q.shape[0 + batched.q]

    def fold(x):
        return x.reshape(size * batch, *x.shape[2:])

    def whole(name, x):
        if x is None or name in _SHARED:
            return x
        if not getattr(batched, name):
            x = jnp.broadcast_to(x, (size, *x.shape))
        return fold(x)

    arrays = Arrays(*(whole(name, x) for name, x in arrays._asdict().items()))
    results = run(arrays, jax.tree.map(fold, cotangents))
    return jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), results)


def _over_heads(run, size, arrays, cotangents, result_heads):
    """The mapped axis becomes a part of the heads', at the cost of a copy."""

    def fold(x, axis):
        x = jnp.moveaxis(x, 0, axis)
        heads = size * x.shape[axis + 1]
        return x.reshape(*x.shape[:axis], heads, *x.shape[axis + 2 :])

    def unfold(x, axis):
        heads = x.shape[axis] // size
        x = x.reshape(*x.shape[:axis], size, heads, *x.shape[axis + 1 :])
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
    batch, seqlen, num_heads, _ = arrays.q.shape
    # Again, because vmap may have made the call larger than the caller's.
    if lacking := config.exceeded_limit(batch, seqlen, num_heads):
        raise NotImplementedError(
            f"hedgehog_attention: the TK kernel does not support {lacking}; "
            "map over fewer elements at a time or use implementation='xla'"
        )
    of_segment = settings.chunks_of_segment or config.chunks_of_segment(
        batch, seqlen, num_heads
    )
    of_segment = min(of_segment, -(-seqlen // config.CHUNK))
    if arrays.positions is not None:
        return (_run_documents_forward(settings, arrays, of_segment),)
    start, states_of_segment = _states_of_segments(arrays, of_segment)
    out = calls.outputs(
        *arrays[:7],
        arrays.first,
        start,
        scale=settings.scale,
        chunks_of_segment=of_segment,
        states_of_segment=states_of_segment,
    )
    return (out,)


def _run_documents_forward(settings, arrays, of_segment):
    tiles = documents.find_tiles(arrays.positions)
    segments = -(-arrays.k.shape[1] // config.CHUNK // of_segment)
    pieces = 1
    if segments > 1:
        pieces = config.pieces_of_segment(*arrays.k.shape[:3], of_segment)
    return calls.outputs(
        *arrays[:7],
        arrays.first,
        documents.starts_of_segments(arrays, tiles, segments, pieces),
        scale=settings.scale,
        chunks_of_segment=pieces,
        documents=tiles.documents,
        shares=segments * pieces,
    )


def _states_of_segments(arrays, of_segment):
    """Sums and normalizers that segments begin with, and how many of each segment.

    Those before the first token, if they are given, and what each piece of a segment
    adds; None for zeros.
    """
    start = (arrays.sums, arrays.normalizer)
    start = tuple(None if x is None else x[:, :, None] for x in start)
    segments = -(-arrays.k.shape[1] // config.CHUNK // of_segment)
    if segments <= 1:
        return start, 0
    pieces = config.pieces_of_segment(*arrays.k.shape[:3], of_segment)
    added = calls.sums(
        arrays.k,
        arrays.v,
        arrays.k_map,
        arrays.first,
        chunks_of_segment=of_segment // pieces,
        segments=pieces * (segments - 1),
    )
    if arrays.sums is not None:
        both = zip(start, added, strict=True)
        added = tuple(jnp.concatenate(x, axis=2) for x in both)
    return added, pieces


def _segment_starts(arrays, of_segment):
    """The same, added up: a state for each segment."""
    states, pieces = _states_of_segments(arrays, of_segment)
    if pieces == 0:
        return states

    def chained(x):
        first, added = None, x
        if arrays.sums is not None:
            first, added = x[:, :, 0], x[:, :, 1:]
        shape = (*added.shape[:2], -1, pieces, *added.shape[3:])
        return documents.chained(first, None, added.reshape(shape).sum(3))

    return tuple(map(chained, states))


# -- Backward -------------------------------------------------------------------------


def _run_backward(settings, arrays, cotangents) -> Arrays:
    """Gradients; of maps, alpha and beta for each element of the batch."""
    (dout,) = cotangents
    num_heads, num_kv_heads = arrays.q.shape[2], arrays.k.shape[2]
    packed = tiles = None
    if arrays.positions is None:
        walked = documents.of_chunks(*arrays.k.shape[:2])
        start = _segment_starts(arrays, config.chunks_of_segment(*arrays.k.shape[:3]))
        states, normalizers = documents.stored_states(arrays, walked, start)
    else:
        walked = tiles = documents.find_tiles(arrays.positions)
        packed = tiles.documents
        states, normalizers = documents.states(arrays, tiles)
    found = calls.queries(
        *arrays[:3],
        dout,
        arrays.q_map,
        states,
        normalizers,
        arrays.alpha,
        arrays.beta,
        arrays.first,
        settings.scale,
        packed,
    )
    (dstates, dnormalizers), (dsums, dnormalizer) = documents.state_gradients(
        arrays, walked, found.features, found.delta, dout
    )

    def over_group(x):
        if num_heads == num_kv_heads:
            return x
        group = num_heads // num_kv_heads
        wide = x.reshape(x.shape[0], num_kv_heads, group, *x.shape[2:])
        return jnp.sum(wide, axis=2, dtype=jnp.float32).astype(x.dtype)

    dk, dv, dscores = calls.keys(
        *arrays[:3],
        dout,
        arrays.k_map,
        over_group(dstates),
        over_group(dnormalizers),
        found,
        arrays.beta,
        arrays.first,
        settings.scale,
        packed,
    )

    def over_tokens(x):
        if tiles is None:
            x = x[..., : arrays.q.shape[1]]
        else:
            x = documents.of_tokens(tiles, x)
        return jnp.sum(x, axis=-1)

    return Arrays(
        q=found.dq,
        k=dk,
        v=dv,
        q_map=_map_gradient(arrays.q, found.dscores),
        k_map=_map_gradient(arrays.k, dscores),
        alpha=over_tokens(found.dalpha),
        beta=over_tokens(found.dbeta),
        sums=None if arrays.sums is None else over_group(dsums),
        normalizer=None if arrays.sums is None else over_group(dnormalizer),
        first=None,
    )


def _map_gradient(tokens, dscores):
    """The sum of tokens^T dscores over all tokens, float32 [B, heads, D, F].

    Linear attention's sums of segments are computed from rows as they are; XLA's
    product would transpose both operands before.
    """
    batch, seqlen, heads, dim = tokens.shape
    tiles = linear_config.scan_config(batch, seqlen, heads, heads, config.MAP, dim)
    no_decay = jnp.zeros((batch, heads, config.padded_tokens(seqlen)), jnp.float32)
    sums, _ = linear_calls.segment_sums(
        dscores, tokens, linear_calls.Gates(no_decay), tiles, of_all=True
    )
    return jnp.sum(sums, axis=2)
