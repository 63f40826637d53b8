"""The forward kernel's softmax in the interpreter, where maxima move."""

import attention_maxima
import jax
import pytest
from attention_maxima import BAD_KEYS, STEPS

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
