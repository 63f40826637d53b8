"""What the handlers of attention refuse, and what they launch."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from handler_process import FIRST_ADDRESS, Call, Gpu, both_stages, launched

from tk_jax.ops.attention import config as attention
from tk_jax.ops.attention import tiling as attention_tiling
from tk_jax.ops.attention.operands import Operands

_INVALID, _UNIMPLEMENTED = 3, 12
_SMS = 132


def grids(answer):
    return {entry["symbol"]: entry["grid"] for entry in answer.of("launch")}


def replaced(arrays, index, array):
    return [*arrays[:index], array, *arrays[index + 1 :]]


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int = 2
    seqlen_q: int = 1000
    seqlen_kv: int = 1100
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "bfloat16"

    @property
    def q(self):
        shape = [self.batch, self.seqlen_q, self.num_heads, self.head_dim]
        return self.dtype, shape

    @property
    def k(self):
        shape = [self.batch, self.seqlen_kv, self.num_kv_heads, self.head_dim]
        return self.dtype, shape

    @property
    def v(self):
        return self.dtype, [*self.k[1][:3], self.head_dim_v]

    @property
    def out(self):
        return self.dtype, [*self.q[1][:3], self.head_dim_v]

    @property
    def lse(self):
        return "float32", self.q[1][:3]

    @property
    def lse_rest(self):  # without a bias
        return "float32", [self.batch, 0, self.num_heads]

    @property
    def workspaces(self):
        padded = attention.padded_queries(self.seqlen_q)
        rows = [self.batch, self.num_heads, padded]
        narrow = attention_tiling.narrow_head_dim(self.head_dim, self.head_dim_v)
        return [
            ("float32", rows),
            ("float32", rows),
            ("float32", [*rows, narrow or 0]),
            ("int32", [*rows[:2], padded // 64]),
        ]


def options(is_causal=False, bottom_right=False, deterministic=True, scale=0.125):
    return dataclasses.asdict(
        attention.AttentionOptions(
            scale, is_causal, bottom_right, deterministic
        ).for_kernel()
    )


def forward(shape=Shape(), args=None, rets=None, config=None, **which):
    default = attention_tiling.forward_config(shape.head_dim, shape.head_dim_v, 1)
    return Call(
        "tk_attention_fwd_v1",
        args or [shape.q, shape.k, shape.v],
        rets or [shape.out, shape.lse, shape.lse_rest],
        {
            "options": options(**which),
            "config": dataclasses.asdict(default) | (config or {}),
        },
    )


def backward(shape=Shape(), args=None, rets=None, config=None, **which):
    default = attention_tiling.backward_config(shape.head_dim, shape.head_dim_v)
    nothing = ("float32", [0])
    q, k, v, out, lse = shape.q, shape.k, shape.v, shape.out, shape.lse
    return Call(
        "tk_attention_bwd_v1",
        args or [q, k, v, out, lse, out, nothing],
        rets or [q, k, v, *shape.workspaces],
        {
            "options": options(**which),
            "config": dataclasses.asdict(default) | (config or {}),
        },
    )


def test_forward_launch():
    tile = attention_tiling.forward_config(64, 64, 1)
    ((_, ran),) = launched(Gpu(), forward(Shape(batch=4), is_causal=True))
    assert grids(ran) == {"tk_attention_fwd_d64_causal_bf16": [_SMS, 1, 1]}
    q, k, v, out = ran.of("map")
    row = 64 * 2
    assert q["dims"] == out["dims"] == [64, 1000, 8, 4]
    assert q["strides"] == out["strides"] == [8 * row, row, 1000 * 8 * row]
    assert q["box"] == out["box"] == [64, 64, 1, 1]
    assert k["dims"] == v["dims"] == [64, 1100, 2, 4]
    assert k["strides"] == v["strides"] == [2 * row, row, 1100 * 2 * row]
    assert k["box"] == v["box"] == [64, tile.block_kv, 1, 1]
    addresses = [entry["address"] // FIRST_ADDRESS for entry in (q, k, v, out)]
    assert addresses == [1, 2, 3, 4]
    assert {entry["swizzle"] for entry in (q, k, v, out)} == {3}


def test_forward_of_few_tiles_has_few_blocks():
    ((_, ran),) = launched(Gpu(), forward(Shape(batch=1, seqlen_q=7, num_heads=2)))
    assert grids(ran) == {"tk_attention_fwd_d64_bf16": [2, 1, 1]}


def test_backward_launches():
    """The grids that attention.h asks for, in each of its cases."""
    shape = Shape(seqlen_q=1000, seqlen_kv=1100)
    block = attention_tiling.backward_config(64, 64).block_kv
    key_blocks = -(-1100 // block)
    many = Shape(batch=16)
    answers = launched(
        Gpu(),
        backward(shape, is_causal=True),
        backward(many),
        backward(many, deterministic=False),
        backward(Shape(batch=1, seqlen_kv=150 * block, num_kv_heads=1)),
    )
    names = [
        "tk_attention_bwd_prepare_d64_bf16",
        None,
        "tk_attention_bwd_finish_d64_bf16",
    ]
    mains = []
    for _, ran in answers:
        launches = ran.of("launch")
        mains.append(launches[1]["grid"][0])
        assert [launches[0]["symbol"], None, launches[2]["symbol"]] == names
    first = answers[0][1].of("launch")
    assert first[0]["grid"] == [1024 // 64, 8, 2]
    assert first[2]["grid"] == [-(-1000 // 64), 8, 2]
    assert first[1]["symbol"] == "tk_attention_bwd_d64_causal_bf16"
    assert mains == [key_blocks * 2 * 2, _SMS // key_blocks * key_blocks, _SMS, _SMS]


def test_backward_launches_of_wide_heads():
    shape = Shape(head_dim=192, head_dim_v=120)
    config = attention_tiling.backward_config(192, 120)
    clusters = -(-1100 // config.block_kv) * 2 * 2
    answers = launched(
        Gpu(),
        backward(shape, is_causal=True),
        backward(Shape(batch=9, head_dim=256, head_dim_v=256), deterministic=False),
        backward(shape, config={"block_kv": 64}),
    )
    first, second, third = (ran.of("launch") for _, ran in answers)
    assert [launch["symbol"] for launch in first] == [
        "tk_attention_bwd_prepare_d128_bf16",
        "tk_attention_bwd_d192x128_causal_bf16",
        "tk_attention_bwd_dq_d192x128_causal_bf16",
    ]
    assert [launch["grid"] for launch in first] == [
        [1024 // 64, 8, 2],
        [2 * clusters, 1, 1],
        [8 * 8 * 2, 1, 1],
    ]
    assert [launch["grid"][0] for launch in second[1:]] == [_SMS, _SMS]
    assert second[1]["symbol"] == "tk_attention_bwd_d256_bf16"
    assert third[1]["grid"][0] == -(-1100 // 64) * 2 * 2
    # out and dout; q, dout, k, v, dk and dv; q, dout, dq, k and v.
    maps = answers[0][1].of("map")
    of_v = (0, 1, 3, 5, 7, 9, 12)
    assert [entry["dims"][0] for entry in maps] == [
        120 if index in of_v else 192 for index in range(13)
    ]
    rows = [64] * 2 + [config.block_q] * 2 + [64] * 7 + [config.dq_block_kv] * 2
    assert [entry["box"] for entry in maps] == [[64, count, 1, 1] for count in rows]


_Q = Shape()
_NO_BITS = ("uint32", [0, 0, 0, 0])
_NO_MAP = ("int32", [0, 0, 0, 0, 0])
_NO_OPERANDS = Operands(
    query_seq_lengths=("int32", [0]),
    key_value_seq_lengths=("int32", [0]),
    q_segment_ids=("int32", [0, 0]),
    kv_segment_ids=("int32", [0, 0]),
    mask=_NO_BITS,
    transposed_mask=_NO_BITS,
    bias=("bfloat16", [0, 0, 0, 0]),
    sinks=("float32", [0, 0]),
    key_map=_NO_MAP,
    query_map=_NO_MAP,
)
_BIAS_ALONE = _NO_OPERANDS._replace(bias=("bfloat16", [1, 8, 1000, 1100]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_read_a_bias_as_tiles_are_chosen_for_it(dtype):
    """Python, which chooses tiles, and C++, which chooses the kernel, have one rule."""
    calls, expected = [], []
    for bias_dtype, queries, keys in itertools.product(
        ("bfloat16", "float16", "float32"), (1, 1000), (1, 1096, 1098, 1099, 1100)
    ):
        if bias_dtype not in (dtype, "float32"):
            continue  # it goes to the kernels in float32
        shape = Shape(seqlen_kv=1100 if keys == 1 else keys, dtype=dtype)
        bias = jax.ShapeDtypeStruct((1, 8, queries, keys), bias_dtype)
        features = attention.features(
            attention.AttentionOptions(0.125, False, False, True),
            attention.Extras(bias=bias),
            jnp.dtype(dtype),
        )
        expected.append(features)
        with_bias = _NO_OPERANDS._replace(bias=(bias_dtype, list(bias.shape)))
        tile = attention_tiling.forward_config(64, 64, 1, features=features)
        calls.append(
            forward(
                shape,
                args=[shape.q, shape.k, shape.v, *with_bias],
                rets=[shape.out, shape.lse, shape.lse],
                config=dataclasses.asdict(tile),
            )
        )
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    for features, answer in zip(expected, ran, strict=True):
        (symbol,) = grids(answer)
        words = set(symbol.removeprefix("tk_attention_fwd_d64_").split("_"))
        assert words - {"bf16", "fp16"} == features
    assert {len(x & {"tiledbias", "pairedbias"}) for x in expected} == {0, 1}


# A mask's bits for blocks of 192 queries and 128 keys, transposed ones, and its map.
_BITS = ("uint32", [1, 8, 36, 1152])


def _masked(bits, transposed_bits=_NO_BITS):
    return _NO_OPERANDS._replace(
        mask=bits, transposed_mask=transposed_bits, key_map=("int32", [1, 8, 6, 1, 2])
    )


def test_a_mask_of_whole_blocks_is_launched():
    calls = [
        forward(args=[_Q.q, _Q.k, _Q.v, *_masked((dtype, shape))])
        for dtype, shape in (_BITS, ("uint32", [2, 1, 1, 1152]), ("uint32", [1] * 4))
    ]
    for _, ran in launched(Gpu(), *calls):
        assert grids(ran) == {"tk_attention_fwd_d64_mask_bf16": [2 * 8 * 6, 1, 1]}


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            forward(args=[_Q.q, _Q.k, _Q.v, *_masked(("bool", _BITS[1]))]),
            _INVALID,
            "mask has FFI data type 1; expected 8",
        ),
        (
            forward(args=[_Q.q, _Q.k, _Q.v, *_masked(("uint32", [1, 8, 35, 1152]))]),
            _INVALID,
            "mask has shape (1, 8, 35, 1152); axis 2 must have size 1 or 36",
        ),
        (
            forward(args=[_Q.q, _Q.k, _Q.v, *_masked(("uint32", [1, 8, 36, 1000]))]),
            _INVALID,
            "mask has shape (1, 8, 36, 1000); axis 3 must have size 1 or 1152",
        ),
        (
            forward(args=[_Q.q, _Q.k, _Q.v, *_masked(_NO_BITS, _BITS)]),
            _INVALID,
            "mask is missing",
        ),
        (
            forward(args=[_Q.q, _Q.k, _Q.v, *_masked(_BITS, _BITS)]),
            _INVALID,
            "transposed_mask is there, and nobody reads it",
        ),
        (
            forward(args=[("bfloat16", [2, 1000, 512]), _Q.k, _Q.k]),
            _INVALID,
            "q has shape (2, 1000, 512); expected 4 dimensions",
        ),
        (
            forward(scale=-0.125),
            _INVALID,
            "scale is -0.125000; expected a positive number",
        ),
        (
            forward(args=[_Q.q, _Q.k, ("bfloat16", [2, 1099, 2, 64])]),
            _INVALID,
            "v has shape (2, 1099, 2, 64); expected (2, 1100, 2, 64)",
        ),
        (
            forward(args=[_Q.q, ("float16", _Q.k[1]), _Q.k]),
            _INVALID,
            "k has FFI data type 10; expected 16",
        ),
        (
            forward(rets=[("bfloat16", [2, 999, 8, 64]), _Q.lse, _Q.lse_rest]),
            _INVALID,
            "out has shape (2, 999, 8, 64); expected (2, 1000, 8, 64)",
        ),
        (
            forward(rets=[_Q.q, ("float32", [2, 8, 1000]), _Q.lse_rest]),
            _INVALID,
            "lse has shape (2, 8, 1000); expected (2, 1000, 8)",
        ),
        (
            forward(rets=[_Q.q, _Q.lse, _Q.lse]),
            _INVALID,
            "lse_rest has shape (2, 1000, 8); expected (2, 0, 8)",
        ),
        (
            forward(args=[_Q.q, _Q.k, _Q.v, *_BIAS_ALONE]),
            _INVALID,
            "lse_rest has shape (2, 0, 8); expected (2, 1000, 8)",
        ),
        (
            forward(Shape(num_kv_heads=3)),
            _INVALID,
            "q has 8 heads, which is not a multiple of 3 key/value heads",
        ),
        (forward(Shape(dtype="float32")), _UNIMPLEMENTED, "dtype fp32"),
        (
            forward(Shape(seqlen_kv=0)),
            _INVALID,
            "seqlen_kv is 0; both must be at least 1",
        ),
        (
            forward(Shape(batch=2**16, seqlen_q=2**13, num_heads=8)),
            _UNIMPLEMENTED,
            "more than 2^31 - 1 rows",
        ),
        (
            forward(config={"block_q": 100}),
            _INVALID,
            "config.block_q is 100; expected a multiple of 64",
        ),
        (forward(config={"block_kv": 2**40}), _INVALID, "config.block_kv is"),
        (forward(config={"stages": 8}), _INVALID, "bytes of shared memory"),
        (
            backward(Shape(seqlen_q=0)),
            _INVALID,
            "seqlen_q is 0 and seqlen_kv is 1100",
        ),
    ],
)
def test_attention_refusals(call, code, message):
    answer, ran = Gpu().run(*both_stages(call))
    assert ran.code != 0
    assert ran.driver == []
    assert answer.code == code
    assert answer.message.startswith(call.target + ": ")
    assert message in answer.message
    assert answer.driver == []


def test_head_dim_is_refused():
    call = forward(
        args=[("bfloat16", [2, 9, 8, 264]), *[("bfloat16", [2, 9, 2, 264])] * 2],
        rets=[
            ("bfloat16", [2, 9, 8, 264]),
            ("float32", [2, 9, 8]),
            ("float32", [2, 0, 8]),
        ],
    )
    for each in (call, backward(Shape(head_dim=264))):
        (answer,) = Gpu().run(each)
        assert answer.code == _UNIMPLEMENTED
        assert "tiles of head_dim 320; the kernels take multiples of 64" in (
            answer.message
        )


def test_every_wrong_size_of_backward_is_refused():
    """No argument, result or workspace may be smaller than what kernels touch."""
    good = backward()
    calls = []
    for index, (dtype, dims) in enumerate(good.args):
        shorter = (dtype, [*dims[:-1], dims[-1] - 1])
        if index != 6:
            changed = replaced(good.args, index, shorter)
            calls.append(dataclasses.replace(good, args=changed))
    for index, (dtype, dims) in enumerate(good.rets):
        shorter = (dtype, [*dims[:-1], dims[-1] - 1])
        changed = replaced(good.rets, index, shorter)
        calls.append(dataclasses.replace(good, rets=changed))
        changed = replaced(good.rets, index, ("int64", dims))
        calls.append(dataclasses.replace(good, rets=changed))
    short_dlse = replaced(good.args, 6, ("float32", [2, 1000, 7]))
    calls.append(dataclasses.replace(good, args=short_dlse))
    for answer in Gpu().run(*calls):
        assert answer.code == _INVALID, answer
        assert "expected" in answer.message
        assert answer.driver == []


@pytest.mark.parametrize(
    "call",
    [
        forward(Shape(batch=0)),
        forward(Shape(seqlen_q=0)),
        backward(Shape(batch=0)),
        backward(Shape(num_heads=0, num_kv_heads=0)),
    ],
)
def test_nothing_to_write_launches_nothing(call):
    (answer,) = Gpu().run(call)
    assert (answer.code, answer.message, answer.driver) == (0, "", [])
