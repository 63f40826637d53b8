"""Gradients of queries whose keys all are behind a mask that is added to their scores.

There lse is a number like -1e9 and has no digits left for how many keys it is the sum
over. Plain differentiation of a softmax does not need them.
"""

import functools

import attention_score_cases as score_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

import tk_jax
from tk_jax.ops.attention import xla

IMPLEMENTATIONS = ["xla", "interpret", pytest.param("tk", marks=pytest.mark.gpu)]
SCALE = 0.125  # Of products of small integers: scores are exact, beside -2**20 too.
# T, S, head dims of q and k and of v, dtype, the bias's dtype, its value for hidden
# keys, and settings.
CASES = {
    "fp32": (70, 90, 64, 64, "float32", "float32", -(2.0**20), {}),
    "digits-left": (70, 90, 64, 64, "bfloat16", "bfloat16", -(2.0**20), {}),
    "no-digits-left": (65, 150, 128, 128, "bfloat16", "float32", -1e9, {}),
    "least": (70, 90, 64, 64, "bfloat16", "bfloat16", "least", {"is_causal": True}),
    "fp16": (70, 90, 64, 64, "float16", "float16", "least", {}),
    "sinks": (70, 90, 64, 64, "bfloat16", "float32", -1e9, {"sinks": -1e9}),
    "cap": (70, 90, 64, 64, "bfloat16", "bfloat16", -1e9, {"logits_soft_cap": 9.0}),
    "wide": (97, 113, 256, 256, "bfloat16", "bfloat16", -1e9, {"is_causal": True}),
    # Its largest error is one of few queries': 300 of them for another tile to match.
    "wide-cap": (300, 90, 192, 128, "float16", "float32", -1e9, {"logits_soft_cap": 9}),
}


def _inputs(case):
    seqlen_q, seqlen_kv, dim, dim_v, dtype, bias_dtype, hidden, settings = CASES[case]
    heads = 2
    rng = np.random.default_rng(len(case))
    q, k = (
        rng.integers(-1, 2, (1, *shape, dim)).astype(np.float32)
        for shape in ((seqlen_q, heads), (seqlen_kv, 1))
    )
    v = rng.standard_normal((1, seqlen_kv, 1, dim_v))
    cotangents = (
        jnp.asarray(rng.standard_normal((1, seqlen_q, heads, dim_v)), dtype),
        jnp.asarray(rng.standard_normal((1, seqlen_q, heads)), jnp.float32),
    )
    if hidden == "least":
        hidden = float(jnp.finfo(bias_dtype).min)
    shown = rng.random((1, heads, seqlen_q, seqlen_kv)) < 0.6
    shown[:, :, 3:40:4] = False  # These queries see nothing else.
    bias = jnp.asarray(np.where(shown, 0, hidden), bias_dtype)
    settings = dict(settings)
    sinks = settings.pop("sinks", None)
    if sinks is not None:
        sinks = jnp.full(heads, sinks, jnp.float32)
    arrays = *(jnp.asarray(x, dtype) for x in (q, k, v)), bias, sinks
    return arrays, cotangents, settings


def _dot(equation, a, b):
    wide = jnp.promote_types(jnp.float32, a.dtype)
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=wide)


def _scores(q, k, bias, *, is_causal=False, logits_soft_cap=None):
    """[B, H, T, S] in float32, of float64 inputs in that."""
    k = jnp.repeat(k, q.shape[2], 2)
    s = jax.lax.optimization_barrier(_dot("bthd,bshd->bhts", q, k) * SCALE)
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    s = jax.lax.optimization_barrier(s + bias.astype(s.dtype))
    if is_causal:
        s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, -jnp.inf)
    return s


def _softmax(s, sinks):
    """The weights of the keys, that of the sink in the end if there is one, and lse."""
    if sinks is not None:
        column = jnp.broadcast_to(
            sinks.astype(s.dtype)[:, None, None], (*s.shape[:3], 1)
        )
        s = jnp.concatenate([s, column], -1)
    return jax.nn.softmax(s), jnp.swapaxes(jax.nn.logsumexp(s, -1), 1, 2)


