"""The forward kernel's softmax in the interpreter, where maxima move."""

import attention_maxima
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_maxima import BAD_KEYS, STEPS

import tk_jax

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_steps(steps):
    steps.check("interpret")


@pytest.mark.parametrize(("key", "value"), BAD_KEYS)
def test_bad_keys(key, value):
    attention_maxima.check_bad_key(key, value, "interpret")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_first_blocks_without_a_maximum(head_dim):
    attention_maxima.check_hidden_first_blocks("interpret", head_dim)


def test_neighbours_of_what_is_done_again():
    attention_maxima.check_neighbours("interpret")


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_query_that_is_no_number(is_causal):
    """Its tile is walked again, to no better end, while other warps read the ballot."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, n, 1, 64)), jnp.bfloat16)
        for n in (64, 7, 7)
    )
    q = q.at[0, 2].set(jnp.nan)
    got, expected = (
        np.asarray(
            tk_jax.attention(q, k, v, is_causal=is_causal, implementation=name),
            np.float32,
        )
        for name in ("interpret", "xla")
    )
    np.testing.assert_allclose(got, expected, atol=0.02)
    assert np.isnan(got[0, 2]).all() and np.isnan(got).sum() == 64
