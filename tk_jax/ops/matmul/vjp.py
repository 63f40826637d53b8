"""The differentiable matmul of folded operands, and the call of its kernel.

With ``c = op(a) @ op(b)``, each gradient is again such a product, stored as its operand
is stored, so that no case transposes anything in memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tk_jax import _dispatch, _ffi
from tk_jax.ops.matmul import layout
from tk_jax.ops.matmul.config import MatmulConfig, MatmulOptions, default_config

# (transpose_a, transpose_b): how da and db are products of two of a, b and dc.
_GRADIENTS = {
    (False, False): (
        ("dc", "b", MatmulOptions(False, True)),
        ("a", "dc", MatmulOptions(True, False)),
    ),
    (False, True): (
        ("dc", "b", MatmulOptions(False, False)),
        ("dc", "a", MatmulOptions(True, False)),
    ),
    (True, False): (
        ("b", "dc", MatmulOptions(False, True)),
        ("a", "dc", MatmulOptions(False, False)),
    ),
    (True, True): (
        ("b", "dc", MatmulOptions(True, True)),
        ("dc", "a", MatmulOptions(True, True)),
    ),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def folded_matmul(
    a: jax.Array, b: jax.Array, options: MatmulOptions, choice: _dispatch.Choice
) -> jax.Array:
    """``op(a) @ op(b)`` of operands ``[batch or 1, rows, columns]``."""
    return _run(a, b, options, choice)


def _matmul_fwd(a, b, options, choice):
    return _run(a, b, options, choice), (a, b)


def _matmul_bwd(options, choice, residuals, dc):
    a, b = residuals
    arrays = {"a": a, "b": b, "dc": dc}
    gradients = []
    for operand, (x, y, product) in zip(
        residuals, _GRADIENTS[options.transpose_a, options.transpose_b], strict=True
    ):
        run = functools.partial(_run, choice=choice)
        if operand.shape[0] == dc.shape[0]:
            gradients.append(run(arrays[x], arrays[y], product))
        else:
            gradients.append(_summed(arrays[x], arrays[y], product, operand.shape, run))
    return tuple(gradients)


folded_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _summed(x, y, options, shape, run) -> jax.Array:
    """The gradient of a shared operand: the sum of its gradients over the batch.

    One product over the batch and the summed dimension, in which nothing of the size
    [batch, *shape] exists, unless the layouts would make it copy more than that.
    """
    copies = layout.fold_into_depth_copies(x.shape, y.shape, options)
    depth = x.shape[0] * layout.sizes(x.shape, y.shape, options)[2]
    if copies <= x.shape[0] * shape[1] * shape[2] and depth <= layout.MAX_SIZE:
        return run(*layout.fold_into_depth(x, y, options))
    # dtype: the sum must not round after every addition.
    total = jnp.sum(run(x, y, options), axis=0, keepdims=True, dtype=jnp.float32)
    return total.astype(x.dtype)


def _run(a, b, options, choice) -> jax.Array:
    run = functools.partial(
        _dispatch.run_chosen,
        choice,
        tk=functools.partial(_launch, options=options, config=None),
        xla=functools.partial(xla_matmul, options=options),
    )
    multiply = functools.partial(_multiply, run, options=options)
    return _dispatch.without_derivatives("matmul", multiply)(a, b)


def kernel_matmul(
    a: jax.Array,
    b: jax.Array,
    options: MatmulOptions,
    config: MatmulConfig | None = None,
) -> jax.Array:
    """The kernel on any operands that broadcast; ``config`` is for tuning."""
    launch = functools.partial(_launch, options=options, config=config)
    return _multiply(launch, a, b, options)


def xla_matmul(a: jax.Array, b: jax.Array, options: MatmulOptions) -> jax.Array:
    """The definition, differentiable in every mode, on operands that broadcast."""
    a = jnp.swapaxes(a, -1, -2) if options.transpose_a else a
    b = jnp.swapaxes(b, -1, -2) if options.transpose_b else b
    if a.dtype not in (jnp.bfloat16, jnp.float16):
        return jnp.matmul(a, b)
    return lax.platform_dependent(a, b, cpu=_widened_matmul, default=jnp.matmul)


# Checkpointed, so that what is kept for a backward pass is the narrow operands.
@jax.checkpoint
def _widened_matmul(a, b) -> jax.Array:
    """A product of 16-bit operands on the CPU, where XLA may sum it in 16 bits."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)).astype(a.dtype)


def _multiply(run, a, b, options) -> jax.Array:
    """``run`` on the folded operands, under vmap with one more dimension to fold."""
    a, b, shape = layout.fold_batch(a, b, options)
    mapped = custom_vmap(run)

    @mapped.def_vmap
    def fold_mapped_axis(axis_size, in_batched, a, b):
        # The mapped axis leads, where an operand has it.
        del axis_size, in_batched
        return _multiply(run, a, b, options), True

    return mapped(a, b).reshape(shape)


def _launch(a, b, options, config) -> jax.Array:
    m, n, _ = layout.sizes(a.shape, b.shape, options)
    a, b = layout.pad_rows(a, b, options)
    padded_m, padded_n, _ = layout.sizes(a.shape, b.shape, options)
    batch = max(a.shape[0], b.shape[0])
    out_type = jax.typeof(a).update(shape=(batch, padded_m, padded_n))
    config = config or default_config(padded_m, padded_n, batch)
    (c,) = _ffi.call("tk_matmul_v1", (out_type,), a, b, options=options, config=config)
    return c[:, :m, :n]
