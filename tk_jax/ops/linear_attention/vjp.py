"""The differentiable linear attention on the platform at hand: kernels or XLA.

The platform is chosen inside the forward and inside the backward rule: chosen around
the op, the residuals of both implementations would be kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tk_jax import _dispatch
from tk_jax.ops import _chunks
from tk_jax.ops.linear_attention import config, quotient, scan


def differentiable(choice: _dispatch.Choice, tk: Callable, xla: Callable) -> Callable:
    """``tk`` or ``xla``, as ``choice`` says, of one tree of arrays.

    Both are differentiable functions with results of the same types. In the backward
    pass they are computed again from the arrays, which alone are kept.
    """

    def choose(tk, xla, *trees):
        leaves, structure = jax.tree.flatten(trees)

        def unflattened(function):
            return lambda *leaves: function(*structure.unflatten(leaves))

        run = functools.partial(
            _dispatch.run_chosen, choice, tk=unflattened(tk), xla=unflattened(xla)
        )
        return _dispatch.without_derivatives(choice.op, run)(*leaves)

    def results(arrays):
        # One by one, so that those nobody asks for are not computed.
        return jax.tree.map(lambda x: _mapped_with(arrays, x), choose(tk, xla, arrays))

    def forward(arrays):
        return results(arrays), arrays

    def backward(arrays, cotangents):
        gradients = choose(_pull_back(tk), _pull_back(xla), arrays, cotangents)
        leaves, structure = jax.tree.flatten(arrays)
        return (structure.unflatten(_fill(gradients, [None] * len(leaves), leaves)),)

    run = jax.custom_vjp(results)
    run.defvjp(forward, backward)
    return run


def _mapped_with(arrays, result):
    """``result``, under vmap mapped where any of the arrays is.

    One that does not depend on what is mapped (the final state on queries) would not
    be: its gradient would arrive as a sum over the elements, and custom_vjp, which adds
    up what its rule makes of each element, would count that sum for each of them.
    """

    @custom_vmap
    def identity(result, arrays):
        del arrays
        return result

    @identity.def_vmap
    def add_axis(axis_size, in_batched, result, arrays):
        if not in_batched[0]:
            result = jnp.broadcast_to(result, (axis_size, *result.shape))
        return identity(result, arrays), True

    return identity(result, arrays)


def _pull_back(function):
    """(arrays, cotangents) -> the gradients of those arrays that are floating."""

    def run(arrays, cotangents):
        leaves, structure = jax.tree.flatten(arrays)

        def of_floats(floats):
            return function(structure.unflatten(_fill(floats, leaves, leaves)))

        _, pull_back = jax.vjp(of_floats, [x for x in leaves if _floats(x)])
        return pull_back(cotangents)[0]

    return run


def _fill(floats, others, leaves):
    """``floats`` in the places of those of ``leaves`` that are floating."""
    floats = iter(floats)
    return [
        next(floats) if _floats(x) else other
        for x, other in zip(leaves, others, strict=True)
    ]


def _floats(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def kernel_linear_attention(
    options: config.LinearAttentionOptions,
    return_state: bool,
    q,
    k,
    v,
    log_decay,
    state,
    segment_ids,
    *,
    tiles: config.ScanConfig | None = None,
):
    """As ``xla.linear_attention``, by kernels; ``state`` may be None for zeros.

    ``tiles`` is for tuning. The state that is returned is None unless ``return_state``.
    """
    *batch, seqlen, _, key_dim = q.shape
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    unfold = functools.partial(_chunks.unfold, batch=batch)
    if log_decay is not None:
        log_decay = log_decay.astype(jnp.float32)
        log_decay = log_decay if log_decay.ndim == 1 else fold(log_decay)
    if options.normalize:
        v = quotient.with_ones(v)
        state = None if state is None else quotient.join(*state)
    arrays = scan.Arrays(
        q=pad_columns(fold(q)),
        k=pad_columns(fold(k)),
        v=pad_columns(fold(v)),
        log_decay=log_decay,
        state=None if state is None else pad_state(jnp.swapaxes(fold(state), -1, -2)),
        starts=document_starts(segment_ids, (*batch, seqlen)),
    )
    settings = scan.Settings(
        "linear_attention", options.scale, return_state, tiles=tiles
    )
    out, state = scan.scan(settings, arrays)
    out = unfold(out)
    if state is not None:
        state = unfold(jnp.swapaxes(state, -1, -2))[..., :key_dim, :]
    columns = v.shape[-1]
    out, state = out[..., :columns], None if state is None else state[..., :columns]
    if not options.normalize:
        return out, state
    return quotient.divided(out), None if state is None else quotient.split(state)


def pad_columns(x):
    """The last axis, padded with zeros to what the copy engine reads."""
    missing = -x.shape[-1] % config.DIM_STEP
    if not missing:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def pad_state(state):
    """The same for both axes of states [.., V, K]."""
    return jnp.swapaxes(pad_columns(jnp.swapaxes(pad_columns(state), -1, -2)), -1, -2)


def document_starts(segment_ids, shape):
    """bool [B, T] for ``shape`` [*batch, T]; None without ids."""
    if segment_ids is None:
        return None
    return _chunks.fold(_chunks.segment_starts(segment_ids, shape), len(shape) - 1)
