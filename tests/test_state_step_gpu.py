"""Steps of one token on a GPU: the interpreter's cases, and larger ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_step_cases import (
    BASED,
    CASES,
    HEDGEHOGS,
    LINEAR,
    MORE,
    SSD,
    check,
    given,
    step,
)

pytestmark = pytest.mark.gpu

LARGER = [
    SSD(128, 64, (1, 24), skip="H", gate=True, batch=64),
    SSD(256, 96, (8, 16), "float16", skip="P", batch=9),
    LINEAR(128, 128, (4, 16), batch=64),
    LINEAR(64, 192, (16, 16), batch=5, decay="head", normalize=True),
    BASED(16, 64, (16, 16), batch=16, decay="none", normalize=True),
    BASED(32, 128, (2, 4), batch=3, decay="none"),
    HEDGEHOGS(64, 128, (16, 4), batch=4, decay="none"),
    HEDGEHOGS(64, 64, (8, 1), batch=4, decay="none"),
]


@pytest.mark.parametrize("case", CASES + MORE + LARGER, ids=str)
def test_values(case):
    check(step(case, "tk"), case)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_the_same_bits_each_time_and_in_place(case):
    arrays = given(case)
    run = jax.jit(step(case, "tk"), donate_argnames="state")
    first = None
    for _ in range(20):
        arrays["state"] = jax.tree.map(jnp.copy, given(case)["state"])
        largest = jax.tree.leaves(arrays["state"])[0]
        before = largest.unsafe_buffer_pointer()
        out, state = run(**arrays)
        assert jax.tree.leaves(state)[0].unsafe_buffer_pointer() == before
        assert largest.is_deleted()
        if first is None:
            first = jax.tree.map(np.float32, (out, state))
        for x, y in zip(*map(jax.tree.leaves, ((out, state), first)), strict=True):
            np.testing.assert_array_equal(np.float32(x), y)


@pytest.mark.parametrize("case", [LARGER[0], LARGER[2], LARGER[4]], ids=str)
def test_nothing_copies_the_state(case):
    arrays = jax.eval_shape(lambda: given(case))
    compiled = jax.jit(step(case, None), donate_argnames="state").lower(**arrays)
    compiled = compiled.compile()
    assert "tk_state_step_v1" in compiled.as_text()
    size = max(x.size * 4 for x in jax.tree.leaves(arrays["state"]))
    assert compiled.memory_analysis().temp_size_in_bytes < size
