"""Ops on every GPU of a machine, alone and as shards of one program.

What a device runs is what the first one runs, so bits are compared; where XLA may put
sums together in another way, values are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tk_jax

pytestmark = pytest.mark.gpu

_TOKENS = (0, 2)  # where arrays [B, T, H, ...] have their batch and heads
_OF_HEADS = (None, 0)
_OF_BATCH = (0, None)


def _attention(**settings):
    run = functools.partial(tk_jax.attention, implementation="tk", **settings)
    shapes = {"q": (200, 4, 64), "k": (300, 2, 64), "v": (300, 2, 64)}
    return run, {name: (shape, _TOKENS) for name, shape in shapes.items()}


def _matmul():
    run = functools.partial(tk_jax.matmul, implementation="tk")
    return run, {"a": ((200, 96), _OF_BATCH), "b": ((96, 136), _OF_BATCH)}


def _ssd():
    def run(x, dt, A, B, C, D):
        dt, A = dt.astype(jnp.float32), -jnp.exp(A.astype(jnp.float32))
        D = D.astype(jnp.float32)
        settings = {"D": D, "dt_softplus": True, "implementation": "tk"}
        return tk_jax.ssd(x, dt, A, B, C, **settings)

    shapes = {"x": (200, 4, 64), "dt": (200, 4), "B": (200, 2, 64), "C": (200, 2, 64)}
    arrays = {name: (shape, _TOKENS) for name, shape in shapes.items()}
    return run, arrays | {"A": ((4,), _OF_HEADS), "D": ((4,), _OF_HEADS)}


def _linear_attention():
    def run(q, k, v, log_decay):
        log_decay = -jnp.exp(log_decay.astype(jnp.float32))
        settings = {"log_decay": log_decay, "implementation": "tk"}
        return tk_jax.linear_attention(q, k, v, **settings)

    shapes = {"q": (200, 2, 64), "k": (200, 2, 64), "v": (200, 4, 64)}
    shapes["log_decay"] = (200, 4)
    return run, {name: (shape, _TOKENS) for name, shape in shapes.items()}


def _based_attention():
    run = functools.partial(tk_jax.based_attention, implementation="tk")
    shapes = {"q": (200, 4, 16), "k": (200, 4, 16), "v": (200, 4, 64)}
    return run, {name: (shape, _TOKENS) for name, shape in shapes.items()}


def _hedgehog_attention():
    run = functools.partial(
        tk_jax.hedgehog_attention, alpha=0.5, beta=0.8, implementation="tk"
    )
    arrays = dict.fromkeys("qkv", ((200, 4, 64), _TOKENS))
    maps = dict.fromkeys(("q_map", "k_map"), ((4, 64, 64), _OF_HEADS))
    return run, arrays | maps


OPS = {
    "attention": _attention,
    "attention-causal": functools.partial(_attention, is_causal=True),
    "matmul": _matmul,
    "ssd": _ssd,
    "linear_attention": _linear_attention,
    "based_attention": _based_attention,
    "hedgehog_attention": _hedgehog_attention,
}


@pytest.fixture(params=OPS)
def op(request):
    """What runs and differentiates an op, its arrays, and where their axes are."""
    run, arrays = OPS[request.param]()
    batch = 2 * len(jax.devices())
    axes = {name: axes for name, (_, axes) in arrays.items()}
    keys = jax.random.split(jax.random.key(0), len(arrays))
    inputs = {
        name: jax.random.normal(
            key, shape if where is _OF_HEADS else (batch, *shape), jnp.bfloat16
        )
        for key, (name, (shape, where)) in zip(keys, arrays.items(), strict=True)
    }

    def values_and_gradients(arrays):
        out, pull_back = jax.vjp(lambda arrays: run(**arrays), arrays)
        weights = jnp.cos(jnp.arange(out.shape[-1], dtype=jnp.float32))
        dout = jnp.broadcast_to(weights, out.shape).astype(out.dtype)
        return out, pull_back(dout + jnp.zeros_like(out))[0]

    return values_and_gradients, inputs, axes


@pytest.fixture
def devices():
    devices = jax.devices()
    if len(devices) == 1:
        pytest.skip("needs more than one GPU")
    return devices


def _assert_same_bits(got, expected):
    got, expected = map(jax.device_get, (got, expected))
    for path, x in jax.tree.leaves_with_path(got):
        assert np.isfinite(np.float32(x)).all(), path
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), got, expected)
    assert all(jax.tree.leaves(same)), same


def _assert_close(got, expected):
    got, expected = np.float32(got), np.float32(expected)
    np.testing.assert_allclose(
        got, expected, atol=0.02 * np.abs(expected).max(), rtol=0
    )


def test_every_device_computes_the_same(op, devices):
    run, inputs, _ = op
    runs = [jax.jit(run)(jax.device_put(inputs, device)) for device in devices]
    for device, results in zip(devices, runs, strict=True):
        assert jax.tree.leaves(results)[0].devices() == {device}
        _assert_same_bits(results, runs[0])


@pytest.mark.parametrize("of", ["batch", "heads"])
def test_shards_are_calls_of_their_own(op, devices, of):
    run, inputs, axes = op
    shards = 2  # heads of keys
    axes = {name: where[("batch", "heads").index(of)] for name, where in axes.items()}
    if all(axis is None for axis in axes.values()):
        pytest.skip(f"has no {of}")
    # What has no such axis becomes an array of copies: one of each shard's own.
    for name, axis in axes.items():
        if axis is None:
            inputs[name] = jnp.stack([inputs[name]] * shards)
    copied = [name for name, axis in axes.items() if axis is None]

    def local(arrays):
        own = arrays | {name: arrays[name][0] for name in copied}
        out, gradients = run(own)
        more = {name: gradients[name][None] for name in copied}
        return out, gradients | more

    def spec(axis):
        return P() if axis is None else P(*[None] * axis, "shard")

    mesh = jax.make_mesh(
        (shards,), ("shard",), (AxisType.Auto,), devices=devices[:shards]
    )
    axes |= dict.fromkeys(copied, 0)
    specs = {name: spec(axis) for name, axis in axes.items()}
    out_axis = 0 if of == "batch" else 2
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(specs,), out_specs=(spec(out_axis), specs)
    )
    out, gradients = jax.jit(sharded)(inputs)

    def piece(x, axis, index):
        return jnp.split(jax.device_put(x, devices[0]), shards, axis)[index]

    for index in range(shards):
        mine = {name: piece(x, axes[name], index) for name, x in inputs.items()}
        expected_out, expected = jax.jit(local)(mine)
        _assert_same_bits(piece(out, out_axis, index), expected_out)
        for name, x in gradients.items():
            _assert_close(piece(x, axes[name], index), expected[name])


def test_sharded_arrays_outside_of_shard_map(op, devices):
    run, inputs, axes = op
    mesh = jax.make_mesh((2,), ("shard",), (AxisType.Auto,), devices=devices[:2])
    sharded = {
        name: jax.device_put(
            x, NamedSharding(mesh, P() if axes[name][0] is None else P("shard"))
        )
        for name, x in inputs.items()
    }
    got, expected = jax.jit(run)(sharded), jax.jit(run)(inputs)
    jax.tree.map(_assert_close, got, expected)
