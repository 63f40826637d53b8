"""Wrong input to attention: refused before anything runs, by a message that helps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax


def _shape(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(q, k, v=None, **settings):
    """Checks alone: nothing is allocated for the shapes."""
    v = k if v is None else v
    return jax.eval_shape(lambda *x: tk_jax.attention(*x, **settings), q, k, v)


def _exactly(message):
    """The whole message; jax may add a paragraph of its own."""
    return rf"^{re.escape(message)}(\n-----|$)"


Q, K = _shape(2, 128, 8, 64), _shape(2, 96, 2, 64)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            Q,
            _shape(2, 128, 2, 32),
            None,
            "attention: k has shape (2, 128, 2, 32); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            Q,
            _shape(3, 96, 2, 64),
            None,
            "attention: k has shape (3, 96, 2, 64); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            Q,
            _shape(96, 2, 64),
            None,
            "attention: k has shape (96, 2, 64); "
            "expected (2, S, K, 64) to match q (2, 128, 8, 64)",
        ),
        (
            Q,
            K,
            _shape(2, 97, 2, 64),
            "attention: v has shape (2, 97, 2, 64); "
            "expected (2, 96, 2, Dv) to match k (2, 96, 2, 64)",
        ),
        (
            Q,
            K,
            _shape(2, 96, 4, 64),
            "attention: v has shape (2, 96, 4, 64); "
            "expected (2, 96, 2, Dv) to match k (2, 96, 2, 64)",
        ),
        (
            _shape(128, 64),
            K,
            None,
            "attention: q has shape (128, 64); "
            "expected [..., T, H, D], at least 3 dimensions",
        ),
        (
            Q,
            _shape(2, 96, 3, 64),
            None,
            "attention: k has 3 heads (K); expected a divisor of the 8 heads (H) of q",
        ),
        (
            _shape(2, 0, 8, 64),
            K,
            None,
            "attention: q has shape (2, 0, 8, 64); expected T to be at least 1",
        ),
        (
            Q,
            _shape(2, 0, 2, 64),
            None,
            "attention: k has shape (2, 0, 2, 64); expected S to be at least 1",
        ),
        (
            _shape(2, 128, 0, 64),
            _shape(2, 96, 0, 64),
            None,
            "attention: q has shape (2, 128, 0, 64); expected H to be at least 1",
        ),
        (
            Q,
            _shape(2, 96, 0, 64),
            None,
            "attention: k has shape (2, 96, 0, 64); expected K to be at least 1",
        ),
        (
            _shape(2, 128, 8, 0),
            _shape(2, 96, 2, 0),
            None,
            "attention: q has shape (2, 128, 8, 0); expected D to be at least 1",
        ),
        (
            Q,
            K,
            _shape(2, 96, 2, 0),
            "attention: v has shape (2, 96, 2, 0); expected Dv to be at least 1",
        ),
        (
            _shape(2**31, 1, 64),
            _shape(1, 1, 64),
            None,
            "attention: q has shape (2147483648, 1, 64); "
            "expected fewer than 2**31 rows",
        ),
        (
            _shape(1, 1, 64),
            _shape(2**31, 1, 64),
            None,
            "attention: k has shape (2147483648, 1, 64); "
            "expected fewer than 2**31 rows",
        ),
        (
            Q,
            _shape(2, 96, 2, 64, dtype=jnp.float32),
            None,
            "attention: k has dtype float32; expected bfloat16 to match q",
        ),
        (
            Q,
            K,
            _shape(2, 96, 2, 64, dtype=jnp.float16),
            "attention: v has dtype float16; expected bfloat16 to match q",
        ),
        (
            _shape(2, 128, 8, 64, dtype=jnp.int32),
            K,
            None,
            "attention: q has dtype int32; "
            "expected one of bfloat16, float16, float32, float64",
        ),
        (
            _shape(2, 128, 8, 64, dtype=jnp.float8_e4m3fn),
            K,
            None,
            "attention: q has dtype float8_e4m3fn; "
            "expected one of bfloat16, float16, float32, float64",
        ),
    ],
)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_shapes_and_dtypes_that_do_not_fit(q, k, v, message, implementation):
    with pytest.raises(ValueError, match=_exactly(message)):
        _call(q, k, v, implementation=implementation)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"implementation": "cuda"},
            ValueError,
            "attention: implementation is 'cuda'; "
            "expected one of None, 'tk', 'xla', 'interpret'",
        ),
        (
            {"causal_align": "bottom"},
            ValueError,
            "attention: causal_align is 'bottom'; "
            "expected one of 'top_left', 'bottom_right'",
        ),
        (
            {"scale": float("nan")},
            ValueError,
            "attention: scale is nan; expected a finite number",
        ),
        (
            {"scale": np.ones(2)},
            ValueError,
            "attention: scale has shape (2,); expected a number",
        ),
        (
            {"scale": 10**400},
            ValueError,
            f"attention: scale is {10**400}; expected a finite number",
        ),
        (
            {"scale": -1e39},
            ValueError,
            "attention: scale is -1e+39; expected a finite number of float32",
        ),
        (
            {"scale": np.complex64(1)},
            TypeError,
            "attention: scale is of type complex64; expected a Python number",
        ),
        (
            {"scale": np.array(True)},
            TypeError,
            "attention: scale is of type ndarray; expected a Python number",
        ),
        (
            {"scale": np.array("big")},
            TypeError,
            "attention: scale is of type ndarray; expected a Python number",
        ),
        (
            {"scale": "big"},
            TypeError,
            "attention: scale is of type str; expected a Python number",
        ),
        (
            {"is_causal": 1},
            TypeError,
            "attention: is_causal is of type int; expected a Python bool",
        ),
        (
            {"return_lse": "yes"},
            TypeError,
            "attention: return_lse is of type str; expected a Python bool",
        ),
        (
            {"deterministic": None},
            TypeError,
            "attention: deterministic is of type NoneType; expected a Python bool",
        ),
    ],
)
def test_settings_that_are_wrong(settings, error, message):
    with pytest.raises(error, match=_exactly(message)):
        _call(Q, K, **settings)


def _int32(*shape):
    return _shape(*shape, dtype=jnp.int32)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"local_window_size": -1},
            ValueError,
            "local_window_size is -1; expected no negative number",
        ),
        (
            {"local_window_size": (3, -1)},
            ValueError,
            "local_window_size is (3, -1); expected no negative number",
        ),
        (
            {"local_window_size": (1, 2, 3)},
            TypeError,
            "local_window_size is (1, 2, 3); "
            "expected an int or a tuple of two, (left, right)",
        ),
        (
            {"local_window_size": 1.5},
            TypeError,
            "local_window_size is 1.5; "
            "expected an int or a tuple of two, (left, right)",
        ),
        (
            {"local_window_size": True},
            TypeError,
            "local_window_size is True; "
            "expected an int or a tuple of two, (left, right)",
        ),
        (
            {"local_window_size": (None, 0)},
            TypeError,
            "local_window_size is (None, 0); "
            "expected an int or a tuple of two, (left, right)",
        ),
        (
            {"logits_soft_cap": 0},
            ValueError,
            "logits_soft_cap is 0.0; expected a positive number",
        ),
        (
            {"logits_soft_cap": -30.0},
            ValueError,
            "logits_soft_cap is -30.0; expected a positive number",
        ),
        (
            {"logits_soft_cap": float("inf")},
            ValueError,
            "logits_soft_cap is inf; expected a finite number",
        ),
        (
            {"logits_soft_cap": 1e38},
            ValueError,
            "logits_soft_cap is 1e+38; expected a number from 1e-30 to 1e+30",
        ),
        (
            {"logits_soft_cap": 1e-46},
            ValueError,
            "logits_soft_cap is 1e-46; expected a number from 1e-30 to 1e+30",
        ),
        (
            {"logits_soft_cap": "30"},
            TypeError,
            "logits_soft_cap is of type str; expected a Python number",
        ),
        (
            {"query_seq_lengths": _int32(3)},
            ValueError,
            "query_seq_lengths has shape (3,); expected one that broadcasts to (2,)",
        ),
        (
            {"key_value_seq_lengths": _int32(2, 1)},
            ValueError,
            "key_value_seq_lengths has shape (2, 1); "
            "expected one that broadcasts to (2,)",
        ),
        (
            {"key_value_seq_lengths": _shape(2, dtype=jnp.float32)},
            ValueError,
            "key_value_seq_lengths has dtype float32; expected int32",
        ),
        (
            {"query_seq_lengths": _shape(2, dtype=jnp.uint32)},
            ValueError,
            "query_seq_lengths has dtype uint32; expected int32",
        ),
        (
            {"q_segment_ids": _int32(2, 128)},
            ValueError,
            "q_segment_ids is given and kv_segment_ids is not; "
            "expected both, as T is 128 and S is 96",
        ),
        (
            {"kv_segment_ids": _int32(2, 96)},
            ValueError,
            "kv_segment_ids is given and q_segment_ids is not; expected both",
        ),
        (
            {"q_segment_ids": _int32(2, 96), "kv_segment_ids": _int32(2, 96)},
            ValueError,
            "q_segment_ids has shape (2, 96); "
            "expected one that broadcasts to (2, 128), with 128 last",
        ),
        (
            {"q_segment_ids": _int32(2, 128), "kv_segment_ids": _int32(2, 1)},
            ValueError,
            "kv_segment_ids has shape (2, 1); "
            "expected one that broadcasts to (2, 96), with 96 last",
        ),
        (
            {"q_segment_ids": _int32(), "kv_segment_ids": _int32(96)},
            ValueError,
            "q_segment_ids has shape (); "
            "expected one that broadcasts to (2, 128), with 128 last",
        ),
        (
            {"q_segment_ids": _int32(2, 8, 128), "kv_segment_ids": _int32(2, 96)},
            ValueError,
            "q_segment_ids has shape (2, 8, 128); "
            "expected one that broadcasts to (2, 128), with 128 last",
        ),
        (
            {"q_segment_ids": _shape(2, 128), "kv_segment_ids": _int32(2, 96)},
            ValueError,
            "q_segment_ids has dtype bfloat16; expected int32",
        ),
        (
            {"mask": _shape(2, 2, 128, 96, dtype=jnp.bool_)},
            ValueError,
            "mask has shape (2, 2, 128, 96); "
            "expected one that broadcasts to (2, 8, 128, 96)",
        ),
        (
            {"mask": _shape(96, 128, dtype=jnp.bool_)},
            ValueError,
            "mask has shape (96, 128); expected one that broadcasts to (2, 8, 128, 96)",
        ),
        (
            {"mask": _int32(128, 96)},
            ValueError,
            "mask has dtype int32; expected bool",
        ),
        (
            {"bias": _shape(1, 2, 8, 128, 96)},
            ValueError,
            "bias has shape (1, 2, 8, 128, 96); "
            "expected one that broadcasts to (2, 8, 128, 96)",
        ),
        (
            {"bias": _int32(128, 96)},
            ValueError,
            "bias has dtype int32; expected a floating-point dtype",
        ),
        (
            {"sinks": _shape(2)},
            ValueError,
            "sinks has shape (2,); expected one that broadcasts to (2, 8), with 8 last",
        ),
        (
            {"sinks": _shape(1)},
            ValueError,
            "sinks has shape (1,); expected one that broadcasts to (2, 8), with 8 last",
        ),
        (
            {"sinks": _int32(8)},
            ValueError,
            "sinks has dtype int32; expected a floating-point dtype",
        ),
    ],
)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_arguments_that_do_not_fit(settings, error, message, implementation):
    with pytest.raises(error, match=_exactly(f"attention: {message}")):
        tk_jax.explain(
            tk_jax.attention, Q, K, K, **settings, implementation=implementation
        )


@pytest.mark.parametrize("value", [[8, 8], 8, "8"])
@pytest.mark.parametrize(
    "name",
    [
        "query_seq_lengths",
        "key_value_seq_lengths",
        "q_segment_ids",
        "kv_segment_ids",
        "mask",
        "bias",
        "sinks",
    ],
)
def test_arguments_that_are_no_arrays(name, value):
    x = np.ones((8, 2, 4), np.float32)
    message = (
        f"attention: {name} is of type {type(value).__name__}; "
        "expected a jax or numpy array"
    )
    with pytest.raises(TypeError, match=_exactly(message)):
        tk_jax.attention(x, x, x, **{name: value})


def test_explain_refuses_what_the_call_would():
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_casual'"):
        tk_jax.explain(tk_jax.attention, Q, K, K, is_casual=True)
    for name, value in (("mask", True), ("query_seq_lengths", [3, 2])):
        with pytest.raises(TypeError, match=f"{name} is of type .*; expected a jax"):
            tk_jax.explain(tk_jax.attention, Q, K, K, **{name: value})
    with pytest.raises(TypeError, match="q is of type list; expected a jax"):
        tk_jax.explain(tk_jax.attention, [1.0], K, K)


def test_explain_takes_numpy_arrays_as_the_call_does():
    x = np.ones((2, 8, 2, 4))  # float64, and float32 without x64
    settings = {
        "query_seq_lengths": np.array([3, 8]),
        "q_segment_ids": np.zeros((2, 8), int),
    }
    assert tk_jax.attention(x, x, x, **settings).dtype == jnp.float32
    choice = tk_jax.explain(tk_jax.attention, x, x, x, **settings)
    assert "dtype float32" in choice.reason


def test_a_traced_scale():
    q = jnp.ones((1, 4, 2, 64))
    with pytest.raises(TypeError, match="a traced value: multiply the input by it"):
        jax.jit(lambda s: tk_jax.attention(q, q, q, scale=s))(0.5)
    with pytest.raises(TypeError, match=r"expected a Python number \(a traced value\)"):
        jax.jit(lambda s: tk_jax.attention(q, q, q, logits_soft_cap=s))(0.5)


def test_scale_may_be_any_static_number():
    q = jnp.ones((1, 4, 2, 64))
    expected = tk_jax.attention(q, q, q, scale=2.0)
    for scale in (2, np.float32(2), np.array(2.0), jnp.asarray(2.0)):
        np.testing.assert_array_equal(
            tk_jax.attention(q, q, q, scale=scale), expected, str(type(scale))
        )


@pytest.mark.parametrize("value", [[[[1.0]]], 1.0, None, "q"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inputs_that_are_no_arrays(name, value):
    inputs = {x: np.ones((3, 2, 4), np.float32) for x in "qkv"}
    message = (
        f"attention: {name} is of type {type(value).__name__}; "
        "expected a jax or numpy array"
    )
    with pytest.raises(TypeError, match=_exactly(message)):
        tk_jax.attention(**{**inputs, name: value})
