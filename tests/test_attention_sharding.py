"""Attention on meshes of CPU devices: inside shard_map, and on sharded arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tk_jax

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

IMPLEMENTATIONS = [None, "xla"]


def _local_loss(q, k, v, **settings):
    out, lse = tk_jax.attention(q, k, v, is_causal=True, return_lse=True, **settings)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


@pytest.fixture
def inputs():
    rng = np.random.default_rng(1)
    return tuple(
        jnp.asarray(rng.standard_normal((8, *shape), np.float32))
        for shape in ((33, 4, 64), (40, 2, 64), (40, 2, 64))
    )


def _assert_close(got, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4),
        got,
        expected,
    )


@pytest.fixture
def mesh(cpu_devices):
    return jax.make_mesh(
        (4, 2), ("batch", "heads"), (AxisType.Auto,) * 2, devices=cpu_devices
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", [P("batch"), P("batch", None, "heads")], ids=str)
def test_shard_map_over_batch_and_heads(mesh, spec, implementation, inputs):
    attention = functools.partial(
        tk_jax.attention, is_causal=True, implementation=implementation
    )
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)

    def loss(attention, *x):
        return jnp.sum(jnp.sin(attention(*x)))

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2)))(*inputs)
        for f in (sharded, attention)
    )
    _assert_close(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_inside_shard_map(mesh, implementation, inputs):

    def local(q, k, v):
        loss = functools.partial(_local_loss, implementation=implementation)
        value, gradient = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        return jax.lax.psum(value, "batch"), gradient

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("batch"),) * 3, out_specs=(P(), P("batch"))
    )
    loss = functools.partial(_local_loss, implementation=implementation)
    _assert_close(
        jax.jit(sharded)(*inputs),
        jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_devices_share_get_the_sum_of_their_gradients(
    mesh, implementation, inputs
):
    q, k, v = inputs
    k, v = k[:1], v[:1]

    def shared(q, k, v):
        k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (k, v))
        return tk_jax.attention(q, k, v, implementation=implementation)

    def shared_by_vmap(q, k, v):
        attention = functools.partial(tk_jax.attention, implementation=implementation)
        return jax.vmap(attention, (0, None, None))(q, k[0], v[0])

    def gradient(fn):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(fn(*x))), (0, 1, 2)))

    expected = gradient(shared)(q, k, v)
    for fn in (shared, shared_by_vmap):
        sharded = jax.shard_map(
            fn, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=P("batch")
        )
        _assert_close(gradient(sharded)(q, k, v), expected)


def test_shard_map_sees_that_results_differ_between_devices(mesh, inputs):
    def local(q, k, v):
        return tk_jax.attention(q, k, v)

    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(local, mesh=mesh, in_specs=(P("batch"),) * 3, out_specs=P())(
            *inputs
        )


def test_scan_remat_and_vmap_inside_shard_map(mesh, inputs):
    weights = jnp.stack([jnp.eye(64), jnp.eye(64)[::-1]])

    def layer(x, w):
        y = x @ w
        return x + tk_jax.attention(y, y[..., :2, :], y[..., 2:, :]), None

    def loss(x, weights):
        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), x, weights)[0]))

    def local(x, weights):
        return jax.vmap(jax.grad(loss), (0, None))(x, weights)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P("batch")
    )
    x = inputs[0][:, None]
    _assert_close(jax.jit(sharded)(x, weights), jax.jit(local)(x, weights))


def test_sharded_inputs_under_jit(mesh, inputs):
    gradient = jax.jit(jax.grad(_local_loss, (0, 1, 2)))
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("batch")))
    _assert_close(gradient(*sharded), gradient(*inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "spec", [P(), P("batch"), P("batch", None, "heads"), P(None, None, None, "heads")]
)
def test_a_mesh_with_explicit_axes(cpu_devices, inputs, spec, implementation, dtype):
    """What jax.make_mesh makes: types say how arrays are split."""
    mesh = jax.make_mesh(
        (4, 2), ("batch", "heads"), (AxisType.Explicit,) * 2, devices=cpu_devices
    )
    inputs = [x.astype(dtype) for x in inputs]
    rows = (*spec, None, None, None)[:3]

    def local(q, k, v):
        sinks = jnp.zeros(4)
        out, lse = tk_jax.attention(
            q, k, v, sinks=sinks, return_lse=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(lse), (out, lse)

    gradient = jax.jit(jax.value_and_grad(local, (0, 1, 2), has_aux=True))
    (value, (out, lse)), gradients = gradient(
        *jax.device_put(inputs, NamedSharding(mesh, spec))
    )
    assert jax.typeof(out).sharding.spec == P(*rows, None)
    assert jax.typeof(lse).sharding.spec == P(*rows)
    for x in gradients:
        assert jax.typeof(x).sharding.spec == P(*spec, *[None] * (4 - len(spec)))
    (expected_value, results), expected_gradients = gradient(*inputs)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    expected = (*results, *expected_gradients)
    for x, y in zip((out, lse, *gradients), expected, strict=True):
        x, y = (np.asarray(array, np.float32) for array in (x, y))
        np.testing.assert_allclose(x, y, atol=1e-4 if dtype == "float32" else 0.03)


def test_vmap_over_an_explicit_axis(cpu_devices, inputs):
    mesh = jax.make_mesh((8,), ("batch",), (AxisType.Explicit,), devices=cpu_devices)
    split = jax.device_put(inputs, NamedSharding(mesh, P("batch")))
    mapped = jax.jit(jax.vmap(tk_jax.attention))
    out = mapped(*split)
    assert jax.typeof(out).sharding.spec == P("batch", None, None, None)
    np.testing.assert_allclose(out, mapped(*inputs), atol=1e-5)
