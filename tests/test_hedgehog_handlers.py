"""What the handlers of Hedgehog attention's kernels refuse, and what they launch."""

import pytest
from handler_process import Call, Gpu, both_stages, launched

_INVALID, _UNIMPLEMENTED = 3, 12
_NONE = ("float32", [0])
_ALL = ("int32", [0])  # in place of the first tokens
_UNPACKED = (_ALL, _ALL, _NONE)  # in place of packed documents' tiles
# B, T, H, K, D, V: three chunks, two heads that share keys, one slice and a half.
_SIZES = (2, 150, 4, 2, 80, 96)


def floats(*shape):
    return ("float32", list(shape))


class Arrays:
    """Of a call of these sizes."""

    def __init__(self, sizes=_SIZES, segments=2, dtype="bfloat16"):
        B, T, H, K, D, V = sizes
        chunks, columns = -(-T // 64), -(-V // 64) * 64
        self.q, self.out = (dtype, [B, T, H, D]), (dtype, [B, T, H, V])
        self.k, self.v = (dtype, [B, T, K, D]), (dtype, [B, T, K, V])
        self.q_map, self.k_map = (dtype, [H, D, 64]), (dtype, [K, D, 64])
        self.weight = floats(H)
        self.weights = floats(2, H)
        self.first = ("int32", [B])
        self.rows = floats(B, H, 64 * chunks)
        most = 2 * (T // 65) + 1
        self.documents = (
            ("int32", [B, most + 2, 4]),
            ("int32", [B]),
            floats(B, 64 * most),
        )
        self.tile_rows = floats(B, H, 64 * most)
        self.q_states = (dtype, [B, H, chunks, columns, 128])
        self.q_normalizers = floats(B, H, chunks, 128)
        self.states = (dtype, [B, K, chunks, columns, 128])
        self.normalizers = floats(B, K, chunks, 128)
        self.starts = floats(B, K, segments, V, 128), floats(B, K, segments, 128)
        self.ends = floats(B, K, segments - 1, V, 128), floats(B, K, segments - 1, 128)
        self.features = (dtype, [B, T, H, 128])
        self.q_scores, self.k_scores = (dtype, [B, T, H, 64]), (dtype, [B, T, K, 64])


ARRAYS = Arrays()


def sums(a=ARRAYS, *, first=_ALL, chunks=2, ends=None):
    options = {"chunks_of_segment": chunks}
    return Call(
        "tk_hedgehog_attention_sums_v1",
        [a.k, a.v, a.k_map, first],
        list(ends or a.ends),
        {"options": options},
    )


def outputs(
    a=ARRAYS,
    *,
    v=None,
    q_map=None,
    first=_ALL,
    starts=(_NONE, _NONE),
    chunks=2,
    states=1,
    documents=_UNPACKED,
    shares=0,
):
    options = {"scale": 1.0, "chunks_of_segment": chunks}
    options |= {"states_of_segment": 0 if shares else states, "shares": shares}
    return Call(
        "tk_hedgehog_attention_outputs_v1",
        [
            *(a.q, a.k, v or a.v, q_map or a.q_map, a.k_map),
            *(a.weights, first, *starts, *documents),
        ],
        [a.out],
        {"options": options},
    )


def queries(a=ARRAYS, *, states=None, largest=None, documents=_UNPACKED):
    rows = a.rows if documents is _UNPACKED else a.tile_rows
    return Call(
        "tk_hedgehog_attention_queries_v1",
        [
            *(a.q, a.k, a.v, a.out, a.q_map, states or a.states, a.normalizers),
            *(a.weight, a.weight, _ALL, *documents),
        ],
        [a.q, a.features, a.q_scores, largest or rows, *[rows] * 5],
        {"options": {"scale": 1.0}},
    )


def keys(a=ARRAYS, *, divisors=None, dk=None, documents=_UNPACKED):
    rows = a.rows if documents is _UNPACKED else a.tile_rows
    return Call(
        "tk_hedgehog_attention_keys_v1",
        [
            *(a.q, a.k, a.v, a.out, a.k_map, a.states, a.normalizers),
            *(divisors or rows, *[rows] * 3, a.weight, a.first, *documents),
        ],
        [dk or a.k, a.v, a.k_scores],
        {"options": {"scale": 1.0}},
    )


def document_states(
    a=ARRAYS, *, reverse=False, shares=2, stored=True, starts=(_NONE,) * 2, ends=None
):
    states, normalizers = a.states, a.normalizers
    keys, values, k_map, delta = a.k, a.v, a.k_map, _NONE
    if reverse:
        states, normalizers = a.q_states, a.q_normalizers
        keys, values, k_map, delta = a.features, a.out, (a.k[0], [0]), a.tile_rows
    return Call(
        "tk_hedgehog_attention_document_states_v1",
        [keys, values, k_map, delta, _ALL, *starts, *a.documents],
        [
            *((states, normalizers) if stored else ((a.k[0], [0]), _NONE)),
            *(ends or (_NONE, _NONE)),
        ],
        {"options": {"reverse": reverse, "shares": shares}},
    )


def test_launches():
    a = ARRAYS
    narrow = Arrays((1, 1, 3, 1, 64, 64), 1)
    calls = [
        sums(),
        outputs(first=a.first, starts=a.starts),
        queries(),
        keys(),
        outputs(narrow, chunks=1),
        keys(narrow, divisors=narrow.rows),
    ]
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    launches = [(x["symbol"], x["grid"]) for each in ran for x in each.of("launch")]
    name = "tk_hedgehog_attention_"
    assert launches == [
        (f"{name}sums_d128_v128_bf16", [2, 1, 2]),
        (f"{name}paired_outputs_d128_v128_bf16", [4, 2, 2]),
        (f"{name}queries_d128_v128_bf16", [3, 4, 2]),
        (f"{name}keys_d128_v128_bf16", [3, 2, 2]),
        (f"{name}outputs_d64_v64_bf16", [3, 1, 1]),
        (f"{name}keys_d64_v64_bf16", [1, 1, 1]),
    ]
    q, k, v, out, q_map, k_map = ran[1].of("map")
    assert (q["dims"], k["dims"]) == ([80, 150, 4, 2], [80, 150, 2, 2])
    assert (v["dims"], out["dims"]) == ([96, 150, 2, 2], [96, 150, 4, 2])
    assert q["box"] == v["box"] == [64, 64, 1, 1]
    assert (q_map["dims"], k_map["dims"]) == ([64, 80, 4], [64, 80, 2])
    assert (q_map["strides"], q_map["box"]) == ([128, 10240], [64, 128, 1])
    states = ran[2].of("map")[-1]
    assert (states["dims"], states["box"]) == ([128, 2 * 2 * 3 * 128], [64, 64])


def test_launches_of_packed_documents():
    a = ARRAYS
    calls = [
        outputs(documents=a.documents, starts=a.starts, shares=4),
        document_states(stored=False, ends=a.ends),
        document_states(reverse=True),
        keys(documents=a.documents),
    ]
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    launches = [(x["symbol"], x["grid"]) for each in ran for x in each.of("launch")]
    name = "tk_hedgehog_attention_"
    assert launches == [
        (f"{name}outputs_d128_v128_documents_bf16", [4, 2, 2]),
        (f"{name}document_states_d128_v128_bf16", [2, 1, 2]),
        (f"{name}document_states_reverse_d128_v128_bf16", [4, 2, 2]),
        (f"{name}keys_d128_v128_documents_bf16", [5, 2, 2]),
    ]
    features, dout, states = ran[2].of("map")
    assert (features["dims"], dout["dims"]) == ([128, 150, 4, 2], [96, 150, 4, 2])
    assert states["dims"] == [128, 2 * 4 * 3 * 128]


def test_empty_batch_launches_nothing():
    a = Arrays((0, *_SIZES[1:]))
    packed = {"documents": a.documents}
    answers = Gpu().run(
        *(sums(a), outputs(a), queries(a), keys(a), document_states(a)),
        *(outputs(a, shares=2, **packed), queries(a, **packed), keys(a, **packed)),
    )
    for answer in answers:
        assert (answer.code, answer.message, answer.driver) == (0, "", [])


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            sums(chunks=3),
            _INVALID,
            "sums are of 1 segments; expected 1 to the 0 that another one follows",
        ),
        (sums(chunks=4), _INVALID, "expected 1 to the 3 chunks there are"),
        (
            sums(first=("int32", [3])),
            _INVALID,
            "first has shape (3); expected (2)",
        ),
        (
            outputs(v=("bfloat16", [2, 150, 4, 96])),
            _INVALID,
            "k has 2 heads and v has 4; expected as many",
        ),
        (
            outputs(q_map=("bfloat16", [4, 80, 32])),
            _INVALID,
            "q_map has shape (4, 80, 32); expected (4, 80, 64)",
        ),
        (outputs(first=_NONE), _INVALID, "first has FFI data type"),
        (
            outputs(starts=(ARRAYS.starts[0], _NONE)),
            _INVALID,
            "sums and normalizer go together",
        ),
        (
            outputs(starts=ARRAYS.starts, states=3),
            _INVALID,
            "sums are of 2 states; expected 3, or one more before the first segment",
        ),
        (
            outputs(documents=ARRAYS.documents, starts=ARRAYS.ends, shares=4),
            _INVALID,
            "sums are of 1 states; expected 2",
        ),
        (
            outputs(states=-1),
            _INVALID,
            "states_of_segment is -1; expected none where documents are packed",
        ),
        (
            outputs(Arrays((2, 150, 3, 2, 80, 96))),
            _INVALID,
            "q has 3 heads, which is not a multiple of the 2 of k",
        ),
        (
            outputs(Arrays((2, 150, 4, 2, 136, 96))),
            _UNIMPLEMENTED,
            "the kernels take up to 128 dimensions",
        ),
        (
            outputs(Arrays((2, 150, 4, 2, 80, 96), dtype="float32")),
            _UNIMPLEMENTED,
            "the kernels take bfloat16 and float16",
        ),
        (
            outputs(Arrays((1, 2**25, 64, 1, 8, 8)), chunks=2**19),
            _UNIMPLEMENTED,
            "more than 2^31 - 1 rows",
        ),
        (
            queries(states=("bfloat16", [2, 2, 3, 96, 128])),
            _INVALID,
            "states has shape (2, 2, 3, 96, 128); expected (2, 2, 3, 128, 128)",
        ),
        (
            queries(largest=floats(2, 4, 150)),
            _INVALID,
            "largest has shape (2, 4, 150); expected (2, 4, 192)",
        ),
        (
            outputs(documents=(ARRAYS.documents[0], _ALL, _NONE), chunks=1, shares=1),
            _INVALID,
            "counts has shape (0); expected (2)",
        ),
        (
            outputs(documents=ARRAYS.documents, chunks=2, shares=3),
            _INVALID,
            "chunks_of_segment is 2; expected a divisor of the 3 shares",
        ),
        (
            outputs(documents=ARRAYS.documents, chunks=1, shares=6),
            _INVALID,
            "shares is 6; expected 1 to the 5 tiles there may be",
        ),
        (
            queries(documents=ARRAYS.documents, largest=ARRAYS.rows),
            _INVALID,
            "largest has shape (2, 4, 192); expected (2, 4, 320)",
        ),
        (
            document_states(stored=False),
            _INVALID,
            "neither stored nor to is asked for",
        ),
        (
            document_states(shares=1, starts=ARRAYS.starts),
            _INVALID,
            "states are of 2 shares; expected 1 to the 1 there are",
        ),
        (
            document_states(starts=(ARRAYS.starts[0], _NONE)),
            _INVALID,
            "states and their normalizers go together",
        ),
        (
            keys(dk=ARRAYS.q),
            _INVALID,
            "dk has shape (2, 150, 4, 80); expected (2, 150, 2, 80)",
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
