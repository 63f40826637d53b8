"""The XLA implementation of attention: accuracy, memory, derivatives of any order."""

import functools
import itertools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, Case
from jax.test_util import check_grads
from tolerance import assert_close

import tk_jax
from tk_jax.ops.attention import attention_reference, config, tiling, xla

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

_NAMES = ("out", "lse", "dq", "dk", "dv")
# One in eight: all of them test the kernel, on the GPU.
_CASES = [case for case in CASES if case.scores < 7e5][::8]
_FP32 = [
    Case(2, 97, 113, 4, 2, 80, "bottom_right", "fp32"),
    Case(1, 600, 1100, 2, 1, 32, "causal", "fp32"),
    Case(1, 1100, 600, 2, 1, 32, "bottom_right", "fp32"),
    Case(3, 5, 3, 3, 1, 1, "full", "fp32"),
]


@functools.partial(jax.jit, static_argnums=0)
def _forward_and_backward(settings, q, k, v, dout, dlse):
    attention = functools.partial(tk_jax.attention, return_lse=True, **dict(settings))
    (out, lse), transpose = jax.vjp(attention, q, k, v)
    return out, lse, *transpose((dout, dlse))


def _check(case, implementation):
    inputs = case.inputs()
    settings = {**case.settings, "implementation": implementation}
    got = _forward_and_backward(tuple(settings.items()), *inputs)
    exact = attention_cases.reference_f64(case, *inputs)
    low = attention_cases.low_precision(case, *inputs)
    floors = attention_cases.floors(case, *inputs[:4])
    for name, *arrays, floor in zip(_NAMES, got, exact, low, floors, strict=True):
        assert_close(*arrays, what=name, floor=floor)


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_is_as_exact_as_plain_xla(case):
    _check(case, None)


@pytest.mark.parametrize("case", _FP32, ids=str)
def test_takes_float32_and_any_head_dim(case):
    _check(case, None)


def test_is_as_exact_without_the_custom_rules():
    _check(_FP32[1], "xla")
    _check(Case(1, 193, 193, 2, 1, 64, "causal", gain=30), "xla")


@pytest.mark.parametrize("mask", ["full", "causal", "bottom_right"])
def test_reference_is_the_definition(mask):
    case = Case(2, 33, 20, 4, 2, 16, mask, "fp32")
    q, k, v, dout, dlse = case.inputs()
    exact = attention_cases.reference_f64(case, q, k, v, dout, dlse)
    low = attention_cases.low_precision(case, q, k, v, dout, dlse)
    q, k, v = map(jnp.asarray, (q, k, v))
    got = attention_reference(q, k, v, **case.settings)
    for name, *arrays in zip(_NAMES, got, exact, low, strict=False):
        assert_close(*arrays, what=name)


def test_scale_multiplies_the_scores():
    q, k, v, *_ = (jnp.asarray(x) for x in Case(1, 9, 11, 2, 1, 64).inputs())
    got = tk_jax.attention(q, k, v, scale=0.5)
    scaled = tk_jax.attention(q * 0.5 * 8, k, v)
    np.testing.assert_array_equal(got, scaled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seqlen_kv", [7, 300, 700])
def test_scores_of_billions_leave_one_key(seqlen_kv, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, n, 1, 64)), dtype)
        for n in (64, seqlen_kv, seqlen_kv)
    )

    def out_and_dv(attention):
        out, transpose = jax.vjp(lambda v: attention(q, k, v, scale=1e9), v)
        return out, *transpose(jnp.ones_like(out))

    got = out_and_dv(functools.partial(tk_jax.attention, implementation="xla"))
    plain = out_and_dv(jax.nn.dot_product_attention)
    for x, y in zip(got, plain, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_scale_need_not_be_positive(scale, mask):
    case = Case(1, 9, 11, 2, 1, 64, mask, "fp32")
    q, k, v, *_ = (jnp.asarray(x) for x in case.inputs())

    def total(attention, q):
        out, lse = attention(q, k, v, scale=scale, **case.settings)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse), (out, lse)

    got, expected = (
        jax.value_and_grad(functools.partial(total, attention), has_aux=True)(q)
        for attention in (
            functools.partial(tk_jax.attention, return_lse=True),
            attention_reference,
        )
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_causal_rows_see_what_the_alignment_says():
    seqlen_q, seqlen_kv = 3, 5
    q = jnp.zeros((1, seqlen_q, 1, 8))
    v = jnp.broadcast_to(jnp.arange(seqlen_kv * 1.0)[None, :, None, None], (1, 5, 1, 8))
    k = jnp.zeros_like(v)
    for align, expected in (
        ("top_left", [0, 0.5, 1]),
        ("bottom_right", [1, 1.5, 2]),
    ):
        out = tk_jax.attention(q, k, v, is_causal=True, causal_align=align)
        np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rows_without_keys(implementation, dtype):
    case = Case(1, 700, 90, 2, 1, 64, "bottom_right", dtype)
    settings = {**case.settings, "implementation": implementation}
    out, lse, dq, dk, dv = _forward_and_backward(
        tuple(settings.items()), *case.inputs()
    )
    blind = case.seqlen_q - case.seqlen_kv
    assert not np.any(out[:, :blind])
    assert np.all(np.isneginf(lse[:, :blind]))
    assert not np.any(dq[:, :blind])
    assert np.all(np.isfinite(lse[:, blind:]))
    assert np.any(dq[:, blind:]) and np.any(dk) and np.any(dv)
    for gradient in (dq, dk, dv):
        assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_keys_all_out_of_sight_give_zero_gradients():
    # No block of queries visits a single chunk, or only rows without keys remain.
    q, k = jnp.ones((1, 600, 1, 8)), jnp.ones((1, 1, 1, 8))

    def loss(q, k, v):
        out = tk_jax.attention(
            q, k, v, is_causal=True, causal_align="bottom_right", implementation="xla"
        )
        return out[:, :-1].sum()

    for gradient in jax.grad(loss, (0, 1, 2))(q, k, k):
        assert not np.any(gradient)


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_batch_dimensions(batch, rng):
    q = rng.standard_normal((*batch, 9, 4, 16), np.float32)
    k = rng.standard_normal((*batch, 7, 2, 16), np.float32)
    v = rng.standard_normal((*batch, 7, 2, 16), np.float32)
    out, lse = tk_jax.attention(q, k, v, return_lse=True)
    expected_out, expected_lse = attention_reference(*map(jnp.asarray, (q, k, v)))
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    dq = jax.grad(lambda q: tk_jax.attention(q, k, v).sum())(jnp.asarray(q))
    assert dq.shape == q.shape


def test_float64_stays_float64(rng):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.standard_normal((1, 5, 2, 8))) for _ in range(3))
        out, lse = tk_jax.attention(q, k, v, return_lse=True)
        expected_out, expected_lse = attention_reference(q, k, v, dtype=jnp.float64)
        assert out.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(out, expected_out, rtol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)


