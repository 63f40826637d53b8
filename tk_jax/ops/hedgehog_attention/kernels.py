"""A differentiable Hedgehog attention, composed of the kernels.

Windows are chunks of 64 tokens from the first one on. The forward pass is one kernel;
where there are few heads, a sequence is cut into segments, and another one finds first
what each adds to the sums for those after it.

The backward pass takes four steps, between which arrays are in memory: the sums before
each chunk (linear attention's kernel of states, from phi(k)); all that depends on a
chunk's queries; the gradients of the sums, back from the end (the same kernel, from
phi(q) over the divisors and dout); and the gradients of a chunk's keys and values. The
gradients of the maps are products over all tokens of what the two kernels of gradients
leave behind, and XLA's.

With packed documents, tiles are what chunks are otherwise (``documents.py``), and the
sums of both directions come from a kernel of their own.
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
from tk_jax.ops.linear_attention import scan


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
    out = calls.outputs(
        *arrays[:7],
        arrays.first,
        _segment_starts(arrays, of_segment),
        scale=settings.scale,
        chunks_of_segment=of_segment,
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


def _segment_starts(arrays, of_segment):
    """Sums and normalizer that segments start with; None for zeros."""
    given = (arrays.sums, arrays.normalizer)
    if -(-arrays.k.shape[1] // config.CHUNK) <= of_segment:
        return tuple(None if x is None else x[:, :, None] for x in given)
    segments = -(-arrays.k.shape[1] // config.CHUNK // of_segment)
    pieces = config.pieces_of_segment(*arrays.k.shape[:3], of_segment)
    added = calls.sums(
        arrays.k,
        arrays.v,
        arrays.k_map,
        arrays.first,
        chunks_of_segment=of_segment // pieces,
        segments=pieces * (segments - 1),
    )

    def chained(first, added):
        shape = (*added.shape[:2], segments - 1, pieces, *added.shape[3:])
        added = added.reshape(shape).sum(3)
        first = jnp.zeros_like(added[:, :, :1]) if first is None else first[:, :, None]
        return jnp.cumsum(jnp.concatenate([first, added], axis=2), axis=2)

    return tuple(map(chained, given, added))


# -- Backward -------------------------------------------------------------------------


def _run_backward(settings, arrays, cotangents) -> Arrays:
    """Gradients; of maps, alpha and beta for each element of the batch."""
    (dout,) = cotangents
    num_heads, num_kv_heads = arrays.q.shape[2], arrays.k.shape[2]
    packed = tiles = None
    if arrays.positions is None:
        phi_k = _key_features(arrays)
        states = _chunk_states(arrays, phi_k.astype(arrays.k.dtype))
        normalizers = _before_chunks(arrays, phi_k)
    else:
        tiles = documents.find_tiles(arrays.positions)
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
    if tiles is None:
        dstates, dsums = _chunk_state_gradients(arrays, found.features, dout)
        dnormalizers, dnormalizer = _normalizer_gradients(found.features, found.delta)
    else:
        (dstates, dnormalizers), (dsums, dnormalizer) = documents.state_gradients(
            arrays, tiles, found.features, found.delta, dout
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

    of_map = functools.partial(_wide_product, "bthd,bthf->bhdf")
    return Arrays(
        q=found.dq,
        k=dk,
        v=dv,
        q_map=of_map(arrays.q, found.dscores),
        k_map=of_map(arrays.k, dscores),
        alpha=over_tokens(found.dalpha),
        beta=over_tokens(found.dbeta),
        sums=None if arrays.sums is None else over_group(dsums),
        normalizer=None if arrays.sums is None else over_group(dnormalizer),
        first=None,
    )


def _key_features(arrays):
    """phi(k), float32 [B, T, K, 2 F]; zero for what is no token."""
    scores = _wide_product("bthd,hdf->bthf", arrays.k, arrays.k_map)
    phi = jnp.concatenate([jax.nn.softmax(scores), jax.nn.softmax(-scores)], axis=-1)
    if arrays.first is None:
        return phi
    is_token = jnp.arange(phi.shape[1]) >= arrays.first[:, None]
    return jnp.where(is_token[..., None, None], phi, 0)


def _wide_product(equation, a, b):
    """Of 16-bit numbers, in float32; XLA's CPU has no such product of batches."""

    def widened(a, b):
        a, b = (x.astype(jnp.float32) for x in (a, b))
        return jnp.einsum(equation, a, b, precision="highest")

    def mixed(a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    return lax.platform_dependent(a, b, cpu=widened, default=mixed)


def _linear(q, k, v, state=None):
    """A linear attention without decay, its gates, and its kernels' tiles."""
    batch, seqlen, num_heads, value_dim = v.shape
    arrays = scan.Arrays(q, k, v, state=state)
    zeros = jnp.zeros((batch, num_heads, config.padded_tokens(seqlen)), jnp.float32)
    tiles = linear_config.scan_config(
        batch, seqlen, k.shape[2], num_heads, k.shape[3], value_dim
    )
    return arrays, linear_calls.Gates(zeros), tiles


def _chunk_states(arrays, phi_k):
    """The sums at the starts of chunks, [B, K, chunks, padded V, 2 F]."""
    linear, gates, tiles = _linear(phi_k, phi_k, arrays.v, arrays.sums)
    start = scan.segment_starts(linear, gates, tiles)
    states, _ = linear_calls.states(
        phi_k, arrays.v, gates, start, tiles, stored_every=1, ends=False
    )
    return states


def _chunk_state_gradients(arrays, features, dout):
    """Gradients of the sums at the ends of chunks, and before the first."""
    state = None
    if arrays.sums is not None:
        # Only whether there is one matters here.
        shape = (dout.shape[0], dout.shape[2], *arrays.sums.shape[2:])
        state = jnp.zeros(shape, jnp.float32)
    linear, gates, tiles = _linear(features, features, dout, state)
    settings = scan.Settings("hedgehog_attention", 1.0, False)
    return scan.state_gradients(settings, linear, gates, dout, None, tiles, 1)


def _before_chunks(arrays, phi_k):
    """The sums of features at the starts of chunks, [B, K, chunks, 2 F]."""
    added = _sums_of_chunks(phi_k)
    first = jnp.zeros_like(added[:, :, 0])
    if arrays.normalizer is not None:
        first = first + arrays.normalizer
    added = jnp.concatenate([first[:, :, None], added[:, :, :-1]], axis=2)
    return jnp.cumsum(added, axis=2)


def _normalizer_gradients(features, delta):
    """The same of the gradients: at the ends of chunks, and before the first."""
    delta = jnp.swapaxes(delta, 1, 2)[:, : features.shape[1], :, None]
    added = _sums_of_chunks(-features.astype(jnp.float32) * delta)
    upto = lax.cumsum(added, axis=2, reverse=True)
    after = jnp.concatenate([upto[:, :, 1:], jnp.zeros_like(upto[:, :, :1])], axis=2)
    return after, upto[:, :, 0]


def _sums_of_chunks(x):
    """[B, T, H, F] -> float32 [B, H, chunks, F]"""
    batch, seqlen, heads, columns = x.shape
    missing = config.padded_tokens(seqlen) - seqlen
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    x = x.reshape(batch, x.shape[1] // config.CHUNK, config.CHUNK, heads, columns)
    return jnp.moveaxis(jnp.sum(x, axis=2, dtype=jnp.float32), 2, 1)
