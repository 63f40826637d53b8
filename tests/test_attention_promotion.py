"""Attention where jax is set to refuse promotion: no rank or dtype is left to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax.nn import dot_product_attention

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

B, T, S, H, K, D = 2, 9, 7, 4, 2, 8
_LENGTHS = jnp.array([3, 4], jnp.int32)
_SETTINGS = {
    "none": {},
    "causal": {"is_causal": True, "local_window_size": (3, 1)},
    "lengths": {"query_seq_lengths": _LENGTHS, "key_value_seq_lengths": _LENGTHS},
    "bottom_right": {
        "is_causal": True,
        "causal_align": "bottom_right",
        "key_value_seq_lengths": _LENGTHS,
    },
    "segments": {
        "q_segment_ids": jnp.arange(T, dtype=jnp.int32) // 4,
        "kv_segment_ids": jnp.zeros((B, S), jnp.int32),
    },
    "mask": {"mask": jnp.tri(T, S, dtype=bool)},
    "scores": {"bias": jnp.ones((T, S)), "sinks": jnp.ones(H), "logits_soft_cap": 3.0},
}
_SETTINGS["all"] = functools.reduce(dict.__or__, _SETTINGS.values())


@pytest.fixture(autouse=True)
def strict():
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


def _check(attention, q, k, v, settings):
    floating = {
        k: x
        for k, x in settings.items()
        if isinstance(x, jax.Array) and x.dtype.kind in "f"
    }
    fixed = {k: x for k, x in settings.items() if k not in floating}

    def loss(arrays, floating):
        out, lse = attention(*arrays, **floating, **fixed)
        lse = jnp.where(jnp.isinf(lse), 0, lse).astype(jnp.float32)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    got = gradient((q, k, v), floating)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = gradient((q, k, v), floating)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def _inputs(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return [jax.random.normal(*x, dtype) for x in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", _SETTINGS)
def test_attention(name, dtype):
    attention = functools.partial(tk_jax.attention, return_lse=True)
    _check(attention, *_inputs(dtype), _SETTINGS[name])


def test_what_is_around_the_kernels():
    attention = functools.partial(
        tk_jax.attention, return_lse=True, implementation="interpret"
    )
    _check(attention, *_inputs(jnp.bfloat16), _SETTINGS["all"])


def test_drop_in():
    attention = functools.partial(dot_product_attention, return_residual=True)
    settings = _SETTINGS["lengths"] | _SETTINGS["mask"] | {"bias": jnp.ones((T, S))}
    settings["scale"] = jnp.float32(0.4)
    _check(attention, *_inputs(jnp.bfloat16), settings)
