"""What the handler of matmul refuses, and what it launches."""

import dataclasses

import pytest
from handler_process import Call, Gpu, both_stages, launched

from tk_jax.ops.matmul import config as matmul

_INVALID, _UNIMPLEMENTED = 3, 12
_SMS = 132


def multiply(a, b, c, transpose_a=False, transpose_b=False, dtype="bfloat16", **tiles):
    chosen = dataclasses.asdict(matmul.CONFIGS[0]) | tiles
    return Call(
        "tk_matmul_v1",
        [(dtype, a), (dtype, b)],
        [(dtype, c)],
        {
            "options": {"transpose_a": transpose_a, "transpose_b": transpose_b},
            "config": chosen,
        },
    )


def test_matmul_launch():
    config = dataclasses.replace(matmul.CONFIGS[0], cluster_m=2)
    small = multiply([1, 100, 72], [3, 72, 200], [3, 100, 200], cluster_m=2)
    large = multiply(
        [1, 64, 8192],
        [1, 8192, 64],
        [1, 8192, 8192],
        transpose_a=True,
        transpose_b=True,
        cluster_m=2,
    )
    (_, ran), (_, full) = launched(Gpu(), small, large)
    (launch,) = ran.of("launch")
    assert launch["symbol"] == "tk_matmul_nn_bf16"
    # One tile of rows is rounded up to a cluster, for each of three products.
    assert launch["grid"] == [config.cluster_m * 3, 1, 1]
    assert launch["cluster"] == [config.cluster_m, 1, 1]
    a, b, c = ran.of("map")
    assert (a["dims"], a["strides"]) == ([72, 100, 1], [144, 14400])
    assert (b["dims"], b["strides"]) == ([200, 72, 3], [400, 28800])
    assert (c["dims"], c["strides"]) == ([200, 100, 3], [400, 40000])
    assert a["box"] == [64, config.block_m, 1]
    assert b["box"] == [64, config.block_k, 1]
    assert c["box"] == [64, 64, 1]
    a, b, _ = full.of("map")
    assert a["box"] == [64, config.block_k, 1]
    assert b["box"] == [64, config.block_n // config.cluster_m, 1]
    (launch,) = full.of("launch")
    assert launch["symbol"] == "tk_matmul_tt_bf16"
    assert launch["grid"] == [_SMS, 1, 1]


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            multiply([64, 64], [1, 64, 64], [1, 64, 64]),
            _INVALID,
            "a has shape (64, 64); expected 3 dimensions",
        ),
        (
            multiply([1, 64, 64], [1, 72, 64], [1, 64, 64]),
            _INVALID,
            "b has shape (1, 72, 64); expected (1, 64, 64)",
        ),
        (
            multiply([1, 64, 72], [1, 64, 64], [1, 64, 64], transpose_a=True),
            _INVALID,
            "a has shape (1, 64, 72); expected (1, 64, 64)",
        ),
        (
            multiply([2, 64, 64], [1, 64, 64], [3, 64, 64]),
            _INVALID,
            "an operand has batch 2; expected 1 or 3",
        ),
        (
            multiply([1, 64, 0], [1, 0, 64], [1, 64, 64]),
            _INVALID,
            "no columns to sum over (K is 0)",
        ),
        (
            multiply([1, 64, 64], [1, 64, 64], [1, 64, 64], dtype="float32"),
            _UNIMPLEMENTED,
            "dtype fp32",
        ),
        (
            multiply([1, 64, 64], [1, 64, 64], [1, 64, 64], block_n=100),
            _INVALID,
            "is outside of what the kernel offers",
        ),
        (
            multiply([1, 64, 64], [1, 64, 64], [1, 64, 64], stages=7),
            _INVALID,
            "bytes of shared memory",
        ),
        (
            multiply([1, 64, 63], [1, 63, 64], [1, 64, 64]),
            _INVALID,
            "rows of a, (1, 64, 63), are not a multiple of 16 bytes",
        ),
        (
            multiply([1, 64, 64], [1, 64, 60], [1, 64, 60]),
            _INVALID,
            "rows of b, (1, 64, 60), are not a multiple of 16 bytes",
        ),
        (
            multiply([1, 2**31, 8], [1, 8, 8], [1, 2**31, 8]),
            _UNIMPLEMENTED,
            "more than 2^31 - 1 tiles, or a dimension above that",
        ),
    ],
)
def test_matmul_refusals(call, code, message):
    answer, ran = Gpu().run(*both_stages(call))
    assert ran.code != 0
    assert ran.driver == []
    assert answer.code == code
    assert answer.message.startswith("tk_matmul_v1: ")
    assert message in answer.message
    assert answer.of("launch") == []


def test_empty_product_launches_nothing():
    (answer,) = Gpu().run(multiply([1, 0, 64], [1, 64, 64], [1, 0, 64]))
    assert (answer.code, answer.message, answer.driver) == (0, "", [])
