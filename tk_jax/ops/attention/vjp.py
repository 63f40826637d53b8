"""The differentiable attention of [*batch, T, H, D] arrays, and its kernels' calls.

The platform is chosen inside the forward and inside the backward rule: chosen around
the op, the residuals of both implementations would be kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tk_jax import _dispatch, _ffi
from tk_jax.ops.attention import config, operands, tiling, xla
from tk_jax.ops.attention.operands import fold, unfold


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    options: config.AttentionOptions
    choice: _dispatch.Choice
    return_lse: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, q, k, v, extras: config.Extras):
    """Returns out, or (out, lse) with ``call.return_lse``."""
    out, lse, _ = _forward(call, q, k, v, extras)
    return (out, lse) if call.return_lse else out


def _attention_fwd(call, q, k, v, extras):
    results = _forward(call, q, k, v, extras)
    out, lse, _ = results = xla.named(results)
    return ((out, lse) if call.return_lse else out), (q, k, v, results, extras)


def _attention_bwd(call, residuals, cotangents):
    q, k, v, (out, lse, lse_rest), extras = residuals
    # Of size 0: nothing flows into lse.
    nothing = jnp.zeros((0,), jnp.float32)
    dout, dlse = cotangents if call.return_lse else (cotangents, nothing)
    if lse_rest is not None:
        # Every gradient is linear in these two and in the weights, which are made from
        # lse alone.
        dout = xla.corrected(dout, lse_rest)
        dlse = xla.corrected(dlse, lse_rest) if call.return_lse else nothing
    dq, dk, dv, dbias, dsinks = _backward(call, q, k, v, out, lse, dout, dlse, extras)
    return dq, dk, dv, config.Extras(bias=dbias, sinks=dsinks)


attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(call, q, k, v, extras):
    return _chosen(call, kernel_forward, xla.forward)(q, k, v, extras)


def _backward(call, q, k, v, out, lse, dout, dlse, extras):
    run = _chosen(call, kernel_backward, xla.backward, ("bias", "sinks"))
    return run(q, k, v, out, lse, dout, dlse, extras)


def _chosen(call, kernel, xla_form, differentiated=()):
    """The implementation of the platform at hand, under vmap as one larger batch.

    ``differentiated`` names the extras with a gradient among the results.
    """

    @custom_vmap
    def run(*args):
        return _dispatch.run_chosen(
            _choice_for_batch(call.choice, *args[:2]),
            *args,
            tk=functools.partial(kernel, call.options),
            xla=functools.partial(xla_form, call.options),
        )

    @run.def_vmap
    def add_batch_axis(axis_size, in_batched, *args):
        *arrays, extras = args
        *batched, extras_batched = in_batched
        arrays = [
            # dlse into which nothing flows stays as it is.
            jnp.zeros((0,), x.dtype)
            if x.size == 0 and x.ndim <= 2
            else _repeat(x, axis_size, is_batched)
            for x, is_batched in zip(arrays, batched, strict=True)
        ]
        extras = extras._replace(
            **{
                # What is the same for all elements stays one array; each element has a
                # gradient of its own, though.
                name: _repeat(x, axis_size if name in differentiated else 1, is_batched)
                for (name, x), is_batched in zip(
                    extras._asdict().items(), extras_batched, strict=True
                )
                if x is not None
            }
        )
        results = run(*arrays, extras)
        return results, jax.tree.map(lambda _: True, results)

    return _dispatch.without_derivatives("attention", run)


def _choice_for_batch(choice, q, k):
    """The choice again: vmap may have made the batch larger than the caller's."""
    limit = config.exceeded_limit(q.shape, k.shape)
    if limit is None or choice.requested is not None:
        return choice
    choice = _dispatch.choose("attention", None, limit)
    _dispatch.warn_of_fallback(choice)
    return choice


def _repeat(x, size, is_batched):
    """[N, *batch, ...] as it is; not mapped, [*batch, ...] -> [size, *batch, ...]"""
    return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))


def kernel_forward(
    options: config.AttentionOptions,
    q,
    k,
    v,
    extras: config.Extras = xla.NO_EXTRAS,
    *,
    tiles: tiling.AttentionForwardConfig | None = None,
):
    """As ``xla.forward``. ``tiles`` is for tuning."""
    _check_supported(options, q, k, v, extras)
    batch = q.shape[:-3]
    q, k, v = (fold(x, 3) for x in (q, k, v))
    types = jax.typeof(q)
    rows = q.shape[:-1]
    rests = rows if extras.bias is not None else (rows[0], 0, rows[2])
    tiles = tiles or tiling.forward_config(
        q.shape[-1],
        v.shape[-1],
        k.shape[1],
        options.mask,
        config.features(options, extras, q.dtype),
    )
    out, lse, lse_rest = _ffi.call(
        "tk_attention_fwd_v1",
        (
            types.update(shape=(*rows, v.shape[-1])),
            types.update(shape=rows, dtype=jnp.dtype(jnp.float32)),
            types.update(shape=rests, dtype=jnp.dtype(jnp.float32)),
        ),
        q,
        k,
        v,
        *operands.forward(extras, batch, q, k, tiles),
        options=options.for_kernel(),
        config=tiles,
    )
    if extras.bias is None:
        return unfold(out, batch), unfold(lse, batch), None
    return tuple(unfold(x, batch) for x in (out, lse, lse_rest))


