"""Attention under ``jax.export`` with symbolic shapes: XLA, whatever sizes come."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import tk_jax
from tk_jax.nn import dot_product_attention

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

_BATCH = {"q": "b, 9, 4, 8", "k": "b, 7, 2, 8", "v": "b, 7, 2, 8"}
_LENGTHS = {"q": "b, t, 4, 8", "k": "b, s, 2, 8", "v": "b, s, 2, 8"}
_EXTRAS = {
    "query_seq_lengths": ("b", jnp.int32),
    "key_value_seq_lengths": ("b", jnp.int32),
    "q_segment_ids": ("b, t", jnp.int32),
    "kv_segment_ids": ("b, s", jnp.int32),
    "mask": ("b, 1, t, s", jnp.bool_),
    "bias": ("4, t, s", jnp.float32),
    "sinks": ("4", jnp.float32),
}


def _array(rng, shape, dtype, sizes):
    shape = tuple(sizes.get(x, x) for x in shape.split(", "))
    shape = tuple(int(x) for x in shape)
    if dtype == jnp.int32:
        return jnp.asarray(rng.integers(1, 4, shape), dtype)
    if dtype == jnp.bool_:
        return jnp.asarray(rng.random(shape) < 0.7)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def _check(shapes, dtypes, every_sizes, gradient, attention=tk_jax.attention, **kw):
    """Exports once for symbols, and compares for each of ``every_sizes``."""
    scope = export.SymbolicScope()
    specs = {
        name: jax.ShapeDtypeStruct(
            export.symbolic_shape(shape, scope=scope), dtypes[name]
        )
        for name, shape in shapes.items()
    }

    def run(arrays, attention=attention, **kw):
        result = attention(**arrays, **kw)
        loss = sum(
            jnp.sum(jnp.sin(jnp.where(jnp.isinf(x), 0, x).astype(jnp.float32)))
            for x in jax.tree.leaves(result)
        )
        return loss, result

    def call(arrays, **kw):
        if not gradient:
            return run(arrays, **kw)
        floating = jnp.floating
        varied = {k for k, x in arrays.items() if jnp.issubdtype(x.dtype, floating)}
        fixed = {k: x for k, x in arrays.items() if k not in varied}
        return jax.value_and_grad(lambda x: run(x | fixed, **kw), has_aux=True)(
            {k: arrays[k] for k in varied}
        )

    exported = export.export(jax.jit(functools.partial(call, **kw)))(specs)
    exported = export.deserialize(exported.serialize())
    rng = np.random.default_rng(0)
    tolerance = 3e-2 if dtypes["q"] == jnp.bfloat16 else 1e-4
    for sizes in every_sizes:
        arrays = {k: _array(rng, x, dtypes[k], sizes) for k, x in shapes.items()}
        expected = jax.jit(functools.partial(call, **kw))(arrays)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                np.float32(x), np.float32(y), atol=tolerance, rtol=tolerance
            ),
            exported.call(arrays),
            expected,
        )


def _dtypes(dtype):
    return dict.fromkeys(("q", "k", "v"), dtype)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda x: x.__name__)
def test_symbolic_batch(dtype, implementation, gradient):
    _check(
        _BATCH,
        _dtypes(dtype),
        [{"b": 3}],
        gradient,
        is_causal=True,
        return_lse=True,
        implementation=implementation,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "is_causal": True,
            "causal_align": "bottom_right",
            "local_window_size": (90, 2),
        },
        {"local_window_size": (3, 2**31)},
    ],
    ids=["full", "bottom_right", "window"],
)
def test_symbolic_lengths(settings):
    # As many keys as a chunk has, and more; more queries than a block.
    sizes = [(1, 512), (700, 1100)]
    _check(
        _LENGTHS,
        _dtypes(jnp.float32),
        [{"b": 2, "t": t, "s": s} for t, s in sizes],
        gradient=True,
        return_lse=True,
        **settings,
    )


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_symbolic_extras(align):
    _check(
        _LENGTHS | {name: shape for name, (shape, _) in _EXTRAS.items()},
        _dtypes(jnp.float32) | {name: dtype for name, (_, dtype) in _EXTRAS.items()},
        [{"b": 2, "t": 9, "s": 7}, {"b": 1, "t": 5, "s": 530}],
        gradient=True,
        is_causal=True,
        causal_align=align,
        return_lse=True,
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ("2, 9, 4, 8", "2, s, 2, 8", "2, s, 2, 8"),
        ("2, t, 4, 8", "2, 7, 2, 8", "2, 7, 2, 8"),
        ("2, 9, h, 8", "2, 7, h, 8", "2, 7, h, 8"),
        ("2, 9, 4, 8", "2, 7, 2, 8", "2, 7, 2, e"),
    ],
    ids=["keys", "queries", "heads", "value dim"],
)
def test_one_symbol(shapes):
    sizes = {"s": 600, "t": 600, "h": 3, "e": 5}
    shapes = dict(zip(("q", "k", "v"), shapes, strict=True))
    _check(shapes, _dtypes(jnp.bfloat16), [sizes], True, is_causal=True)


def test_drop_in_takes_symbols():
    shapes = {"query": "b, t, 4, 8", "key": "b, t, 2, 8", "value": "b, t, 2, 8"}
    dtypes = dict.fromkeys((*shapes, "q"), jnp.bfloat16)
    sizes = [{"b": 2, "t": 9}]
    _check(shapes, dtypes, sizes, True, dot_product_attention, is_causal=True)


def test_mapped_over_a_symbolic_axis():
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("b, 9, 4, 8"), jnp.bfloat16)
    run = jax.jit(jax.vmap(lambda x: tk_jax.attention(x, x, x)))
    x = jax.random.normal(jax.random.key(0), (3, 9, 4, 8), jnp.bfloat16)
    np.testing.assert_array_equal(
        np.float32(export.export(run)(spec).call(x)), np.float32(run(x))
    )


@pytest.mark.parametrize("implementation", ["tk", "interpret"])
def test_kernels_are_not_for_symbols(implementation):
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("b, 9, 4, 8"), jnp.bfloat16)
    run = jax.jit(lambda x: tk_jax.attention(x, x, x, implementation=implementation))
    message = (
        f"attention: implementation='{implementation}' does not support "
        "the symbolic size b (it takes sizes that are numbers)"
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        export.export(run)(spec)
    choice = tk_jax.explain(tk_jax.attention, spec, spec, spec)
    assert (choice.cuda, choice.elsewhere) == ("xla", "xla")


def test_head_dim_is_a_number():
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("2, 9, 4, d"), jnp.float32)
    message = re.escape("q has shape (2, 9, 4, d); expected a number for D")
    with pytest.raises(ValueError, match=message):
        export.export(jax.jit(lambda x: tk_jax.attention(x, x, x)))(spec)
