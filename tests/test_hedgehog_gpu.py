"""Hedgehog attention's kernels on a GPU: the interpreter's cases, and larger ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hedgehog_kernel_cases import (
    CASES,
    DOCUMENT_STATES,
    DOCUMENTS,
    EXACT,
    MORE,
    MORE_DOCUMENT_STATES,
    MORE_DOCUMENTS,
    MORE_STATES,
    STATES,
    Case,
    arrays_of,
    check,
    public,
)
from recurrent_cases import rounded

pytestmark = pytest.mark.gpu

LARGER = [
    # Enough heads to fill the GPU, and so few that sequences are cut.
    Case(1000, 128, 128, (16, 4), batch=2),
    Case(2000, 128, 128, (2, 2), "float16"),
    Case(4000, 64, 64, (1, 1)),
    Case(1000, 128, 128, (16, 4), batch=2, documents=(300, 41, 1, 7, 500)),
    Case(3000, 128, 128, (2, 2), "float16", documents=(2000, 3, 64, 1, 400)),
    Case(4000, 64, 64, (1, 1), documents=(20,)),
]


@pytest.mark.parametrize(
    "case", CASES + MORE + DOCUMENTS + MORE_DOCUMENTS + LARGER, ids=str
)
def test_values_and_gradients(case):
    check(public(case, "tk"), case)


@pytest.mark.parametrize(
    "case",
    STATES + MORE_STATES + DOCUMENT_STATES + MORE_DOCUMENT_STATES,
    ids=str,
)
def test_states_and_their_gradients(case):
    check(public(case, "tk"), case, public(case, "xla"))


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_the_same_bits_each_time(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)

    @jax.jit
    def run(arrays):
        results, pull_back = jax.vjp(lambda x: public(case, "tk")(**x), arrays)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))

    first = run(arrays)
    for _ in range(20):
        for x, y in zip(*map(jax.tree.leaves, (run(arrays), first)), strict=True):
            np.testing.assert_array_equal(np.float32(x), np.float32(y))
