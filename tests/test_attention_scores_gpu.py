"""Soft cap, sinks and bias in attention's kernels on the GPU."""

import attention_score_cases as score_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from attention_score_cases import ScoreCase

pytestmark = pytest.mark.gpu

_POISON_BYTES = 2**28

# Over several tiles of each block, and the tiles of long sequences.
_LARGER = [
    ScoreCase(Case(2, 1025, 1025, 8, 2, 64, "causal"), soft_cap=30.0, sinks="H"),
    ScoreCase(Case(2, 1025, 1025, 8, 2, 128, "causal"), soft_cap=30.0, sinks="BH"),
    ScoreCase(Case(1, 1000, 2100, 8, 8, 64), soft_cap=2.0),
    ScoreCase(Case(1, 700, 700, 4, 1, 128, window=(100, 7)), soft_cap=2.0, sinks="H"),
    ScoreCase(Case(1, 130, 8300, 2, 1, 128), soft_cap=10.0),
    ScoreCase(Case(2, 1025, 1025, 8, 2, 64, "causal"), bias="HTS"),
    ScoreCase(Case(2, 1000, 777, 8, 2, 128), bias="BHTS", bias_dtype="float32"),
    ScoreCase(Case(3, 1025, 1025, 4, 2, 128, "causal"), bias="TS", sinks="H"),
    ScoreCase(Case(2, 1100, 900, 4, 4, 64), bias="BS", soft_cap=4.0),
    # Rows of whole 16 bytes.
    ScoreCase(Case(2, 1025, 1000, 8, 2, 64, "causal"), bias="HTS"),
    ScoreCase(Case(2, 700, 776, 8, 4, 128), bias="BTS", soft_cap=4.0),
    ScoreCase(Case(2, 1000, 1000, 4, 2, 256, "causal"), bias="BHTS"),
    ScoreCase(Case(2, 900, 1100, 4, 4, 64), bias="HTS", bias_dtype="float32"),
    ScoreCase(Case(1, 800, 1156, 4, 4, 256), bias="TS", bias_dtype="float32"),
]


def _run(case, inputs, **settings):
    poison = jnp.full(_POISON_BYTES // 4, jnp.nan, jnp.float32)
    poison.block_until_ready()
    poison.delete()
    return score_cases.run(case, jax.device_put(inputs), **settings)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", score_cases.CASES + _LARGER, ids=str)
def test_results_and_gradients(case, deterministic):
    inputs = case.inputs()
    got = _run(case, inputs, implementation="tk", deterministic=deterministic)
    score_cases.assert_all_close(case, inputs, got)


@pytest.mark.parametrize("case", _LARGER, ids=str)
def test_runs_are_equal_in_every_bit(case):
    inputs = case.inputs()
    first, *others = (_run(case, inputs, implementation="tk") for _ in range(10))
    for other in others:
        for name, x, y in zip(score_cases.NAMES, first, other, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name
