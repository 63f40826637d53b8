"""The differentiable attention of [B, T, H, D] arrays, and the calls of its kernels.

The platform is chosen inside the forward and inside the backward rule: chosen around
the op, the residuals of both implementations would be kept.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from tk_jax import _dispatch, _ffi
from tk_jax.ops.attention import config, xla


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    options: config.AttentionOptions
    choice: _dispatch.Choice
    return_lse: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(call: Call, q, k, v):
    """Returns out, or (out, lse) with ``call.return_lse``."""
    out, lse = _forward(call, q, k, v)
    return (out, lse) if call.return_lse else out


def _attention_fwd(call, q, k, v):
    out, lse = _forward(call, q, k, v)
    out = checkpoint_name(out, "tk_attention_out")
    lse = checkpoint_name(lse, "tk_attention_lse")
    return ((out, lse) if call.return_lse else out), (q, k, v, out, lse)


def _attention_bwd(call, residuals, cotangents):
    # Of size 0: nothing flows into lse.
    nothing = jnp.zeros((0,), jnp.float32)
    dout, dlse = cotangents if call.return_lse else (cotangents, nothing)
    return _backward(call, *residuals, dout, dlse)


attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(call, q, k, v):
    return _chosen(call, kernel_forward, xla.forward)(q, k, v)


def _backward(call, q, k, v, out, lse, dout, dlse):
    return _chosen(call, kernel_backward, xla.backward)(q, k, v, out, lse, dout, dlse)


def _chosen(call, kernel, xla_form):
    """The implementation of the platform at hand, under vmap as one larger batch."""

    @custom_vmap
    def run(*args):
        return _dispatch.run_chosen(
            call.choice,
            *args,
            tk=functools.partial(kernel, call.options),
            xla=functools.partial(xla_form, call.options),
        )

    @run.def_vmap
    def fold_mapped_axis(axis_size, in_batched, *args):
        folded = [
            _fold(x, axis_size, batched)
            for x, batched in zip(args, in_batched, strict=True)
        ]
        results = run(*folded)
        unfolded = jax.tree.map(
            lambda x: x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]),
            results,
        )
        return unfolded, jax.tree.map(lambda _: True, results)

    return run


def _fold(x, axis_size, batched):
    """[N, B, ...] or, where it is not mapped, [B, ...] -> [N * B, ...]"""
    if x.size == 0:
        return jnp.zeros((0,), x.dtype)
    if not batched:
        x = jnp.broadcast_to(x, (axis_size, *x.shape))
    return x.reshape(-1, *x.shape[2:])


def kernel_forward(
    options: config.AttentionOptions,
    q,
    k,
    v,
    *,
    tiles: config.AttentionForwardConfig | None = None,
):
    """Returns out [B, T, H, D] and lse [B, T, H]. ``tiles`` is for tuning."""
    _check_limits(q, k)
    out_types = (
        jax.typeof(q),
        jax.typeof(q).update(shape=q.shape[:-1], dtype=jnp.dtype(jnp.float32)),
    )
    return _ffi.call(
        "tk_attention_fwd_v1",
        out_types,
        q,
        k,
        v,
        options=options,
        config=tiles or config.forward_config(q.shape[-1], k.shape[1]),
    )


def kernel_backward(
    options: config.AttentionOptions,
    q,
    k,
    v,
    out,
    lse,
    dout,
    dlse,
    *,
    tiles: config.AttentionBackwardConfig | None = None,
):
    """Returns dq, dk, dv. ``dlse`` of size 0 stands for zeros."""
    _check_limits(q, k)
    batch, seqlen_q, num_heads, head_dim = q.shape
    rows = (batch, num_heads, config.padded_queries(seqlen_q))
    fragments = (*rows[:2], rows[2] // config.FRAGMENT_ROWS)
    workspaces = (
        ("delta", rows, jnp.float32),
        ("lse_log2", rows, jnp.float32),
        ("dq_acc", (*rows, head_dim), jnp.float32),
        ("dq_order", fragments, jnp.int32),
    )
    types = [jax.typeof(x) for x in (q, k, v)]
    types += [
        types[0].update(shape=shape, dtype=jnp.dtype(dtype))
        for _, shape, dtype in workspaces
    ]
    dq, dk, dv, *_ = _ffi.call(
        "tk_attention_bwd_v1",
        tuple(types),
        q,
        k,
        v,
        out,
        lse,
        dout,
        dlse,
        options=options,
        config=tiles or config.backward_config(head_dim),
    )
    return dq, dk, dv


def _check_limits(q, k):
    """Again, because vmap may have made the batch larger than the caller's."""
    exceeded = config.exceeded_limit(q.shape, k.shape)
    if exceeded:
        raise NotImplementedError(
            f"attention: the TK kernel does not support {exceeded}; "
            "map over fewer elements at a time or use implementation='xla'"
        )
