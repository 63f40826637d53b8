"""What attention's arguments mean, and which of them have a kernel."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_options import (
    ARGUMENTS,
    BATCH,
    DIFFERENTIABLE,
    DV,
    HEADS,
    INPUTS,
    KV_HEADS,
    D,
    S,
    T,
    assert_close,
    ours,
    settings_of,
)

import tk_jax
from tk_jax import _dispatch, _ffi
from tk_jax.ops.attention import config

# On a machine with a GPU too, this is about the form that has no kernel.
pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")


# -- What the arguments mean, where the definition could be misread --------------------


def _seen(**settings):
    """Which keys each query sees, [T, S] or [BATCH, T, S]: values are one-hot."""
    seqlen_q, seqlen_kv = settings.pop("lengths", (T, S))
    batch = settings.pop("batch", ())
    q, k = jnp.zeros((*batch, seqlen_q, 1, 4)), jnp.zeros((*batch, seqlen_kv, 1, 4))
    v = jnp.broadcast_to(jnp.eye(seqlen_kv)[:, None], (*k.shape[:-1], seqlen_kv))
    return np.asarray(tk_jax.attention(q, k, v, **settings)[..., 0, :] > 0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [3, (2, 0), (0, 5), (50, 1)])
@pytest.mark.parametrize("lengths", [(9, 8), (4, 11), (7, 7)])
def test_window(lengths, window, align, is_causal):
    left, right = (window, window) if isinstance(window, int) else window
    seqlen_q, seqlen_kv = lengths
    query, key = np.ogrid[:seqlen_q, :seqlen_kv]
    position = query + (seqlen_kv - seqlen_q if align == "bottom_right" else 0)
    expected = (position - left <= key) & (key <= position + right)
    if is_causal:
        expected &= key <= position
    got = _seen(
        lengths=lengths,
        local_window_size=window,
        causal_align=align,
        is_causal=is_causal,
    )
    np.testing.assert_array_equal(got, expected)


def test_bottom_right_aligns_the_ends_of_the_lengths():
    # A cache of 8 of which 5 keys are filled, the last two of them by these queries.
    got = _seen(
        lengths=(3, 8),
        batch=(1,),
        is_causal=True,
        causal_align="bottom_right",
        query_seq_lengths=jnp.array([2], jnp.int32),
        key_value_seq_lengths=jnp.array([5], jnp.int32),
    )[0]
    key = np.arange(8)
    np.testing.assert_array_equal(got, [key <= 3, key <= 4, key < 0])


@pytest.mark.parametrize("length", [-3, 0, 8, 2**31 - 1])
def test_lengths_out_of_range_mean_none_or_all(length):
    got = _seen(key_value_seq_lengths=jnp.int32(length))
    assert np.all(got == (length > 0))


def test_segment_ids_of_keys_default_to_those_of_queries():
    ids = jnp.array([3, 3, -1, 0, 0, 0, 3], jnp.int32)  # In any order.
    got = _seen(lengths=(7, 7), q_segment_ids=ids)
    np.testing.assert_array_equal(got, ids[:, None] == ids[None, :])


def test_a_bias_of_minus_infinity_hides(rng):
    mask = rng.random((T, S)) < 0.5
    mask[2] = False  # A query without keys.
    bias = jnp.where(mask, 0, -jnp.inf)

    def gradient(**settings):
        def loss(inputs):
            out, lse = ours(*inputs, logits_soft_cap=2.0, **settings)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -1e9, lse, 0))

        return jax.value_and_grad(loss)(INPUTS)

    hidden, masked = gradient(bias=bias), gradient(mask=jnp.asarray(mask))
    assert_close(hidden, masked, "bias")
    dbias = jax.grad(lambda b: tk_jax.attention(*INPUTS, bias=b).sum())(bias)
    assert np.all(np.isfinite(dbias)) and not np.any(np.asarray(dbias)[~mask])


def test_sinks_are_one_more_key_whose_value_is_zero():
    q, k, v = INPUTS
    sinks = ARGUMENTS["sinks"]
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    key = jnp.zeros((BATCH, 1, HEADS, D))
    bias = jnp.zeros((HEADS, 1, S + 1)).at[:, 0, S].set(sinks)
    more = (jnp.concatenate([x, y], 1) for x, y in ((k, key), (v, key[..., :DV])))
    assert_close(ours(q, k, v, sinks=sinks), ours(q, *more, bias=bias), "sinks")


def test_queries_without_keys_and_with_a_sink():
    sinks = ARGUMENTS["sinks"]
    mask = jnp.zeros((1, S), bool)
    out, lse = ours(*INPUTS, sinks=sinks, mask=mask)
    assert not np.any(out)
    np.testing.assert_allclose(lse, jnp.broadcast_to(sinks, lse.shape), rtol=1e-6)
    gradient = jax.grad(lambda x, s: ours(*x, sinks=s, mask=mask)[1].sum(), (0, 1))(
        INPUTS, sinks
    )
    assert not any(np.any(x) for x in gradient[0])
    np.testing.assert_allclose(gradient[1], np.full(HEADS, BATCH * T), rtol=1e-6)


def test_chunks_out_of_the_window_are_left_out():
    """The work of a window grows with T, not with T * S."""

    def flops(seqlen, **settings):
        x = jax.ShapeDtypeStruct((1, seqlen, 1, 8), jnp.float32)
        call = functools.partial(tk_jax.attention, **settings)
        steps = re.findall(
            r"length=(\d+)", str(jax.make_jaxpr(lambda x: call(x, x, x))(x))
        )
        return sum(map(int, steps))

    assert flops(4096) == 64
    assert flops(4096, is_causal=True) == 36
    assert flops(4096, local_window_size=(512, 0)) == 15
    assert flops(4096, local_window_size=(0, 512), is_causal=True) == 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_have_the_dtypes_of_their_inputs(dtype):
    inputs = tuple(x.astype(jnp.bfloat16) for x in INPUTS)
    extras = {x: ARGUMENTS[x].astype(dtype) for x in DIFFERENTIABLE}

    def loss(inputs, extras):
        return tk_jax.attention(*inputs, **extras).astype(jnp.float32).sum()

    got = jax.grad(loss, (0, 1))(inputs, extras)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, (inputs, extras))
    assert {x.dtype for x in jax.tree.leaves(got[1])} == {jnp.dtype(dtype)}


# -- Which implementation runs ---------------------------------------------------------


@pytest.mark.parametrize(
    "name", [x for x in ARGUMENTS if x not in ("is_causal", "scale")]
)
def test_what_has_no_kernel_says_so(name, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    x = jax.ShapeDtypeStruct((BATCH, T, HEADS, 64), jnp.bfloat16)
    settings = {name: ARGUMENTS[name]}
    if name == "kv_segment_ids":
        settings = settings_of(["segment_ids"])
    if name == "mask":
        settings = {"mask": jax.ShapeDtypeStruct((T, T), jnp.bool_)}
    if name.endswith("segment_ids"):
        ids = jax.ShapeDtypeStruct((BATCH, T), jnp.int32)
        settings = {"q_segment_ids": ids, "kv_segment_ids": ids}
    choice = tk_jax.explain(tk_jax.attention, x, x, x, **settings)
    static = ("causal_align", "local_window_size", "logits_soft_cap")
    if name in (*static, *config.KERNEL_EXTRAS):
        assert choice.cuda == "tk"
        return
    named = "q_segment_ids" if name == "kv_segment_ids" else name
    assert choice.cuda == "xla"
    assert choice.reason == f"the TK kernel does not support {named}"
    with pytest.raises(NotImplementedError, match=f"does not support {named}"):
        tk_jax.explain(tk_jax.attention, x, x, x, **settings, implementation="tk")


def test_a_value_head_dim_of_its_own(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    q = jax.ShapeDtypeStruct((BATCH, T, HEADS, 192), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((BATCH, T, HEADS, 128), jnp.bfloat16)
    assert tk_jax.explain(tk_jax.attention, q, q, v).cuda == "tk"
    ids = jax.ShapeDtypeStruct((BATCH, T), jnp.int32)
    assert tk_jax.explain(tk_jax.attention, q, q, v, q_segment_ids=ids).cuda == "tk"
    odd = jax.ShapeDtypeStruct((BATCH, T, HEADS, 68), jnp.bfloat16)
    assert tk_jax.explain(tk_jax.attention, q, q, odd).reason == (
        "the TK kernel does not support head dim 68 of v "
        "(it takes multiples of 8 up to 256)"
    )


def test_a_fallback_on_a_gpu_warns_of_the_argument(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_dispatch, "_unsupported_gpu", lambda: None)
    monkeypatch.setattr(_dispatch, "_warned", set())
    x = jax.ShapeDtypeStruct((BATCH, T, HEADS, 256), jnp.bfloat16)
    bias, mask = jnp.zeros((T, T), jnp.bfloat16), jnp.ones((T, T), bool)
    assert tk_jax.explain(tk_jax.attention, x, x, x, bias=bias).cuda == "tk"
    assert tk_jax.explain(tk_jax.attention, x, x, x, mask=mask).cuda == "tk"
    ids = jax.ShapeDtypeStruct((BATCH, T), jnp.int32)
    for dim, both in itertools.product(
        (256, 192), ({"mask": mask}, {"q_segment_ids": ids})
    ):
        x = jax.ShapeDtypeStruct((BATCH, T, HEADS, dim), jnp.bfloat16)
        choice = tk_jax.explain(tk_jax.attention, x, x, x, bias=bias, **both)
        assert choice.cuda == "tk"
    odd = jax.ShapeDtypeStruct((BATCH, T, HEADS, 68), jnp.bfloat16)
    with pytest.warns(tk_jax.FallbackWarning, match="does not support head dim 68"):
        jax.eval_shape(lambda x: tk_jax.attention(x, x, x, bias=bias, mask=mask), odd)
