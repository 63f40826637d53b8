"""Linear attention's kernels on a GPU: the interpreter's cases, and larger ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import rounded
from recurrent_kernel_cases import (
    CASES,
    EXACT,
    LINEAR,
    MORE,
    SSD,
    arrays_of,
    check,
    public,
)

import tk_jax

pytestmark = pytest.mark.gpu

LARGER = [
    # Enough heads to fill the GPU, and so few that sequences are cut.
    SSD(1000, 128, 64, (1, 16), batch=2, skip="H", gate=True),
    SSD(1000, 128, 64, (8, 16), "float16", batch=2, skip="P", packed=True),
    SSD(4000, 64, 64, (1, 1), gate=True),
    LINEAR(1000, 128, 128, (4, 8), decay="mild", packed=True),
    LINEAR(1000, 128, 128, (8, 8), "float16", decay="head"),
    LINEAR(4000, 64, 64, (1, 2), decay="mild", packed=True),
    LINEAR(1000, 256, 128, (1, 2), decay="head"),
    LINEAR(500, 128, 128, (8, 8), decay="mild", normalize=True),
]


@pytest.mark.parametrize("case", CASES + MORE + LARGER, ids=str)
def test_values_and_gradients(case):
    check(public(case, "tk"), case)


@pytest.mark.parametrize("case", LARGER[:2] + LARGER[3:6], ids=str)
def test_the_same_bits_each_time(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    ids = arrays.pop("segment_ids")
    arrays = {name: x for name, x in arrays.items() if x is not None}

    @jax.jit
    def run(arrays):
        function = functools.partial(public(case, "tk"), segment_ids=ids)
        results, pull_back = jax.vjp(lambda x: function(**x), arrays)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))

    first = run(arrays)
    for _ in range(20):
        for x, y in zip(*map(jax.tree.leaves, (run(arrays), first)), strict=True):
            np.testing.assert_array_equal(np.float32(x), np.float32(y))


def test_kernels_run_without_being_asked_for():
    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
    text = jax.jit(tk_jax.linear_attention).lower(x, x, x).compile().as_text()
    assert "tk_linear_attention_outputs_v1" in text
