"""Attention's kernels where batch elements have lengths of their own."""

import attention_masks
import jax
import numpy as np
import pytest
from attention_masks import MaskedCase

import tk_jax

# Shared by all: odd lengths, grouped heads, elements without a query or without a key.
SMALL = [
    MaskedCase(3, 70, 90, 2, 1, 64, q_lengths=(33, 0, 70), kv_lengths=(65, 77, 0)),
    MaskedCase(2, 70, 150, 2, 1, 128, kv_lengths=(128, 1)),
    MaskedCase(2, 150, 70, 2, 2, 64, "causal", q_lengths=(129, 1), kv_lengths=(64, 70)),
    MaskedCase(
        2, 140, 260, 1, 1, 64, "bottom_right", q_lengths=(100, 3), kv_lengths=(250, 77)
    ),
    MaskedCase(
        2, 70, 140, 2, 1, 128, "bottom_right", q_lengths=(70, 64), kv_lengths=(130, 9)
    ),
    MaskedCase(
        *(2, 160, 150, 1, 1, 64),
        window=(40, 9),
        bottom_right=True,
        q_lengths=(131, 60),
        kv_lengths=(150, 77),
    ),
    MaskedCase(2, 70, 140, 1, 1, 128, window=(20, 30), q_lengths=(65, 12)),
    MaskedCase(*(3, 70, 150, 2, 1, 256), q_lengths=(33, 0, 70), kv_lengths=(65, 77, 0)),
    MaskedCase(
        *(2, 140, 200, 1, 1, 192, "bottom_right"),
        head_dim_v=128,
        q_lengths=(100, 3),
        kv_lengths=(190, 77),
    ),
]
LARGE = [
    MaskedCase(
        *(5, 1025, 700, 4, 2, 64),
        q_lengths=(1025, 1, 640, 0, 513),
        kv_lengths=(700, 129, 64, 300, 0),
    ),
    MaskedCase(4, 700, 1100, 4, 2, 128, kv_lengths=(1100, 128, 0, 700)),
    MaskedCase(3, 1000, 1000, 4, 1, 64, "causal", kv_lengths=(1000, 1, 517)),
    MaskedCase(
        *(3, 520, 1300, 4, 4, 128, "bottom_right"),
        q_lengths=(400, 520, 33),
        kv_lengths=(1300, 100, 1024),
    ),
    MaskedCase(
        *(3, 900, 900, 2, 1, 64, "bottom_right", "fp16"),
        window=(200, 0),
        q_lengths=(900, 450, 64),
        kv_lengths=(450, 900, 65),
    ),
    MaskedCase(
        *(2, 600, 800, 2, 2, 128),
        window=(100, 250),
        q_lengths=(600, 77),
        kv_lengths=(790, 500),
    ),
    MaskedCase(40, 129, 257, 8, 2, 64, kv_lengths=tuple(range(0, 240, 6))),
    # Enough key blocks for two rounds: they are dealt out one by one.
    MaskedCase(
        *(6, 520, 1100, 6, 6, 128),
        q_lengths=(520, 1, 300, 0, 64, 511),
        kv_lengths=(1100, 1024, 5, 300, 0, 700),
    ),
    MaskedCase(9, 300, 900, 8, 4, 64, kv_lengths=tuple(range(900, 0, -100))),
]


@pytest.fixture
def interpreter():
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs on the CPU alone")


# Each is two kernels to be compiled: what these two have, others have too.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=[pytest.mark.exhaustive] if i in (4, 6) else [])
        for i, x in enumerate(SMALL)
    ],
    ids=str,
)
def test_in_the_interpreter(case, interpreter):
    got = attention_masks.check(case, implementation="interpret")
    _check_padding(case, got)


def _check_padding(case, got):
    out, lse, dq, dk, dv = (np.asarray(x, np.float32) for x in got)
    for b in range(case.batch):
        if case.q_lengths is not None:
            length = case.q_lengths[b]
            assert (out[b, length:] == 0).all() and (dq[b, length:] == 0).all()
            assert np.isneginf(lse[b, length:]).all()
        if case.kv_lengths is not None:
            length = case.kv_lengths[b]
            assert (dk[b, length:] == 0).all() and (dv[b, length:] == 0).all()


def test_any_order_in_the_interpreter(interpreter):
    attention_masks.check(SMALL[0], implementation="interpret", deterministic=False)


def test_many_interleavings(interpreter):
    case = MaskedCase(2, 200, 300, 1, 1, 64, q_lengths=(200, 70), kv_lengths=(300, 129))
    with tk_jax.interpret_options(seed=5, schedules=8):
        attention_masks.check(case, implementation="interpret")


def test_padding_queries_may_be_anything(interpreter):
    case = MaskedCase(2, 70, 90, 2, 1, 64, q_lengths=(33, 0))
    inputs = case.inputs()
    expected = attention_masks.run(case, inputs, implementation="interpret")
    inputs[0][0, 33:] = np.nan
    inputs[0][1] = np.inf
    got = attention_masks.run(case, inputs, implementation="interpret")
    for x, y in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "head_dim", [64, pytest.param(192, marks=pytest.mark.exhaustive)]
)
def test_sinks_leave_padding_alone(head_dim, interpreter):
    """A padded query's lse is its sink: that alone does not say that it sees no key."""
    case = MaskedCase(
        2, 100, 90, 2, 1, head_dim, q_lengths=(33, 100), kv_lengths=(90, 5)
    )
    sinks = {"sinks": np.array([0.5, -1.0], np.float32), **case.arrays}
    inputs = case.inputs()
    got, expected = (
        attention_masks.run(case, inputs, sinks, implementation=name)
        for name in ("interpret", "xla")
    )
    for name, x, y in zip(attention_masks.NAMES, got, expected, strict=True):
        x, y = (np.asarray(array, np.float32) for array in (x, y))
        np.testing.assert_allclose(
            x, y, atol=0.02 * np.abs(y).max(), rtol=0, err_msg=name
        )
    assert (np.asarray(got[2], np.float32)[0, 33:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_on_the_gpu(case):
    got = attention_masks.check(case, implementation="tk")
    _check_padding(case, got)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE[:2], ids=str)
def test_any_order_on_the_gpu(case):
    attention_masks.check(case, implementation="tk", deterministic=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_twenty_runs_are_equal_in_every_bit(case):
    inputs = case.inputs()
    first = attention_masks.run(case, inputs, implementation="tk")
    for _ in range(19):
        got = attention_masks.run(case, inputs, implementation="tk")
        for name, x, y in zip(attention_masks.NAMES, got, first, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name
