"""What the handlers of linear attention's kernels refuse, and what they launch."""

import pytest
from handler_process import Call, Gpu, both_stages, launched

_INVALID, _UNIMPLEMENTED = 3, 12
_NONE = ("float32", [0])
# B, T, G, H, K, V: two chunks, one slice and a half, heads that share two groups.
_SIZES = (2, 100, 2, 4, 80, 96)


def floats(*shape):
    return ("float32", list(shape))


class Arrays:
    """Of a call of these sizes."""

    def __init__(self, sizes=_SIZES, segments=2, dtype="bfloat16"):
        B, T, G, H, K, V = sizes
        chunks, columns = -(-T // 64), -(-V // 64) * 64
        self.q = (dtype, [B, T, G, K])
        self.v = (dtype, [B, T, H, V])
        self.gates = floats(B, H, 64 * chunks)
        self.counts = floats(B, 64 * chunks)
        self.tokens = floats(B, T, H)
        self.heads = floats(1, H)
        self.head_parts = floats(B, chunks, 3, H)
        self.skip = floats(H, columns)
        self.dskip = floats(B, H, chunks, columns)
        self.ends = floats(B, H, segments, V, K)
        self.states = (dtype, [B, H, -(-chunks // 2), columns, K])  # of pairs


ARRAYS = Arrays()


def chunk_sums(x=ARRAYS.tokens, sums=ARRAYS.gates, *, seqlen=100):
    options = {"seqlen": seqlen, "scale": 1.0, "least": -128.0}
    target = "tk_linear_attention_chunk_sums_v1"
    return Call(target, [x], [sums], {"options": options})


_STEP_OPTIONS = {
    "softplus": True,
    "least": 0.0,
    "most": float("inf"),
    "least_log_decay": -128.0,
}


def step_gates(
    raw=ARRAYS.tokens,
    rates=ARRAYS.heads,
    biases=_NONE,
    skip=_NONE,
    *,
    sums=ARRAYS.gates,
    weights=ARRAYS.gates,
    columns=_NONE,
):
    return Call(
        "tk_linear_attention_step_gates_v1",
        [raw, rates, biases, skip],
        [sums, weights, columns],
        {"options": _STEP_OPTIONS},
    )


def step_gradients(
    raw=ARRAYS.tokens,
    rates=ARRAYS.heads,
    biases=_NONE,
    parts=ARRAYS.gates,
    dweights=ARRAYS.gates,
    dskip=_NONE,
    *,
    draw=None,
    head_parts=ARRAYS.head_parts,
):
    return Call(
        "tk_linear_attention_step_gradients_v1",
        [raw, rates, biases, *[parts] * 4, dweights, dskip],
        [draw or raw, head_parts],
        {"options": _STEP_OPTIONS},
    )


def head_sums(parts, *results):
    target = "tk_linear_attention_head_sums_v1"
    return Call(target, [parts], list(results), {})


def segment_sums(
    arrays=ARRAYS,
    *,
    weights=_NONE,
    to=None,
    reverse=False,
    of_all=False,
    chunks_of_segment=1,
    consumers=2,
    stages=3,
):
    *leading, segments, dim_v, dim_k = arrays.ends[1]
    return Call(
        "tk_linear_attention_segment_sums_v1",
        [arrays.q, arrays.v, arrays.gates, weights, _NONE],
        [to or floats(*leading, max(segments - 1, 0), dim_v, dim_k)],
        {
            "options": {
                "scale": 1.0,
                "reverse": reverse,
                "of_all": of_all,
                "chunks_of_segment": chunks_of_segment,
            },
            "config": {"consumers": consumers, "stages": stages},
        },
    )


def states(
    arrays=ARRAYS,
    *,
    weights=_NONE,
    counts=_NONE,
    start=_NONE,
    stored=None,
    to=None,
    reverse=False,
    chunks_of_segment=1,
    stored_every=2,
    consumers=2,
    stages=3,
):
    return Call(
        "tk_linear_attention_states_v1",
        [arrays.q, arrays.v, arrays.gates, weights, counts, start],
        [stored or arrays.states, to or arrays.ends],
        {
            "options": {
                "scale": 1.0,
                "reverse": reverse,
                "chunks_of_segment": chunks_of_segment,
                "stored_every": stored_every,
            },
            "config": {"consumers": consumers, "stages": stages},
        },
    )


def outputs(
    arrays=ARRAYS,
    *,
    k=None,
    sums=None,
    weights=_NONE,
    counts=_NONE,
    skip=_NONE,
    start=_NONE,
    out=None,
    to=_NONE,
    chunks_of_segment=1,
    consumers=2,
    stages=2,
):
    gates = [sums or arrays.gates, weights, counts]
    return Call(
        "tk_linear_attention_outputs_v1",
        [arrays.q, k or arrays.q, arrays.v, *gates, skip, start],
        [out or arrays.v, to],
        {
            "options": {"scale": 1.0, "chunks_of_segment": chunks_of_segment},
            "config": {"consumers": consumers, "stages": stages},
        },
    )


def gradients(
    arrays=ARRAYS,
    *,
    states=None,
    weights=_NONE,
    counts=_NONE,
    skip=_NONE,
    dweights=_NONE,
    dskip=_NONE,
    stages=1,
    key_stages=1,
):
    a = arrays
    kept = [states or a.states, a.states]
    return Call(
        "tk_linear_attention_gradients_v1",
        [a.q, a.q, a.v, a.v, *kept, a.gates, weights, counts, skip],
        [a.q, a.q, a.v, *[a.gates] * 4, dweights, dskip],
        {
            "options": {"scale": 1.0},
            "config": {"stages": stages, "key_stages": key_stages},
        },
    )


def gate_gradients(parts=ARRAYS.gates, dgates=ARRAYS.tokens):
    return Call("tk_linear_attention_gate_gradients_v1", [parts] * 4, [dgates], {})


def test_blocks_of_gradients_walk_several_places():
    """Twelve parts, of three groups, by as many blocks as there are multiprocessors."""
    wide = Arrays((1, 1, 3, 3, 256, 64), segments=1)
    ((_, answer),) = launched(Gpu(FAKE_MULTIPROCESSORS="4"), gradients(wide))
    assert [x["grid"] for x in answer.of("launch")] == [[4, 1, 1]]


def test_launches():
    a = ARRAYS
    wide = Arrays((1, 1, 3, 3, 256, 64), segments=1)
    calls = [
        chunk_sums(floats(1, 1, 4)),
        states(counts=a.counts, reverse=True),
        outputs(weights=a.gates, skip=a.skip, start=a.ends, to=a.ends),
        gradients(weights=a.gates, dweights=a.gates),
        gate_gradients(),
        outputs(wide, consumers=1),
        gradients(wide),
        segment_sums(weights=a.gates),
        step_gates(
            ("float16", a.tokens[1]), skip=floats(4), columns=a.skip, biases=a.heads
        ),
        step_gradients(rates=floats(2, 4), dskip=a.dskip),
        head_sums(floats(7, 5, 3, 40), floats(7, 40), _NONE, floats(7, 40)),
    ]
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    launches = [(x["symbol"], x["grid"]) for each in ran for x in each.of("launch")]
    name = "tk_linear_attention_"
    assert launches == [
        (f"{name}chunk_sums", [2, 1, 2]),
        # Two slices for each of four heads, by two consumers; two segments.
        (f"{name}states_reverse_d128_counts_bf16", [4, 2, 2]),
        (f"{name}paired_outputs_d128_weights_skip_bf16", [4, 2, 2]),
        (f"{name}gradients_d128_weights_bf16", [8, 1, 1]),
        (f"{name}gate_gradients", [2, 1, 2]),
        (f"{name}outputs_d256_bf16", [3, 1, 1]),
        # Of a chunk, four blocks have a part of the columns of dq and dk each.
        (f"{name}gradients_d256_bf16", [12, 1, 1]),
        (f"{name}segment_sums_d128_weights_bf16", [4, 1, 2]),
        (f"{name}step_gates_fp16", [2, 1, 2]),
        (f"{name}step_gradients_fp32", [2, 1, 2]),
        (f"{name}head_sums", [3, 3, 7]),
    ]
    keys, values, stored = ran[1].of("map")
    assert keys["dims"] == [80, 100, 2, 2]
    assert keys["strides"] == [320, 160, 32000]
    assert values["dims"] == [96, 100, 4, 2]
    assert keys["box"] == values["box"] == [64, 64, 1, 1]
    assert (stored["dims"], stored["strides"]) == ([80, 2 * 4 * 128], [160])
    assert stored["box"] == [64, 64]
    assert len(ran[2].of("map")) == 4
    assert len(ran[3].of("map")) == 9


def test_empty_batch_launches_nothing():
    arrays = Arrays((0, *_SIZES[1:]))
    answers = Gpu().run(
        chunk_sums(arrays.tokens, sums=arrays.gates),
        step_gates(arrays.tokens, sums=arrays.gates, weights=arrays.gates),
        step_gradients(
            arrays.tokens,
            parts=arrays.gates,
            dweights=arrays.gates,
            head_parts=arrays.head_parts,
        ),
        head_sums(floats(0, 5, 3, 4), floats(0, 4), floats(0, 4), _NONE),
        segment_sums(arrays),
        states(arrays),
        outputs(arrays),
        gradients(arrays),
        gate_gradients(arrays.gates, arrays.tokens),
    )
    for answer in answers:
        assert (answer.code, answer.message, answer.driver) == (0, "", [])


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            chunk_sums(floats(2, 99, 4)),
            _INVALID,
            "x has shape (2, 99, 4); expected 1 or 100 along axis 1",
        ),
        (
            chunk_sums(sums=floats(2, 4, 100)),
            _INVALID,
            "sums has shape (2, 4, 100); expected (2, 4, 128)",
        ),
        (chunk_sums(("bfloat16", [2, 100, 4])), _INVALID, "x has FFI data type"),
        (
            step_gates(("int32", ARRAYS.tokens[1])),
            _UNIMPLEMENTED,
            "steps of int32; the kernels take float32, bfloat16 and float16",
        ),
        (
            step_gates(rates=floats(3, 4)),
            _INVALID,
            "rates has shape (3, 4); expected (2, 4)",
        ),
        (
            step_gates(biases=floats(4)),
            _INVALID,
            "biases has shape (4); expected 2 dimensions",
        ),
        (
            step_gates(weights=floats(2, 4, 100)),
            _INVALID,
            "weights has shape (2, 4, 100); expected (2, 4, 128)",
        ),
        (
            step_gates(skip=floats(4)),
            _INVALID,
            "skip and skip_columns go together",
        ),
        (
            step_gates(skip=floats(4), columns=floats(4, 96)),
            _INVALID,
            "skip_columns has 96 columns; expected a multiple of 64",
        ),
        (
            step_gradients(draw=("float16", ARRAYS.tokens[1])),
            _INVALID,
            "draw has FFI data type",
        ),
        (
            step_gradients(dweights=floats(2, 4, 64)),
            _INVALID,
            "dweights has shape (2, 4, 64); expected (2, 4, 128)",
        ),
        (
            step_gradients(head_parts=floats(2, 2, 2, 4)),
            _INVALID,
            "head_parts has shape (2, 2, 2, 4); expected (2, 2, 3, 4)",
        ),
        (
            step_gradients(dskip=floats(2, 4, 1, 128)),
            _INVALID,
            "dskip has shape (2, 4, 1, 128); expected (2, 4, 2, 128)",
        ),
        (
            step_gradients(dskip=floats(2, 4, 2, 96)),
            _INVALID,
            "dskip has 96 columns; expected a multiple of 64",
        ),
        (
            head_sums(floats(5, 2, 4), floats(4), _NONE, _NONE),
            _INVALID,
            "head_parts has shape (5, 2, 4); expected (.., rows, 3, H)",
        ),
        (
            head_sums(floats(5, 3, 4), floats(4), floats(5), _NONE),
            _INVALID,
            "sums has shape (5); expected that of head_parts, (5, 3, 4), without",
        ),
        (
            chunk_sums(floats(1, 1, 4), sums=floats(2, 4, 0), seqlen=0),
            _INVALID,
            "0 tokens of 4 heads; expected at least one of both",
        ),
        (
            states(Arrays(dtype="float32")),
            _UNIMPLEMENTED,
            "dtype fp32; the kernels take bfloat16 and float16",
        ),
        (
            states(Arrays((2, 100, 2, 4, 76, 96))),
            _INVALID,
            "rows of keys, (2, 100, 2, 76), are not a multiple of 16 bytes",
        ),
        (
            states(Arrays((2, 100, 3, 4, 80, 96))),
            _INVALID,
            "values has 4 heads, which is not a multiple of the 3 of keys",
        ),
        (
            states(Arrays((2, 100, 2, 4, 264, 96)), consumers=1),
            _UNIMPLEMENTED,
            "tiles of key dim 320; the kernels take multiples of 64 up to 256",
        ),
        (
            states(weights=ARRAYS.gates, reverse=True),
            _INVALID,
            "a kernel that does not take weights",
        ),
        (
            states(stored_every=0),
            _INVALID,
            "stored_every is 0; expected a number of chunks",
        ),
        (
            segment_sums(chunks_of_segment=2),
            _INVALID,
            "there is one segment; expected several",
        ),
        (segment_sums(to=_NONE), _INVALID, "to is not given"),
        (
            segment_sums(to=ARRAYS.ends),
            _INVALID,
            "to has shape (2, 4, 2, 96, 80); expected (2, 4, 1, 96, 80)",
        ),
        (
            states(chunks_of_segment=3),
            _INVALID,
            "chunks_of_segment is 3; expected 1 to the 2 chunks there are",
        ),
        (
            states(chunks_of_segment=2),
            _INVALID,
            "to has shape (2, 4, 2, 96, 80); expected (2, 4, 1, 96, 80)",
        ),
        (
            states(consumers=3),
            _INVALID,
            "config.consumers is 3; expected a divisor of the 4 slices",
        ),
        (
            states(consumers=4),
            _INVALID,
            "config.consumers is 4; expected 1 to 2",
        ),
        (
            outputs(Arrays((2, 100, 2, 4, 200, 96)), consumers=2),
            _INVALID,
            "config.consumers is 2; expected 1 to 1",
        ),
        (states(stages=8), _INVALID, "bytes of shared memory"),
        (
            states(stored=("bfloat16", [2, 4, 1, 96, 80])),
            _INVALID,
            "stored has shape (2, 4, 1, 96, 80); expected (2, 4, 1, 128, 80)",
        ),
        (
            outputs(k=("float16", ARRAYS.q[1])),
            _INVALID,
            "k has FFI data type",
        ),
        (
            outputs(sums=floats(2, 4, 100)),
            _INVALID,
            "sums has shape (2, 4, 100); expected (2, 4, 128)",
        ),
        (
            outputs(skip=floats(4, 96)),
            _INVALID,
            "skip has shape (4, 96); expected (4, 128)",
        ),
        (
            outputs(counts=floats(2, 4, 128)),
            _INVALID,
            "counts has shape (2, 4, 128); expected (2, 128)",
        ),
        (
            outputs(Arrays((2, 0, 2, 4, 80, 96))),
            _INVALID,
            "only the batch may be empty",
        ),
        (
            outputs(Arrays((70000, 1, 1, 1, 8, 8), 1), consumers=1),
            _UNIMPLEMENTED,
            "70000 batch elements; the kernels take up to 65535",
        ),
        (
            outputs(Arrays((1, 2**25, 1, 64, 8, 8), 2**19), consumers=1),
            _UNIMPLEMENTED,
            "more than 2^31 - 1 rows",
        ),
        (
            gradients(weights=ARRAYS.gates),
            _INVALID,
            "weights and dweights go together, and so do skip and dskip",
        ),
        (
            gradients(dskip=ARRAYS.dskip),
            _INVALID,
            "weights and dweights go together, and so do skip and dskip",
        ),
        (
            gradients(states=("bfloat16", [2, 4, 1, 128, 128])),
            _INVALID,
            "states has shape (2, 4, 1, 128, 128); expected (2, 4, 1, 128, 80)",
        ),
        (gradients(stages=0), _INVALID, "config.stages is 0; expected 1 to 8"),
        (gradients(key_stages=3), _INVALID, "config.key_stages is 3; expected 1 to 2"),
        (
            gradients(Arrays((2, 100, 2, 4, 264, 96))),
            _UNIMPLEMENTED,
            "keys of 264 dimensions; the kernels take up to 256",
        ),
        (
            gate_gradients(floats(2, 4, 64)),
            _INVALID,
            "as_query has shape (2, 4, 64); expected (2, 4, 128)",
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