def _plain(q, k, v, bias, sinks, **settings):
    """out and lse, for plain differentiation."""
    p, lse = _softmax(_scores(q, k, bias, **settings), sinks)
    v = jnp.repeat(v, q.shape[2], 2)
    p = p[..., : k.shape[1]].astype(v.dtype)
    return _dot("bhts,bshd->bthd", p, v).astype(q.dtype), lse


def _low_precision(settings, q, k, v, bias, sinks, dout, dlse):
    """Results and gradients with what kernels round rounded: p, ds, and delta's out."""
    dtype = q.dtype
    s, transpose = jax.vjp(functools.partial(_scores, **settings), q, k, bias)
    p, lse = _softmax(s, sinks)
    keys_p = p[..., : k.shape[1]]
    values = jnp.repeat(v, q.shape[2], 2)
    out = _dot("bhts,bshd->bthd", keys_p.astype(dtype), values).astype(dtype)
    delta = (out.astype(p.dtype) * dout.astype(p.dtype)).sum(-1) - dlse
    delta = jnp.swapaxes(delta, 1, 2)[..., None]
    ds = keys_p * (_dot("bthd,bshd->bhts", dout, values) - delta)
    dq, dk, _ = transpose(ds.astype(dtype).astype(ds.dtype))
    dv = _dot("bhts,bthd->bshd", keys_p.astype(dtype), dout)
    dv = dv.sum(2, keepdims=True).astype(dtype)
    dsinks = None if sinks is None else -(p[..., -1:] * delta).sum((0, 2, 3))
    return out, lse, dq, dk, dv, transpose(ds)[2], dsinks


def _attention(implementation, settings):
    def attention(q, k, v, bias, sinks):
        return tk_jax.attention(
            q,
            k,
            v,
            bias=bias,
            sinks=sinks,
            scale=SCALE,
            return_lse=True,
            implementation=implementation,
            **settings,
        )

    return attention


def _results(attention, arrays, cotangents):
    @jax.jit
    def run(arrays, cotangents):
        results, transpose = jax.vjp(attention, *arrays)
        cotangents = [
            c.astype(x.dtype) for c, x in zip(cotangents, results, strict=True)
        ]
        return *results, *transpose(tuple(cotangents))

    return run(arrays, cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, implementation):
    arrays, cotangents, settings = _inputs(case)
    if arrays[0].dtype == jnp.float32 and implementation != "xla":
        pytest.skip("the kernels take 16 bits")
    plain = functools.partial(_plain, **settings)
    # In float64, -1e9 would not take the scores' digits.
    exact_dtype = jnp.float64 if CASES[case][6] == -(2.0**20) else jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(exact_dtype), arrays)
        exact = jax.tree.map(np.asarray, _results(plain, wide, cotangents))
    low = jax.jit(functools.partial(_low_precision, settings))(*arrays, *cotangents)
    got = _results(_attention(implementation, settings), arrays, cotangents)
    for name, x, y, z in zip(score_cases.NAMES, got, exact, low, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert_close(x, y, z, what=f"{case} {name}")


def test_forward_mode_and_its_derivative():
    arrays, _, settings = _inputs("fp32")
    tangents = jax.tree.map(jnp.sin, arrays)

    def derivatives(attention):
        def first(*arrays):
            return jax.jvp(attention, arrays, tangents)

        return jax.jvp(first, arrays, tangents)

    got = derivatives(_attention("xla", settings))
    exact = derivatives(functools.partial(_plain, **settings))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * np.abs(y).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beside_common_scores_a_cotangent_keeps_every_bit(dtype):
    """Where lse is 64 at most, rounding took off half a unit of 2**-18 at most."""
    numbers = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    size = np.abs(numbers.astype(np.float32))
    numbers = numbers[np.isfinite(size) & (size > np.finfo(np.float32).tiny)]
    for rest in (2.0**-19, -(2.0**-19)):
        same = xla.corrected(
            jnp.asarray(numbers)[:, None], jnp.full(len(numbers), rest)
        )
        np.testing.assert_array_equal(same[:, 0], numbers)
