"""What the handler of steps of one token refuses, and what it launches."""

import dataclasses

import pytest
from handler_process import Call, Gpu, both_stages, launched

_INVALID, _UNIMPLEMENTED = 3, 12
_NONE = ("float32", [0])


def floats(*shape):
    return ("float32", list(shape))


@dataclasses.dataclass(frozen=True)
class Sizes:
    batch: int = 2
    key_heads: int = 2
    heads: int = 4
    key_dim: int = 80
    value_dim: int = 100
    queries: int = 1


SIZES = Sizes()


def step(
    s=SIZES,
    *,
    dtype="bfloat16",
    key_dtype=None,
    values_last=False,
    normalize=False,
    taylor=False,
    columns=64,
    query_heads=None,
    in_place=None,
    **arrays,
):
    """``arrays`` are given by name where they are not what they should be."""
    out_heads = s.heads * s.queries
    query_heads = query_heads or (out_heads if s.queries > 1 else s.key_heads)
    state = (s.key_dim, s.value_dim) if values_last else (s.value_dim, s.key_dim)
    normalizer = floats(s.batch, s.heads, s.key_dim) if normalize else _NONE
    usual = {
        "q": (key_dtype or dtype, [s.batch, query_heads, s.key_dim]),
        "k": (key_dtype or dtype, [s.batch, s.key_heads, s.key_dim]),
        "v": (dtype, [s.batch, s.heads, s.value_dim]),
        "decays": floats(s.batch, s.heads),
        "weights": _NONE,
        "skip": _NONE,
        "numerators": _NONE,
        "divisors": _NONE,
        "state": floats(s.batch, s.heads, *state),
        "normalizer": normalizer,
        "out": (dtype, [s.batch, out_heads, s.value_dim]),
        "next_state": floats(s.batch, s.heads, *state),
        "next_normalizer": normalizer,
    }
    assert arrays.keys() <= usual.keys()
    given = list((usual | arrays).values())
    options = {
        "scale": 1.0,
        "values_last": values_last,
        "normalize": normalize,
        "taylor": taylor,
    }
    return Call(
        "tk_state_step_v1",
        given[:10],
        given[10:],
        {"options": options, "config": {"columns": columns}},
        in_place={1: 8, 2: 9} if in_place is None else in_place,
    )


def windows(
    batch=2, queries=2, D=80, V=96, *, dtype="bfloat16", in_place=None, **arrays
):
    """The other kernel of Hedgehog's steps: B, H = 2 R, K = 2, windows of 64."""
    heads = 2 * queries
    usual = {
        "query": (dtype, [batch, heads, D]),
        "token_key": (dtype, [batch, 2, D]),
        "token_value": (dtype, [batch, 2, V]),
        "keys": (dtype, [batch, 128, 2, D]),
        "values": (dtype, [batch, 128, 2, V]),
        "q_map": (dtype, [heads, D, 64]),
        "k_map": (dtype, [2, D, 64]),
        "alpha": floats(heads),
        "beta": floats(heads),
        "length": ("int32", [batch]),
        "features": floats(batch, heads, 128),
        "key_features": floats(batch, 2, 128),
        "value": (dtype, [batch, 2, V]),
        "decays": floats(batch, 2),
        "numerators": floats(batch, heads, V),
        "divisors": floats(batch, heads),
        "next_keys": (dtype, [batch, 128, 2, D]),
        "next_values": (dtype, [batch, 128, 2, V]),
    }
    assert arrays.keys() <= usual.keys()
    given = list((usual | arrays).values())
    aliases = {6: 3, 7: 4} if in_place is None else in_place
    target = "tk_hedgehog_attention_step_v1"
    options = {"options": {"scale": 1.0}}
    return Call(target, given[:10], given[10:], options, in_place=aliases)


def test_launches():
    several = dataclasses.replace(SIZES, queries=4)
    odd = dataclasses.replace(SIZES, key_dim=7, value_dim=9)
    of_taylor = dataclasses.replace(SIZES, key_dim=16)
    calls = [
        step(weights=floats(2, 4), skip=floats(1, 4, 1)),
        step(values_last=True, decays=floats(1, 4)),
        step(values_last=True, normalize=True, key_dtype="float32"),
        step(
            several,
            values_last=True,
            normalize=True,
            dtype="float32",
            columns=32,
            numerators=floats(2, 16, 100),
            divisors=floats(2, 16),
        ),
        step(
            of_taylor,
            values_last=True,
            taylor=True,
            decays=_NONE,
            state=floats(2, 4, 153, 100),
            next_state=floats(2, 4, 153, 100),
        ),
        step(odd, dtype="float16", columns=16, decays=_NONE),
        windows(),
    ]
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    launches = [(x["symbol"], x["grid"]) for each in ran for x in each.of("launch")]
    name = "tk_state_step_"
    assert launches == [
        # 64 of 100 rows a block, then 64 of 100 columns; all of them with sums.
        (f"{name}rows_c64_bf16", [16, 1, 1]),
        (f"{name}columns_c64_bf16", [16, 1, 1]),
        (f"{name}columns_c64_normalized_fp32_bf16", [8, 1, 1]),
        (f"{name}columns_c32_normalized_q4_fp32", [8, 1, 1]),
        (f"{name}columns_c64_taylor_bf16", [16, 1, 1]),
        (f"{name}rows_c16_odd_fp16", [8, 1, 1]),
        ("tk_hedgehog_attention_step_d128_v128_bf16", [2, 1, 2]),
    ]
    keys, values, q_map, k_map = ran[-1].of("map")
    assert (keys["dims"], keys["box"]) == ([80, 128, 2, 2], [64, 64, 1, 1])
    assert values["dims"] == [96, 128, 2, 2]
    assert q_map["dims"] == [64, 80, 4]
    assert (k_map["dims"], k_map["box"]) == ([64, 80, 2], [64, 128, 1])