@pytest.mark.parametrize(
    "mask",
    ["full", pytest.param("causal", marks=pytest.mark.exhaustive), "bottom_right"],
)
def test_derivatives_of_first_and_second_order_in_both_modes(mask, monkeypatch, rng):
    # Small chunks and blocks, so that several are visited.
    monkeypatch.setattr(xla, "BLOCK_Q", 3)
    monkeypatch.setattr(xla, "CHUNK_KV", 2)
    with jax.enable_x64(True):
        q = jnp.asarray(rng.standard_normal((1, 7, 2, 3)))
        k, v = (jnp.asarray(rng.standard_normal((1, 5, 1, 3))) for _ in range(2))

        def attention(q, k, v):
            out, lse = tk_jax.attention(
                q,
                k,
                v,
                return_lse=True,
                implementation="xla",
                **Case(1, 7, 5, 2, 1, 3, mask).settings,
            )
            return out, jnp.where(jnp.isfinite(lse), lse, 0)

        check_grads(attention, (q, k, v), order=2, modes=("fwd", "rev"))


def test_jvp_and_hessian_are_those_of_the_definition(rng):
    q, k, v, t = (rng.standard_normal((1, 4, 2, 3), np.float32) for _ in range(4))
    ours = functools.partial(
        tk_jax.attention, is_causal=True, return_lse=True, implementation="xla"
    )
    defined = functools.partial(attention_reference, is_causal=True)
    got, expected = (
        jax.jvp(
            f, tuple(map(jnp.asarray, (q, k, v))), tuple(map(jnp.asarray, (t, q, k)))
        )
        for f in (ours, defined)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected
    )
    got, expected = (
        jax.hessian(lambda q, f=f: (f(q, k, v)[0] ** 2).sum())(jnp.asarray(q))
        for f in (ours, defined)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_forward_mode_through_the_kernel_says_no():
    q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: tk_jax.attention(q, q, q), (q,), (q,))


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_memory_is_linear_in_the_sequence_length(implementation):
    def temporary_bytes(seqlen):
        x = jax.ShapeDtypeStruct((1, seqlen, 2, 64), jnp.bfloat16)
        attention = functools.partial(
            tk_jax.attention, is_causal=True, implementation=implementation
        )
        gradient = jax.grad(lambda x: attention(x, x, x).astype(jnp.float32).sum())
        compiled = jax.jit(gradient).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Beyond 8 blocks of 512, as the blocks grow with T.
    assert temporary_bytes(16384) < 2.5 * temporary_bytes(8192)


@pytest.mark.slow
def test_trains_with_8192_tokens(rng):
    x = jnp.asarray(rng.standard_normal((1, 8192, 2, 64)), jnp.bfloat16)

    @jax.jit
    def step(w, x):
        def loss(w):
            y = (x @ w).astype(x.dtype)
            return jnp.square(
                tk_jax.attention(y, y, y, is_causal=True).astype(jnp.float32)
            ).mean()

        value, gradient = jax.value_and_grad(loss)(w)
        return w - gradient.astype(w.dtype), value

    w = jnp.eye(64, dtype=jnp.bfloat16)
    analysis = step.lower(w, x).compile().memory_analysis()
    # The scores alone would take 256 MiB in bfloat16 and 512 MiB in float32.
    assert analysis.temp_size_in_bytes < 2**27
    w, first = step(w, x)
    _, second = step(w, x)
    assert second < first


def test_settings_are_chosen_for_every_head_dim_of_the_kernels():
    for head_dim, head_dim_v in tiling.KERNEL_HEAD_DIMS:
        for mask, seqlen_kv in itertools.product(config.KERNEL_MASKS, (1, 128, 8192)):
            chosen = tiling.forward_config(head_dim, head_dim_v, seqlen_kv, mask)
            assert chosen in tiling.forward_configs(head_dim, head_dim_v, mask)
            assert chosen.block_q % 64 == 0
        chosen = tiling.backward_config(head_dim, head_dim_v)
        assert chosen.block_kv % 64 == 0
        assert chosen.block_q in (64, 128)
        wide = max(head_dim, head_dim_v) > 128
        assert (chosen.dq_stages >= 2, chosen.dq_block_kv >= 48) == (wide, wide)
