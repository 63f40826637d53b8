"""Soft cap, sinks and bias in attention's kernels, run and checked on the CPU."""

import functools

import attention_score_cases as score_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case

import tk_jax

pytestmark = [
    pytest.mark.skipif(
        jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
    ),
    pytest.mark.slow,  # kernels are compiled when they are asked for
]


# Each is a kernel or two to be compiled: these combine what others have one by one.
_SELDOM = [score_cases.CASES[i] for i in (2, 4, 9, 11, 13, 14, 19, 20, 23, 24, 25)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=[pytest.mark.exhaustive] if x in _SELDOM else [])
        for x in score_cases.CASES
    ],
    ids=str,
)
def test_results_and_gradients(case):
    inputs = case.inputs()
    got = score_cases.run(case, inputs, implementation="interpret")
    score_cases.assert_all_close(case, inputs, got)


def test_every_schedule_gives_the_same_bits():
    case = score_cases.CASES[0]
    inputs = case.inputs()

    def bits():
        results = score_cases.run(case, inputs, implementation="interpret")
        return [np.asarray(x).tobytes() for x in results if x is not None]

    first = bits()
    for seed in (1, 2):
        with tk_jax.interpret_options(seed=seed):
            assert bits() == first


def test_vmap_over_sinks():
    """Each element has its sinks and, where they are shared, a gradient of its own."""
    case = score_cases.CASES[5]
    q, k, v, *_, sinks = case.inputs()

    def loss(implementation, q, sinks):
        out = tk_jax.attention(q, k, v, sinks=sinks, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def gradients(implementation, axes):
        gradient = jax.grad(functools.partial(loss, implementation), argnums=(0, 1))
        arrays = [
            x if axis is None else jnp.stack([x, x[..., ::-1]])
            for x, axis in zip((q, sinks), axes, strict=True)
        ]
        return jax.jit(jax.vmap(gradient, axes))(*arrays)

    for axes in ((0, None), (None, 0)):
        got, expected = (gradients(name, axes) for name in ("interpret", "xla"))
        for x, y in zip(got, expected, strict=True):
            x, y = (np.asarray(array, np.float32) for array in (x, y))
            np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


def test_values_that_are_no_numbers():
    """A bad sink spoils its head alone; one of minus infinity is none."""
    case = score_cases.CASES[5]
    q, k, v, *_ = case.inputs()
    run = functools.partial(tk_jax.attention, q, k, v, return_lse=True)
    run = functools.partial(run, implementation="interpret", is_causal=True)
    sinks = np.array([0.5, np.nan, np.inf, -np.inf], np.float32)
    out, lse = run(sinks=sinks)
    plain_out, plain_lse = run()
    bad = np.array([False, True, True, False])
    for x in (out, lse):
        by_head = np.moveaxis(np.isnan(np.asarray(x, np.float32)), 2, 0)
        np.testing.assert_array_equal(by_head.all(tuple(range(1, by_head.ndim))), bad)
        np.testing.assert_array_equal(by_head.any(tuple(range(1, by_head.ndim))), bad)
    np.testing.assert_array_equal(out[:, :, 3], plain_out[:, :, 3])
    np.testing.assert_allclose(lse[:, :, 3], plain_lse[:, :, 3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden_by", ["lengths", "segments", "mask"])
@pytest.mark.parametrize(
    "head_dim", [64, pytest.param(192, marks=pytest.mark.exhaustive)]
)
def test_beside_what_hides_keys(hidden_by, head_dim):
    """A bias and sinks, and their gradients, where arrays hide keys and queries."""
    rng = np.random.default_rng(3)
    batch, seqlen_q, seqlen_kv, heads = 2, 150, 139, 2
    q, k, v, dout, dlse = Case(batch, seqlen_q, seqlen_kv, heads, 1, head_dim).inputs()
    bias = rng.standard_normal((1, heads, seqlen_q, seqlen_kv), np.float32)
    sinks = rng.standard_normal(heads, np.float32)
    settings = {
        "lengths": {
            "query_seq_lengths": np.array([150, 61], np.int32),
            "key_value_seq_lengths": np.array([40, 139], np.int32),
            "is_causal": True,
        },
        "segments": {
            "q_segment_ids": np.sort(rng.integers(0, 4, (batch, seqlen_q), np.int32)),
            "kv_segment_ids": np.sort(rng.integers(0, 4, (batch, seqlen_kv), np.int32)),
        },
        "mask": {"mask": rng.random((batch, 1, seqlen_q, seqlen_kv)) < 0.7},
    }[hidden_by]

    def results(implementation):
        def attention(q, k, v, bias, sinks):
            return tk_jax.attention(
                q,
                k,
                v,
                bias=bias,
                sinks=sinks,
                return_lse=True,
                implementation=implementation,
                **settings,
            )

        results, transpose = jax.vjp(attention, q, k, v, bias, sinks)
        return *results, *transpose((dout, dlse))

    got, expected = (
        jax.jit(results, static_argnums=0)(x) for x in ("interpret", "xla")
    )
    for name, x, y in zip(score_cases.NAMES, got, expected, strict=True):
        x, y = (np.asarray(array, np.float32) for array in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max(), err_msg=name)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-46, -1e-40])
def test_scale_need_not_be_positive_nor_normal(scale):
    q, k, v, dout, _ = Case(1, 64, 70, 1, 1, 64).inputs()

    def results(implementation):
        attention = functools.partial(
            tk_jax.attention, scale=scale, implementation=implementation
        )
        out, transpose = jax.vjp(attention, q, k, v)
        return out, *transpose(dout)

    for x, y in zip(results("interpret"), results("xla"), strict=True):
        x, y = (np.asarray(array, np.float32) for array in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


@pytest.mark.parametrize("sinks", [None, np.finfo(np.float32).min])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("head_dim", [64, 192])
def test_masks_that_are_added_as_the_least_number(dtype, sinks, soft_cap, head_dim):
    """Padding at the end, and a row without anything else."""
    q, k, v, dout, _ = Case(1, 64, 304, 2, 1, head_dim).inputs()
    shown = (np.arange(304) < 40) & (np.arange(64) != 3)[:, None]
    bias = jnp.where(shown, 0, jnp.finfo(dtype).min).astype(dtype)
    bias = bias.at[7, 280].set(jnp.finfo(dtype).max)  # all the weight of its row
    if sinks is not None:
        sinks = jnp.full(2, sinks)
        shown &= (np.arange(64) != 5)[:, None]  # sees nothing but a sink

    def results(implementation):
        def attention(q, k, v, bias, sinks):
            return tk_jax.attention(
                q,
                k,
                v,
                bias=bias,
                sinks=sinks,
                mask=None if sinks is None else jnp.asarray(shown),
                logits_soft_cap=soft_cap,
                implementation=implementation,
            )

        out, transpose = jax.vjp(attention, q, k, v, bias, sinks)
        return jax.tree.leaves((out, transpose(dout)))

    for x, y in zip(results("interpret"), results("xla"), strict=True):
        x, y = (np.asarray(array, np.float32) for array in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())
