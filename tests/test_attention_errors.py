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
            "attention: scale is array([1., 1.]); expected a finite number",
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


def test_a_traced_scale():
    q = jnp.ones((1, 4, 2, 64))
    with pytest.raises(TypeError, match="a traced value: multiply the input by it"):
        jax.jit(lambda s: tk_jax.attention(q, q, q, scale=s))(0.5)


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
