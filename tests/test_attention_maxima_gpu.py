"""The forward kernel's softmax on the GPU, where maxima move."""

import attention_maxima
import pytest
from attention_maxima import BAD_KEYS, STEPS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_steps(steps):
    steps.check("tk")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("key", "value"), BAD_KEYS)
def test_bad_keys(key, value, head_dim):
    attention_maxima.check_bad_key(key, value, "tk", head_dim)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_first_blocks_without_a_maximum(head_dim):
    attention_maxima.check_hidden_first_blocks("tk", head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_neighbours_of_what_is_done_again(head_dim):
    attention_maxima.check_neighbours("tk", head_dim)
