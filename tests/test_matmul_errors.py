"""What matmul says to wrong input, and what it does with what the kernel lacks."""

import jax
import jax.numpy as jnp
import pytest
from matmul_cases import BF16, product

import tk_jax


def zeros(*shape, dtype=BF16):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("a", "b", "settings", "error", "message"),
    [
        (zeros(4), zeros(4, 4), {}, ValueError,
         r"matmul: a has shape \(4,\); expected \[..., M, K\], at least 2 dimensions"),
        (zeros(4, 4), zeros(4), {"transpose_b": True}, ValueError,
         r"matmul: b has shape \(4,\); expected \[..., N, K\], at least 2 dimensions"),
        (zeros(4, 5), zeros(6, 7), {}, ValueError,
         r"matmul: b has shape \(6, 7\); expected \(5, N\) to match a \(4, 5\)"),
        (zeros(2, 5, 4), zeros(2, 7, 6), {"transpose_a": True, "transpose_b": True},
         ValueError, r"b has shape \(2, 7, 6\); expected \(2, N, 5\) to match "
         r"a \(2, 5, 4\), stored transposed"),
        (zeros(2, 4, 5), zeros(3, 5, 6), {}, ValueError,
         r"b has shape \(3, 5, 6\); expected leading dimensions that broadcast with "
         r"those of a \(2, 4, 5\)"),
        (zeros(4, 5), zeros(5, 6, dtype=jnp.float16), {}, ValueError,
         r"matmul: b has dtype float16; expected bfloat16 to match a"),
        (zeros(0, 5), zeros(5, 6), {}, ValueError,
         r"a has shape \(0, 5\); expected every dimension to be at least 1"),
        (zeros(4, 5), zeros(0, 5, 6), {}, ValueError, r"b has shape \(0, 5, 6\)"),
        ([[1.0]], zeros(1, 1), {}, TypeError,
         r"matmul: a is of type list; expected a jax or numpy array"),
        (zeros(4, 4), zeros(4, 4), {"transpose_a": 1}, TypeError,
         r"transpose_a is of type int; expected a Python bool"),
        (zeros(4, 4), zeros(4, 4), {"implementation": "cuda"}, ValueError,
         r"implementation is 'cuda'; expected one of None, 'tk', 'xla', 'interpret'"),
        (zeros(4, 4, dtype=jnp.float32), zeros(4, 4, dtype=jnp.float32),
         {"implementation": "tk"}, NotImplementedError,
         r"does not support dtype float32 \(it takes bfloat16 and float16\); use"),
        (zeros(4, 4), zeros(4, 4), {"implementation": "tk"}, NotImplementedError,
         r"implementation='tk' needs an NVIDIA Hopper GPU"),
    ],
)  # fmt: skip
def test_bad_input(a, b, settings, error, message):
    with pytest.raises(error, match=message):
        tk_jax.matmul(a, b, **settings)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((2**31, 8), (8, 8)),
        ((8, 2**31), (2**31, 8)),
        ((8, 8), (8, 2**31)),
        ((2**16, 2**15, 8, 8), (8, 8)),
    ],
)
def test_sizes_beyond_32_bits_run_through_xla(a_shape, b_shape):
    a, b = (jax.ShapeDtypeStruct(shape, BF16) for shape in (a_shape, b_shape))
    assert tk_jax.explain(tk_jax.matmul, a, b).cuda == "xla"
    with pytest.raises(NotImplementedError, match=r"of 2147483648 \(it takes up to"):
        jax.eval_shape(product((False, False), "tk"), a, b)
