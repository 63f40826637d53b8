"""Attention's kernels on the GPU under transformations, against the XLA form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tk_jax
from tk_jax import _ffi, checkpoint_policies

pytestmark = pytest.mark.gpu


def _bits(results):
    return [np.asarray(x).tobytes() for x in results]


def _loss(implementation, q, k, v):
    out, lse = tk_jax.attention(
        q, k, v, is_causal=True, return_lse=True, implementation=implementation
    )
    weights = jnp.cos(jnp.arange(lse.size).reshape(lse.shape))
    return jnp.sum(out * weights[..., None]) + jnp.sum(lse * weights)


def _gradient(implementation):
    return jax.value_and_grad(functools.partial(_loss, implementation), (0, 1, 2))


def _inputs(*batch):
    keys = jax.random.split(jax.random.key(3), 3)
    return tuple(
        jax.random.normal(key, (*batch, 97, heads, 64), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )


def _assert_agree(make, *inputs):
    """``make(implementation)`` gives the same, up to a few roundings, for both."""
    got, expected = (jax.jit(make(name))(*inputs) for name in (None, "xla"))

    def compare(x, y):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max(), rtol=0)

    jax.tree.map(compare, got, expected)


@pytest.mark.parametrize(
    "in_axes", [(0, None, None), (None, 0, 0), (0, 0, 0), (2, 1, 0)], ids=str
)
def test_vmap_of_gradients(in_axes):
    inputs = [
        x if axis is None else jnp.stack([x, x * 0.5, -x], axis)
        for x, axis in zip(_inputs(2), in_axes, strict=True)
    ]
    _assert_agree(lambda name: jax.vmap(_gradient(name), in_axes), *inputs)


def test_gradient_of_vmap_of_vmap():
    def make(name):
        loss = functools.partial(_loss, name)
        both = jax.vmap(jax.vmap(loss, (0, None, None)), (None, 0, 0))
        return jax.grad(lambda *x: both(*x).sum(), (0, 1, 2))

    _assert_agree(make, *_inputs(2))


@pytest.mark.parametrize("policy", [None, checkpoint_policies.save_attention])
def test_layers_in_a_scan_with_remat(policy):
    def make(name):
        def layer(x, w):
            y = x @ w
            attention = functools.partial(
                tk_jax.attention, is_causal=True, implementation=name
            )
            return x + attention(y, y[:, :, :2], y[:, :, 2:]), None

        def model(x, weights):
            remat = jax.checkpoint(layer, policy=policy)
            y = jax.lax.scan(remat, x, weights)[0]
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.value_and_grad(model, (0, 1))

    weights = jax.random.normal(jax.random.key(4), (3, 64, 64), jnp.bfloat16) / 8
    _assert_agree(make, _inputs(2)[0], weights)


def test_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:1])

    def make(name):
        def local(q, k, v):
            value, gradient = _gradient(name)(q, k, v)
            return jax.lax.psum(value, "batch"), gradient

        return jax.shard_map(
            local, mesh=mesh, in_specs=(P("batch"),) * 3, out_specs=(P(), P("batch"))
        )

    _assert_agree(make, *_inputs(2))


def test_export_round_trip():
    inputs = _inputs(2)
    gradient = jax.jit(_gradient("tk"))
    exported = jax.export.export(
        gradient, platforms=["cuda"], disabled_checks=_ffi.export_checks()
    )(*inputs)
    restored = jax.export.deserialize(exported.serialize())
    got, expected = jax.tree.leaves(restored.call(*inputs)), gradient(*inputs)
    assert _bits(got) == _bits(jax.tree.leaves(expected))


def test_donation():
    q, k, v = _inputs(2)
    attention = functools.partial(tk_jax.attention, implementation="tk")
    expected = _bits([attention(q, k, v)])
    assert _bits([jax.jit(attention, donate_argnums=0)(q, k, v)]) == expected
    assert q.is_deleted()