def kernel_backward(
    options: config.AttentionOptions,
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    extras: config.Extras = xla.NO_EXTRAS,
    *,
    tiles: tiling.AttentionBackwardConfig | None = None,
):
    """Returns dq, dk, dv, dbias, dsinks; None for a bias or sinks that are None.

    ``dlse`` of size 0 stands for zeros.
    """
    _check_supported(options, q, k, v, extras)
    leading = q.shape[:-3]
    q, k, v, out, dout = (fold(x, 3) for x in (q, k, v, out, dout))
    lse = fold(lse, 2)
    dlse = fold(dlse, 2) if dlse.size else dlse
    batch, seqlen_q, num_heads, head_dim = q.shape
    narrow = tiling.narrow_head_dim(head_dim, v.shape[-1])
    rows = (batch, num_heads, config.padded_queries(seqlen_q))
    fragments = (*rows[:2], rows[2] // config.FRAGMENT_ROWS)
    workspaces = (
        ("delta", rows, jnp.float32),
        ("scaled_lse", rows, jnp.float32),
        ("dq_acc", (*rows, narrow or 0), jnp.float32),
        ("dq_order", fragments, jnp.int32),
    )
    types = [jax.typeof(x) for x in (q, k, v)]
    types += [
        types[0].update(shape=shape, dtype=jnp.dtype(dtype))
        for _, shape, dtype in workspaces
    ]
    tiles = tiles or tiling.backward_config(
        head_dim, v.shape[-1], config.features(options, extras, q.dtype)
    )
    gradients = _ffi.call(
        "tk_attention_bwd_v1",
        tuple(types),
        q,
        k,
        v,
        out,
        lse,
        dout,
        dlse,
        *operands.backward(extras, leading, q, k, tiles),
        options=options.for_kernel(),
        config=tiles,
    )
    dq, dk, dv = (unfold(x, leading) for x in gradients[:3])
    delta, scaled_lse = gradients[3:5]
    dbias = _gradient_of_bias(
        options, q, k, v, dout, delta, scaled_lse, extras, leading
    )
    delta = delta[:, :, :seqlen_q]
    dsinks = _gradient_of_sinks(extras.sinks, leading, lse, delta)
    return dq, dk, dv, dbias, dsinks


def _gradient_of_bias(options, q, k, v, dout, delta, scaled_lse, extras, batch):
    """What ``extras.bias`` is, by a pass of its own: XLA drops it where nobody asks."""
    bias = extras.bias
    if bias is None:
        return None
    arrays = operands.of_bias_gradient(extras, batch, q, k)
    given = arrays.bias
    batches, heads, seqlen_q, seqlen_kv = given.shape
    # Where all queries or all keys share it, a block of sums: see BackwardBiasParams.
    rows = tiling.BIAS_BLOCK_Q if seqlen_q == 1 else seqlen_q
    columns = tiling.BIAS_BLOCK_KV if seqlen_kv == 1 else seqlen_kv
    # The batch axes that it is shared along, if it is not shared along all.
    repeated = []
    if batches != math.prod(bias.shape[:-3]):
        repeated = [i for i, size in enumerate(bias.shape[:-3]) if size != batch[i]]
    summed_later = repeated or 1 in (seqlen_q, seqlen_kv)
    types = jax.typeof(q).update(
        shape=(batches, heads, rows, columns),
        dtype=jnp.dtype(jnp.float32 if summed_later else given.dtype),
    )
    (dbias,) = _ffi.call(
        "tk_attention_bwd_bias_v1",
        (types,),
        q,
        k,
        v,
        dout,
        delta,
        scaled_lse,
        *arrays,
        options=options.for_kernel(),
    )
    if seqlen_q == 1:
        dbias = jnp.sum(dbias, axis=2, keepdims=True)
    if seqlen_kv == 1:
        dbias = jnp.sum(dbias, axis=3, keepdims=True)
    if repeated:
        dbias = jnp.sum(unfold(dbias, batch), axis=repeated, keepdims=True)
    return dbias.reshape(bias.shape).astype(bias.dtype)


def _gradient_of_sinks(sinks, batch, lse, delta):
    """lse [B, T, H] and delta [B, H, T] -> what ``sinks`` are.

    A sink is a score s with the probability p = exp(s - lse) and no value: its ds is
    p * (0 - delta).
    """
    if sinks is None:
        return None
    whole = jnp.broadcast_to(sinks, (*batch, sinks.shape[-1])).astype(jnp.float32)
    score = operands.bounded(fold(whole, 1))[:, None, :]
    # A query without a key whose sink is -inf has neither: lse is -inf.
    p = jnp.where(lse == -jnp.inf, 0, jnp.exp(score - lse))
    ds = -jnp.sum(p * jnp.swapaxes(delta, 1, 2), axis=1)
    ds = unfold(ds, batch)
    shared = tuple(i for i, size in enumerate(sinks.shape) if size != ds.shape[i])
    return jnp.sum(ds, axis=shared, keepdims=True).astype(sinks.dtype)


def _check_supported(options, q, k, v, extras):
    """Again, because vmap may have made the batch larger than the caller's."""
    unsupported = config.unsupported(options, q, k, v, extras)
    if unsupported:
        raise NotImplementedError(
            f"attention: the TK kernel does not support {unsupported}; "
            "map over fewer elements at a time or use implementation='xla'"
        )