def test_empty_batch_launches_nothing():
    nothing = dataclasses.replace(SIZES, batch=0)
    for answer in Gpu().run(step(nothing), windows(0)):
        assert (answer.code, answer.message, answer.driver) == (0, "", [])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (step(in_place={}), "next_state is not where state"),
        (
            step(values_last=True, normalize=True, in_place={1: 8}),
            "next_normalizer is not where normalizer",
        ),
        (windows(in_place={7: 4}), "next_keys is not where keys"),
        (windows(in_place={6: 3}), "next_values is not where values"),
    ],
)
def test_states_are_in_place(call, name):
    _, ran = Gpu().run(*both_stages(call))
    assert ran.code == _INVALID
    assert name in ran.message
    assert ran.of("launch") == []


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            step(dtype="int32"),
            _UNIMPLEMENTED,
            "dtype int32; the kernels take bfloat16, float16 and float32",
        ),
        (
            step(k=("float16", [2, 2, 80])),
            _INVALID,
            "q has FFI data type",
        ),
        (
            step(query_heads=3),
            _INVALID,
            "q has 3 heads; expected a divisor of the 4 heads of v",
        ),
        (
            step(dataclasses.replace(SIZES, key_heads=3), query_heads=2),
            _INVALID,
            "k has 3 heads; expected a divisor of the 4 heads of v",
        ),
        (
            step(state=floats(2, 4, 80, 100)),
            _INVALID,
            "state has shape (2, 4, 80, 100); expected (2, 4, 100, 80)",
        ),
        (
            step(values_last=True, next_state=floats(2, 4, 100, 80)),
            _INVALID,
            "next_state has shape (2, 4, 100, 80); expected (2, 4, 80, 100)",
        ),
        (
            step(state=("bfloat16", [2, 4, 100, 80])),
            _INVALID,
            "state has FFI data type",
        ),
        (
            step(decays=floats(2, 3)),
            _INVALID,
            "decays has shape (2, 3); expected 1 or 4 along axis 1",
        ),
        (
            step(skip=floats(4, 100)),
            _INVALID,
            "skip has shape (4, 100); expected 3 dimensions",
        ),
        (
            step(out=("float32", [2, 4, 100])),
            _INVALID,
            "out has FFI data type",
        ),
        (
            step(values_last=True, weights=floats(2, 4)),
            _INVALID,
            "weights and skip are those of states with values in rows",
        ),
        (
            step(normalize=True),
            _INVALID,
            "states with values in rows are not normalized and have one query",
        ),
        (
            step(
                values_last=True,
                numerators=floats(2, 4, 100),
                divisors=floats(2, 4),
            ),
            _INVALID,
            "numerators and divisors are given together, where out is divided",
        ),
        (
            step(values_last=True, normalize=True, divisors=floats(2, 4)),
            _INVALID,
            "numerators and divisors are given together, where out is divided",
        ),
        (
            step(dataclasses.replace(SIZES, key_dim=33), values_last=True, taylor=True),
            _UNIMPLEMENTED,
            "features of 33 values; the kernels take up to 32",
        ),
        (
            step(dataclasses.replace(SIZES, key_dim=8), values_last=True, taylor=True),
            _INVALID,
            "state has shape (2, 4, 8, 100); expected (2, 4, 45, 100)",
        ),
        (
            step(
                dataclasses.replace(SIZES, key_dim=8),
                values_last=True,
                taylor=True,
                state=floats(2, 4, 45, 100),
                next_state=floats(2, 4, 45, 100),
            ),
            _INVALID,
            "decays are those of states whose features are given",
        ),
        (
            step(
                values_last=True,
                normalize=True,
                numerators=floats(2, 4, 100),
                divisors=floats(2, 5),
            ),
            _INVALID,
            "divisors has shape (2, 5); expected (2, 4)",
        ),
        (
            step(dataclasses.replace(SIZES, queries=9), values_last=True, columns=16),
            _UNIMPLEMENTED,
            "9 queries of a state; the kernels take up to 8",
        ),
        (
            step(columns=48),
            _INVALID,
            "config.columns is 48; expected 16, 32 or 64",
        ),
        (
            step(dataclasses.replace(SIZES, key_dim=0)),
            _INVALID,
            "expected nothing but the batch to be empty",
        ),
        (
            windows(token_key=("bfloat16", [2, 2, 128])),
            _INVALID,
            "token_key has shape (2, 2, 128); expected (2, 2, 80)",
        ),
        (
            windows(
                keys=("bfloat16", [2, 64, 2, 80]), values=("bfloat16", [2, 64, 2, 96])
            ),
            _INVALID,
            "keys has shape (2, 64, 2, 80); expected (2, 128, 2, 80)",
        ),
        (
            windows(length=floats(2)),
            _INVALID,
            "length has FFI data type",
        ),
        (
            windows(D=84),
            _INVALID,
            "are not a multiple of 16 bytes",
        ),
        (
            windows(dtype="float32"),
            _UNIMPLEMENTED,
            "the kernels take bfloat16 and float16",
        ),
        (
            step(dataclasses.replace(SIZES, batch=2**20, heads=2**10, value_dim=32)),
            _UNIMPLEMENTED,
            "more than 2^31 - 1 blocks",
        ),
    ],
)
def test_refusals(call, code, message):
    answer, ran = Gpu().run(*both_stages(call))
    assert ran.code != 0
    assert ran.driver == []
    assert answer.code == code, answer.message
    assert answer.message.startswith(f"{call.target}: ")
    assert message in answer.message
    assert answer.of("launch") == []
