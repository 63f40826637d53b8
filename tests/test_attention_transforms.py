"""Attention under jax's transformations, on the CPU, in the form every platform traces.

The kernel's form of the same is tested in test_attention_lowering.py by what it lowers
to, and in test_attention_gpu.py by its numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax import _ffi, checkpoint_policies
from tk_jax.ops.attention import attention_reference

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

IMPLEMENTATIONS = [None, "xla"]


def _inputs(batch=(2,), dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return tuple(
        jnp.asarray(rng.standard_normal((*batch, *shape), np.float32), dtype)
        for shape in ((33, 4, 64), (40, 2, 64), (40, 2, 64))
    )


def _loss(q, k, v, **settings):
    """Depends on out and on lse, unevenly."""
    out, lse = tk_jax.attention(q, k, v, is_causal=True, return_lse=True, **settings)
    weights = jnp.cos(jnp.arange(lse.size).reshape(lse.shape))
    return jnp.sum(out * weights[..., None]) + jnp.sum(lse * weights)


def _reference_loss(q, k, v):
    out, lse = attention_reference(q, k, v, is_causal=True)
    weights = jnp.cos(jnp.arange(lse.size).reshape(lse.shape))
    return jnp.sum(out * weights[..., None]) + jnp.sum(lse * weights)


def _gradient(implementation):
    loss = functools.partial(_loss, implementation=implementation)
    return jax.jit(jax.grad(loss, (0, 1, 2)))


def _assert_close(got, expected, tolerance=1e-4):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance),
        got,
        expected,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_grad_and_value_and_grad(implementation):
    inputs = _inputs()
    expected = jax.jit(jax.value_and_grad(_reference_loss, (0, 1, 2)))(*inputs)
    loss = functools.partial(_loss, implementation=implementation)
    _assert_close(jax.jit(loss)(*inputs), expected[0])
    _assert_close(jax.grad(loss, (0, 1, 2))(*inputs), expected[1])
    _assert_close(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"return_lse": True}, {"deterministic": False}], ids=str
)
def test_gradient_of_out_alone(settings):
    inputs = _inputs()

    def loss(attention, q, k, v):
        result = attention(q, k, v)
        return jnp.sum(jnp.sin(jax.tree.leaves(result)[0]))

    ours = functools.partial(tk_jax.attention, **settings)
    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*inputs)
        for f in (ours, attention_reference)
    )
    _assert_close(got, expected)


def _loop(fn, in_axes, *inputs):
    """What vmap means."""
    size = next(
        x.shape[a] for x, a in zip(inputs, in_axes, strict=True) if a is not None
    )
    results = [
        fn(
            *(
                x if axis is None else jnp.take(x, i, axis)
                for x, axis in zip(inputs, in_axes, strict=True)
            )
        )
        for i in range(size)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


def _mapped_inputs(in_axes, size=3):
    def repeat(x, axis):
        if axis is None:
            return x
        return jnp.stack([x * (1 + 0.1 * i) for i in range(size)], axis)

    return [repeat(x, axis) for x, axis in zip(_inputs(), in_axes, strict=True)]


@pytest.mark.parametrize(
    ("implementation", "in_axes"),
    [
        (None, (0, None, None)),
        (None, (None, 0, None)),
        (None, (None, None, 0)),
        (None, (0, 0, 0)),
        (None, (2, 1, 0)),
        ("xla", (0, None, 1)),
    ],
    ids=str,
)
def test_vmap_of_values_and_gradients(in_axes, implementation):
    inputs = _mapped_inputs(in_axes)
    loss = functools.partial(_loss, implementation=implementation)

    value_and_gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    _assert_close(
        jax.jit(jax.vmap(value_and_gradient, in_axes))(*inputs),
        _loop(value_and_gradient, in_axes, *inputs),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_axes", [(0, None, None), (None, 0, 0)], ids=str)
def test_gradient_of_vmap(in_axes, implementation):
    inputs = _mapped_inputs(in_axes)
    loss = functools.partial(_loss, implementation=implementation)

    def total(map_, *x):
        return jnp.sum(map_(*x) * jnp.arange(1.0, 4))

    batched = functools.partial(total, jax.vmap(loss, in_axes))
    looped = functools.partial(total, functools.partial(_loop, loss, in_axes))
    _assert_close(
        jax.jit(jax.grad(batched, (0, 1, 2)))(*inputs),
        jax.jit(jax.grad(looped, (0, 1, 2)))(*inputs),
    )


@pytest.mark.parametrize("transform", [jax.hessian, lambda f: jax.grad(jax.grad(f))])
def test_derivatives_of_higher_order_say_what_has_them(transform):
    x = jnp.ones((4, 1, 8), jnp.bfloat16)

    def loss(scale, **settings):
        q = (scale * x).astype(x.dtype)
        return jnp.sum(tk_jax.attention(q, x, x, **settings).astype(jnp.float32))

    with pytest.raises(NotImplementedError, match="use implementation='xla'"):
        transform(loss)(2.0)
    assert transform(functools.partial(loss, implementation="xla"))(2.0) == 0


def test_vmap_over_more_than_the_kernels_take():
    x = jnp.ones((65536, 1, 1, 8), jnp.bfloat16)
    gradient = jax.grad(lambda q: jnp.sum(jax.vmap(tk_jax.attention)(q, x, x)))
    np.testing.assert_array_equal(jax.vmap(tk_jax.attention)(x, x, x), x)
    np.testing.assert_array_equal(gradient(x), 0 * x)


def test_vmap_over_nothing():
    q, k, v = _inputs(dtype=jnp.bfloat16)
    none = jnp.zeros((0, *q.shape), q.dtype)

    def loss(q, lengths):
        out = tk_jax.attention(q, k, v, query_seq_lengths=lengths)
        return jnp.sum(out.astype(jnp.float32))

    gradients = jax.vmap(jax.grad(loss))(none, jnp.zeros((0, 2), jnp.int32))
    assert gradients.shape == none.shape


def test_nested_vmap():
    q, k, v = _inputs(batch=(3, 2))
    gradient = _gradient(None)
    both = jax.jit(jax.vmap(jax.vmap(gradient, (0, None, None)), (None, 0, 0)))
    got = both(q, k, v)
    for i in range(3):
        for j in range(3):
            expected = gradient(q[j], k[i], v[i])
            _assert_close(jax.tree.map(lambda x, i=i, j=j: x[i, j], got), expected)


def _model(x, weights, attention, wrap=lambda layer: layer):
    """Layers in a scan."""

    def layer(x, w):
        y = x @ w
        return x + attention(y, y[:, :, :2], y[:, :, 2:]), None

    return jnp.sum(jnp.sin(jax.lax.scan(wrap(layer), x, weights)[0]))


def _model_inputs():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, 17, 4, 16), np.float32))
    weights = jnp.asarray(rng.standard_normal((3, 16, 16), np.float32)) / 4
    return x, weights


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "policy",
    ["no remat", None, checkpoint_policies.save_attention],
    ids=["no remat", "remat", "save_attention"],
)
def test_layers_in_a_scan_with_and_without_remat(implementation, policy):
    ours = functools.partial(
        tk_jax.attention, is_causal=True, implementation=implementation
    )

    def wrap(layer):
        return layer if policy == "no remat" else jax.checkpoint(layer, policy=policy)

    got = jax.jit(
        jax.value_and_grad(functools.partial(_model, attention=ours, wrap=wrap), (0, 1))
    )(*_model_inputs())
    defined = functools.partial(
        _model, attention=lambda *x: attention_reference(*x, is_causal=True)[0]
    )
    expected = jax.jit(jax.value_and_grad(defined, (0, 1)))(*_model_inputs())
    _assert_close(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_named_residuals_are_saved_and_others_are_not(implementation):
    def layer(q, k, v):
        # Products, which a policy for names alone leaves to be computed again.
        return tk_jax.attention(
            jnp.sin(q), jnp.sin(k), jnp.sin(v), implementation=implementation
        )

    def saved_shapes(policy):
        remat = jax.checkpoint(layer, policy=policy)
        pull_back = jax.eval_shape(lambda *x: jax.vjp(remat, *x)[1], *_inputs())
        return sorted(x.shape for x in jax.tree.leaves(pull_back))

    q, k, v = (x.shape for x in _inputs())
    assert saved_shapes(None) == sorted([q, k, v])
    saved = saved_shapes(checkpoint_policies.save_attention)
    assert sorted(set(saved)) == sorted({q, k, q[:-1]})
    assert saved.count(q) == 2 and saved.count(q[:-1]) == 1


def test_donated_inputs_are_reused():
    q, k, v = _inputs()
    expected = np.asarray(tk_jax.attention(q, k, v))
    step = jax.jit(tk_jax.attention, donate_argnums=0)
    got = step(q, k, v)
    np.testing.assert_array_equal(got, expected)
    assert q.is_deleted() and not k.is_deleted()


def test_export_round_trip():
    inputs = _inputs()
    gradient = _gradient(None)
    exported = jax.export.export(gradient)(*inputs)
    restored = jax.export.deserialize(exported.serialize())
    _assert_close(restored.call(*inputs), gradient(*inputs), 1e-6)


def test_export_for_cuda_round_trip():
    if _ffi.unavailable():
        pytest.skip(_ffi.unavailable())
    inputs = _inputs(dtype=jnp.bfloat16)
    exported = jax.export.export(
        _gradient(None),
        platforms=["cuda", "cpu"],
        disabled_checks=_ffi.export_checks(),
    )(*inputs)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.platforms == ("cuda", "cpu")
    text = restored.mlir_module()
    assert text.count("@tk_attention_fwd_v1(") == 1
    assert text.count("@tk_attention_bwd_v1(") == 1
    # On this machine, the same artefact runs its other half.
    _assert_close(
        jax.tree.map(np.float32, restored.call(*inputs)),
        jax.tree.map(np.float32, _gradient(None)(*inputs)),
        1e-6,
    )
