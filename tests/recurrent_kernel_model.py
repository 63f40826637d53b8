"""What linear attention's kernels compute, in XLA operations.

As the kernels, in their precision: operands of products are rounded to the dtype of the
inputs, and summed in float32; gates and states are float32. So it stands for plain XLA
in low precision where errors are compared, and for the kernels where only what is made
of them is tested.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tk_jax.ops.linear_attention.config import StatesOptions
from tk_jax.ops.ssd.config import SsdOptions
from tk_jax.ops.ssd.xla import step_sizes

CHUNK, SLICE, PAIR, MARKED_ROWS = 64, 64, 2, 16


def call(
    target,
    out_types,
    *arrays,
    options=None,
    config=None,
    in_place=None,
    vmap_method=None,
):
    """In place of ``tk_jax._ffi.call``; nothing is in place."""
    name = target.removeprefix("tk_linear_attention_").removesuffix("_v1")
    arrays = [None if x.size == 0 else x for x in arrays]
    results = MODELS[name](arrays, out_types, options, config)
    assert len(results) == len(out_types)
    return tuple(
        jnp.zeros(kind.shape, kind.dtype)
        if result is None
        else result.astype(kind.dtype).reshape(kind.shape)
        for result, kind in zip(results, out_types, strict=True)
    )


def _in_chunks(x, axis=1):
    """[.., T, ..] -> [.., chunks, CHUNK, ..], padded with zeros"""
    missing = -x.shape[axis] % CHUNK
    x = jnp.pad(x, [(0, missing) if i == axis else (0, 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, CHUNK, *x.shape[axis + 1 :])


def _tokens(x, heads):
    """[B, T, G, D] -> float32 [B, H, chunks, CHUNK, D]"""
    x = jnp.repeat(x, heads // x.shape[2], axis=2).astype(jnp.float32)
    return _in_chunks(jnp.swapaxes(x, 1, 2), 2)


def _as_tokens(x, like):
    """Back again, summed over the heads of a group."""
    batch, heads, *_, dim = x.shape
    seqlen, groups = like.shape[1:3]
    x = jnp.swapaxes(x.reshape(batch, heads, -1, dim)[:, :, :seqlen], 1, 2)
    return x.reshape(batch, seqlen, groups, -1, dim).sum(3)


def _gates(sums, weights, counts):
    """before [.., C], after [.., C], total [..], within [.., C, C]; without weights."""
    sums = _in_chunks(sums, 2)
    counts = jnp.zeros_like(sums) if counts is None else _in_chunks(counts, 1)[:, None]
    order = jnp.arange(CHUNK)
    seen = (order[:, None] >= order) & (counts[..., :, None] == counts[..., None, :])
    differences = jnp.where(seen, sums[..., :, None] - sums[..., None, :], -jnp.inf)
    before = jnp.where(counts == 0, jnp.exp2(sums), 0)
    last = counts[..., -1:]
    after = jnp.where(counts == last, jnp.exp2(sums[..., -1:] - sums), 0)
    weights = jnp.ones_like(sums) if weights is None else _in_chunks(weights, 2)
    return before, after, before[..., -1], jnp.exp2(differences), weights


def _product(dtype, equation, *arrays):
    """Of operands rounded to ``dtype``."""
    arrays = (x.astype(dtype).astype(jnp.float32) for x in arrays)
    return jnp.einsum(equation, *arrays, precision="highest")


def _chunk_sums(arrays, out_types, options, _):
    (x,) = arrays
    batch, heads, _ = out_types[0].shape
    x = jnp.where(x < options.least, options.least, x) * options.scale
    x = jnp.broadcast_to(x, (batch, options.seqlen, heads))
    sums = jnp.cumsum(_in_chunks(x), axis=2)
    return (jnp.moveaxis(sums, 3, 1),)


def _steps(raw, rates, biases, options):
    """Steps and the logarithms of decays, as XLA has them."""
    sizes = SsdOptions(options.softplus, options.least, options.most)
    biases = None if biases is None else biases[:, None]
    steps = step_sizes(sizes, raw, biases, jnp.float32)
    decays = steps * rates[:, None]
    return steps, jnp.where(
        decays < options.least_log_decay, options.least_log_decay, decays
    )


def _step_gates(arrays, out_types, options, _):
    *steps, skip = arrays
    weights, decays = _steps(*steps, options)
    sums = jnp.cumsum(_in_chunks(decays * np.log2(np.e)), axis=2)
    if skip is not None:
        skip = jnp.broadcast_to(skip[:, None], out_types[2].shape)
    gates = (jnp.moveaxis(x, 3, 1) for x in (sums, _in_chunks(weights)))
    return *gates, skip


def _step_gradients(arrays, out_types, options, _):
    raw, rates, biases, *parts, dweights, dskip = arrays
    batch, seqlen, heads = raw.shape
    dgates, dweights = (jnp.swapaxes(x, 1, 2)[:, :seqlen] for x in (parts[0], dweights))
    rates = jnp.broadcast_to(rates, (batch, heads))
    biases = jnp.zeros_like(rates) if biases is None else biases
    biases = jnp.broadcast_to(biases, (batch, heads))
    run = functools.partial(_steps, options=options)
    _, pull_back = jax.vjp(run, raw, rates, biases)
    draw, drates, dbiases = pull_back((dweights, dgates))
    if dskip is None:
        dskip = jnp.zeros((batch, heads, 1, 1))
    sums = jnp.stack([drates, dbiases, dskip.sum((2, 3))], axis=1)
    # Of the chunks, all in the first one.
    head_parts = jnp.zeros(out_types[1].shape).at[:, 0].set(sums)
    return draw, head_parts


def _head_sums(arrays, out_types, *_):
    sums = arrays[0].sum(0)
    return tuple(
        x if kind.size else None for x, kind in zip(sums, out_types, strict=True)
    )


def _segment_sums(arrays, out_types, options, config):
    _, ends = _all_states((*arrays, None), options)
    _, _, sums, weights, counts = arrays
    totals = _gates(sums, weights, counts)[2]
    kept = [jnp.prod(totals[:, :, x], -1) for x in _segments(totals.shape[2], options)]
    kept = jnp.stack(kept, 2)
    return (ends, kept) if options.of_all else (ends[:, :, :-1], kept[:, :, :-1])


def _segment_starts(arrays, out_types, *_):
    first, kept, added = arrays
    starts = [jnp.zeros_like(added[:, :, 0]) if first is None else first]
    for segment in range(added.shape[2]):
        left = kept[:, :, segment, None, None] * starts[-1]
        starts.append(left + added[:, :, segment])
    return (jnp.stack(starts, 2),)


def _spread(arrays, out_types, *_):
    """Nothing is left to do: sums of segments have left nothing out."""
    _, _, ends, results = arrays
    return ends, results


def _marks(ends):
    """1 where not all of 16 rows of an end are finite."""
    ends = jnp.pad(ends, [(0, 0)] * 3 + [(0, -ends.shape[3] % SLICE), (0, 0)])
    groups = ends.reshape(*ends.shape[:3], -1, MARKED_ROWS * ends.shape[4])
    return 1 - jnp.isfinite(groups).all(-1).astype(jnp.float32)


def _states(arrays, out_types, options, config):
    stored, ends = _all_states(arrays, options)
    # Of each run, what is before its first chunk, or after its last.
    every = options.stored_every
    first = min(every, stored.shape[2]) - 1 if options.reverse else 0
    places = jnp.arange(first, stored.shape[2] + first, every)
    stored = stored[:, :, jnp.minimum(places, stored.shape[2] - 1)]
    stored = jnp.pad(
        stored, [(0, 0)] * 3 + [(0, -stored.shape[3] % SLICE), (0, 0)]
    ).astype(out_types[0].dtype)
    stored = jnp.moveaxis(stored, 1, 2)  # [B, runs, H, ..]
    wanted = [stored, ends, _marks(ends)]
    return [x if kind.size else None for x, kind in zip(wanted, out_types, strict=True)]


def _segments(chunks, options):
    """The chunks of each segment, as walks go through them."""
    every = options.chunks_of_segment
    segments = [np.arange(x, min(x + every, chunks)) for x in range(0, chunks, every)]
    return [x[::-1] for x in segments[::-1]] if options.reverse else segments


def _all_states(arrays, options):
    """Before, or in reverse after, each chunk; and at the ends of segments.

    States of segments come in the order of the walk: in reverse, the last one first.
    """
    keys, values, sums, weights, counts, start = arrays
    batch, _, heads, dim_v = values.shape
    before, after, total, _, weights = _gates(sums, weights, counts)
    left = before if options.reverse else after * weights
    k, v = _tokens(keys, heads), _tokens(values, heads)
    left = (left * options.scale)[..., None] * v
    added = _product(keys.dtype, "bhcjv,bhcjk->bhcvk", left, k)
    chunks = added.shape[2]
    state = jnp.zeros((batch, heads, dim_v, keys.shape[-1]))
    stored, ends = [None] * chunks, []
    for number, segment in enumerate(_segments(chunks, options)):
        state = jnp.zeros_like(state) if start is None else start[:, :, number]
        for chunk in segment:
            stored[chunk] = state
            state = total[:, :, chunk, None, None] * state + added[:, :, chunk]
        ends.append(state)
    return jnp.stack(stored, 2), jnp.stack(ends, 2)


def _of_chunks(pairs, keys, values, gates, reverse, scale):
    """States of all chunks, of which those that were not stored are computed again."""
    sums, weights, counts = gates
    before, after, total, _, weights = _gates(sums, weights, counts)
    left = scale * before if reverse else after * weights
    heads, chunks = sums.shape[1], total.shape[2]
    v, k = _tokens(values, heads), _tokens(keys, heads)
    added = _product(keys.dtype, "bhcjv,bhcjk->bhcvk", left[..., None] * v, k)
    states = [None] * chunks
    for pair in range(pairs.shape[2]):
        first, last = pair * PAIR, min(pair * PAIR + PAIR, chunks) - 1
        state = pairs[:, :, pair, : v.shape[-1]].astype(jnp.float32)
        walk = range(last, first - 1, -1) if reverse else range(first, last + 1)
        for chunk in walk:
            states[chunk] = state.astype(keys.dtype).astype(jnp.float32)
            state = total[:, :, chunk, None, None] * state + added[:, :, chunk]
    return jnp.stack(states, 2)


def _outputs(arrays, out_types, options, config):
    q, k, v, sums, weights, counts, skip, start = arrays
    heads, dim_v = v.shape[2:]
    product = functools.partial(_product, q.dtype)
    forward = StatesOptions(1.0, False, options.chunks_of_segment, 0)
    states, ends = _all_states((k, v, sums, weights, counts, start), forward)
    before, _, _, within, weights = _gates(sums, weights, counts)
    q32, k32, v32 = (_tokens(x, heads) for x in (q, k, v))
    scores = product("bhcik,bhcjk->bhcij", q32, k32)
    out = product("bhcij,bhcjv->bhciv", scores * within * weights[..., None, :], v32)
    old = product("bhcik,bhcvk->bhciv", q32, states)
    out = options.scale * (out + before[..., None] * old)
    if skip is not None:
        out = out + skip[:, None, None, :dim_v] * v32
    wanted = [_as_tokens(out, v), ends, _marks(ends)]
    return [x if kind.size else None for x, kind in zip(wanted, out_types, strict=True)]


def _gradients(arrays, out_types, options, config):
    q, k, v, dout, states, dstates, sums, weights, counts, skip = arrays
    heads, dim_v = v.shape[2:]
    scale = options.scale
    product = functools.partial(_product, q.dtype)
    before, after, total, within, w = _gates(sums, weights, counts)
    q32, k32, v32, do = (_tokens(x, heads) for x in (q, k, v, dout))
    gates = (sums, weights, counts)
    states, dstates = (jnp.moveaxis(x, 1, 2) for x in (states, dstates))
    states = _of_chunks(states, k, v, gates, False, scale)
    dstates = _of_chunks(dstates, q, dout, gates, True, scale)
    scores = scale * product("bhcik,bhcjk->bhcij", q32, k32) * within
    dscores = product("bhciv,bhcjv->bhcij", do, v32)
    m = scale * dscores * within * w[..., None, :]
    from_state = product("bhciv,bhcvk->bhcik", (scale * before)[..., None] * do, states)
    to_state = product("bhcjv,bhcvk->bhcjk", (after * w)[..., None] * v32, dstates)
    dq = product("bhcij,bhcjk->bhcik", m, k32) + from_state
    dk = product("bhcij,bhcik->bhcjk", m, q32) + to_state
    du = product("bhcij,bhciv->bhcjv", scores, do)
    du = du + after[..., None] * product("bhcjk,bhcvk->bhcjv", k32, dstates)
    dv = w[..., None] * du
    if skip is not None:
        dv = dv + skip[:, None, None, :dim_v] * do
    pairs = jnp.tril(scores * w[..., None, :] * dscores, -1)
    received = pairs.sum(-1) + (q32 * from_state).sum(-1)
    left = (k32 * to_state).sum(-1)
    dsums = received - pairs.sum(-2)
    through = total * (states * dstates).sum((-1, -2))
    # Decays up to a token are on the way to what it receives; those after it are on the
    # way of what it leaves; all are on that from state to state.
    dgates = jnp.flip(jnp.cumsum(jnp.flip(dsums, -1), -1), -1)
    dgates = dgates + jnp.cumsum(left, -1) - left + through[..., None]
    nothing = jnp.zeros(sums.shape)
    dskip = None
    if skip is not None:
        dskip = jnp.pad((do * v32).sum(3), [(0, 0)] * 3 + [(0, -dim_v % SLICE)])
    return (
        _as_tokens(dq, q),
        _as_tokens(dk, k),
        _as_tokens(dv, v),
        dgates,  # all of it, for the model of gate_gradients
        nothing,
        nothing,
        nothing,
        None if weights is None else (v32 * du).sum(-1),
        dskip,
    )


def _gate_gradients(arrays, out_types, *_):
    return (jnp.swapaxes(arrays[0], 1, 2)[:, : out_types[0].shape[1]],)


MODELS = {
    "chunk_sums": _chunk_sums,
    "segment_sums": _segment_sums,
    "segment_starts": _segment_starts,
    "spread": _spread,
    "states": _states,
    "outputs": _outputs,
    "gradients": _gradients,
    "gate_gradients": _gate_gradients,
    "step_gates": _step_gates,
    "step_gradients": _step_gradients,
    "head_sums": _head_sums,
}
