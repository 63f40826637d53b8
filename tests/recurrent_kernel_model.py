"""What linear attention's five kernels compute, in XLA operations: for tests of what is
made of them. In float32, but for the states of chunks, which are in the inputs' dtype.
"""

from __future__ import annotations

import jax.numpy as jnp

CHUNK, SLICE = 64, 64
PRECISION = "highest"


def call(target, out_types, *arrays, options=None, config=None):
    """In place of ``tk_jax._ffi.call``."""
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


def _product(equation, *arrays):
    return jnp.einsum(equation, *arrays, precision=PRECISION)


def _chunk_sums(arrays, out_types, options, _):
    x, y = arrays
    batch, heads, _ = out_types[0].shape
    x = jnp.where(x < options.least, options.least, x) * options.scale
    x = jnp.broadcast_to(x, (batch, options.seqlen, heads))
    sums = jnp.cumsum(_in_chunks(x), axis=2)
    moved = None if y is None else jnp.moveaxis(_in_chunks(y), 3, 1)
    return jnp.moveaxis(sums, 3, 1), moved


def _states(arrays, out_types, options, config):
    keys, values, sums, weights, counts, start = arrays
    batch, _, heads, dim_v = values.shape
    before, after, total, _, weights = _gates(sums, weights, counts)
    left = before if options.reverse else after * weights
    k, v = _tokens(keys, heads), _tokens(values, heads)
    added = _product("bhcjv,bhcj,bhcjk->bhcvk", v, left, k * options.scale)
    chunks, of_segment = added.shape[2], options.chunks_of_segment
    state = jnp.zeros((batch, heads, dim_v, keys.shape[-1]))
    stored, ends = [None] * chunks, []
    segments = [
        range(i, min(i + of_segment, chunks)) for i in range(0, chunks, of_segment)
    ]
    for number, segment in enumerate(segments):
        state = jnp.zeros_like(state) if start is None else start[:, :, number]
        for chunk in reversed(segment) if options.reverse else segment:
            stored[chunk] = state
            state = total[:, :, chunk, None, None] * state + added[:, :, chunk]
        ends.append(state)
    stored = jnp.stack(stored, 2)
    stored = jnp.pad(stored, [(0, 0)] * 3 + [(0, -dim_v % SLICE), (0, 0)])
    wanted = [stored, jnp.stack(ends, 2)]
    return [x if kind.size else None for x, kind in zip(wanted, out_types, strict=True)]


def _outputs(arrays, out_types, options, config):
    q, k, v, sums, weights, counts, skip, start = arrays
    heads = v.shape[2]
    walk = (k, v, sums, weights, counts, start)
    forward = type(
        "Options",
        (),
        {
            "scale": 1.0,
            "reverse": False,
            "chunks_of_segment": options.chunks_of_segment,
        },
    )

    class Kind:
        size = 1

    states, ends = _states(walk, (Kind, Kind), forward, config)
    states = states[..., : v.shape[-1], :].astype(q.dtype).astype(jnp.float32)
    before, _, _, within, weights = _gates(sums, weights, counts)
    q32, k32, v32 = (_tokens(x, heads) for x in (q, k, v))
    scores = _product("bhcik,bhcjk->bhcij", q32, k32)
    out = _product("bhcij,bhcj,bhcjv->bhciv", scores * within, weights, v32)
    out = out + before[..., None] * _product("bhcik,bhcvk->bhciv", q32, states)
    out = out * options.scale
    if skip is not None:
        out = out + skip[:, None, None, : v.shape[-1]] * v32
    return _as_tokens(out, v), ends if out_types[1].size else None


def _gradients(arrays, out_types, options, config):
    q, k, v, dout, states, dstates, sums, weights, counts, skip = arrays
    heads, dim_v = v.shape[2:]
    before, after, total, within, w = _gates(sums, weights, counts)
    q32, k32, v32, do = (_tokens(x, heads) for x in (q, k, v, dout))
    states, dstates = (x[..., :dim_v, :].astype(jnp.float32) for x in (states, dstates))
    scores = _product("bhcik,bhcjk->bhcij", q32, k32) * options.scale
    dscores = _product("bhciv,bhcjv->bhcij", do, v32)
    weighted = within * w[..., None, :]
    m = weighted * dscores * options.scale
    dq_state = (
        options.scale * before[..., None] * _product("bhciv,bhcvk->bhcik", do, states)
    )
    v_dstate = _product("bhcjv,bhcvk->bhcjk", v32, dstates)
    dq = _product("bhcij,bhcjk->bhcik", m, k32) + dq_state
    dk = _product("bhcij,bhcik->bhcjk", m, q32) + (after * w)[..., None] * v_dstate
    dv = _product("bhcij,bhciv->bhcjv", scores * weighted, do)
    dv = dv + (after * w)[..., None] * _product("bhcjk,bhcvk->bhcjv", k32, dstates)
    if skip is not None:
        dv = dv + skip[:, None, None, :dim_v] * do
    pairs = scores * weighted * dscores
    to_state = after * (k32 * v_dstate).sum(-1)
    dsums = pairs.sum(-1) - pairs.sum(-2) + (q32 * dq_state).sum(-1) - w * to_state
    through = total * (states * dstates).sum((-1, -2)) + (w * to_state).sum(-1)
    dsums = dsums.at[..., -1].add(through)
    dgates = jnp.flip(jnp.cumsum(jnp.flip(dsums, -1), -1), -1)
    flat = sums.shape
    none = jnp.zeros(flat)
    dweights = (scores * within * dscores).sum(-2) + to_state
    dskip = None
    if skip is not None:
        dskip = jnp.pad((do * v32).sum(3), [(0, 0)] * 3 + [(0, -dim_v % SLICE)])
    return (
        _as_tokens(dq, q),
        _as_tokens(dk, k),
        _as_tokens(dv, v),
        dgates.reshape(flat),
        none,
        none,
        none,
        None if weights is None else dweights.reshape(flat),
        dskip,
    )


def _gate_gradients(arrays, out_types, *_):
    return (jnp.swapaxes(arrays[0], 1, 2)[:, : out_types[0].shape[1]],)


MODELS = {
    "chunk_sums": _chunk_sums,
    "states": _states,
    "outputs": _outputs,
    "gradients": _gradients,
    "gate_gradients": _gate_gradients,
}
