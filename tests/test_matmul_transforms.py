"""matmul on the CPU: values, gradients, vmap, shard_map."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from matmul_cases import (
    BATCHES,
    BF16,
    TRANSPOSES,
    definition,
    operands,
    product,
    transposes_id,
)

import tk_jax


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("batches", BATCHES[::2], ids=str)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_values(rng, transposes, batches, implementation):
    a, b = operands(rng, transposes, batches)
    result = product(transposes, implementation)(a, b)
    expected = definition(a, b, transposes)
    assert result.shape == expected.shape
    assert result.dtype == BF16
    # One rounding to 8 significant bits; the sums of 7 products are near 10 at most.
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("batches", BATCHES[1::2], ids=str)
def test_gradients_match_xla(rng, transposes, batches):
    a, b = operands(rng, transposes, batches, dtype=jnp.float16)

    def gradients(implementation):
        run = product(transposes, implementation)
        result, pull_back = jax.vjp(run, a, b)
        weights = jnp.cos(jnp.arange(result.size, dtype=jnp.float32))
        return pull_back(weights.reshape(result.shape).astype(result.dtype))

    for ours, expected in zip(gradients(None), gradients("xla"), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(
            np.float32(ours), np.float32(expected), rtol=2**-9, atol=2**-8
        )


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 1), (1, 0)], ids=str)
def test_vmap(rng, transposes, in_axes):
    a, b = operands(rng, transposes, ((3,), (3,)))
    mapped = [
        x[0] if axis is None else jnp.moveaxis(x, 0, axis)
        for x, axis in zip((a, b), in_axes, strict=True)
    ]
    result = jax.vmap(product(transposes), in_axes)(*mapped)
    unmapped = [
        x[:1] if axis is None else x for x, axis in zip((a, b), in_axes, strict=True)
    ]
    expected = definition(*unmapped, transposes)
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-5)


def test_vmap_of_grad_and_grad_of_vmap_agree(rng):
    a, b = operands(rng, (False, False), ((3,), ()))

    def loss(a, b):
        return jnp.sum(tk_jax.matmul(a, b).astype(jnp.float32) ** 2)

    def mapped_loss(a, b):
        return jnp.sum(jax.vmap(loss, (0, None))(a, b))

    da_each, db_each = jax.vmap(jax.grad(loss, (0, 1)), (0, None))(a, b)
    da, db = jax.grad(mapped_loss, (0, 1))(a, b)
    np.testing.assert_array_equal(np.float32(da), np.float32(da_each))
    np.testing.assert_allclose(
        np.float32(db), np.float32(db_each).sum(0), rtol=0.05, atol=1
    )


def test_float32_runs_through_xla_without_a_warning_on_the_cpu(rng):
    a, b = operands(rng, (True, True), sizes=(4, 8, 16), dtype=jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = product((True, True))(a, b)
    assert result.dtype == jnp.float32
    expected = definition(a, b, (True, True))
    np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_and_second_order_through_xla(rng):
    a, b = operands(rng, (False, False), dtype=jnp.float32)
    run = product((False, False), "xla")
    primal, tangent = jax.jvp(run, (a, b), (a, b))
    np.testing.assert_allclose(tangent, 2 * primal, rtol=1e-5)
    hessian = jax.hessian(lambda a: jnp.sum(run(a, b) ** 2))(a)
    assert hessian.shape == a.shape * 2


def test_shared_operand_in_shard_map(rng, cpu_devices):
    """The gradient of an operand that all devices share is summed over them."""
    mesh = jax.make_mesh(
        (4,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=cpu_devices[:4],
    )
    a, b = operands(rng, (False, True), ((8,), ()))
    run = product((False, True))
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    np.testing.assert_array_equal(
        np.float32(jax.jit(sharded)(a, b)), np.float32(run(a, b))
    )

    def loss(function, a, b):
        return jnp.sum(function(a, b).astype(jnp.float32) ** 2)

    ours = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1)))(a, b)
    expected = jax.grad(functools.partial(loss, run), (0, 1))(a, b)
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(
            np.float32(got), np.float32(want), rtol=2**-6, atol=0.25
        )


@pytest.mark.parametrize("transform", [jax.hessian, lambda f: jax.grad(jax.grad(f))])
def test_derivatives_of_higher_order_say_what_has_them(transform):
    x = jnp.ones((8, 8), BF16)

    def loss(scale, **settings):
        scaled = (scale * x).astype(x.dtype)
        return jnp.sum(tk_jax.matmul(scaled, scaled, **settings).astype(jnp.float32))

    message = (
        "matmul: the TK kernel has no derivatives of higher order; "
        "use implementation='xla'"
    )
    with pytest.raises(NotImplementedError, match=rf"^{message}(\n---|$)"):
        transform(loss)(2.0)
    by_xla = transform(functools.partial(loss, implementation="xla"))(2.0)
    assert by_xla == 2 * 8**3
