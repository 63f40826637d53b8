"""What the handlers of Based attention's kernels refuse, and what they launch."""

import pytest
from handler_process import Call, Gpu, both_stages, launched

_INVALID, _UNIMPLEMENTED = 3, 12
_NONE, _NO_NUMBERS = ("float32", [0]), ("int32", [0])
_COLUMNS = {8: 48, 12: 0, 16: 160, 24: 352, 32: 576}
# B, T, G, H, D, V: two chunks, one slice and a half, heads that share two groups.
_SIZES = (2, 100, 2, 4, 16, 96)


def floats(*shape):
    return ("float32", list(shape))


class Arrays:
    """Of a call of these sizes."""

    def __init__(self, sizes=_SIZES, segments=2, dtype="bfloat16"):
        B, T, G, H, D, V = sizes
        chunks = -(-T // 64)
        self.q = (dtype, [B, T, G, D])
        self.v = (dtype, [B, T, H, V])
        self.counts = floats(B, 64 * chunks)
        self.state = floats(B, H, V, _COLUMNS[D])
        pieces, slices = {24: 2, 32: 6}.get(D, 1), -(-V // 64)
        columns = _COLUMNS[D] // pieces
        self.added = floats(B, H, slices, pieces, segments - 1, 64, columns)
        self.since = ("int32", [B, segments])
        self.sums = floats(B, H, segments, 18, 16)
        self.parts = floats(B, T, H, slices, D)
        self.divisors = floats(B, H, 64 * chunks)
        self.changes = floats(B, H, slices, 64 * chunks)
        self.states = (dtype, [B, H, chunks, V, _COLUMNS[D]])


ARRAYS = Arrays()
OF_32 = Arrays((2, 100, 2, 4, 32, 96))
# Every head has its own q and k, and one slice of values.
WHOLE = Arrays((2, 100, 4, 4, 16, 64))


def states(
    a=ARRAYS,
    *,
    counts=_NONE,
    start=_NONE,
    added=_NONE,
    since=_NO_NUMBERS,
    stored=_NONE,
    adds=_NONE,
    to=_NONE,
    reverse=False,
    chunks_of_segment=1,
    stages=3,
):
    options = {"scale": 1.0, "reverse": reverse, "chunks_of_segment": chunks_of_segment}
    return Call(
        "tk_based_attention_states_v1",
        [a.q, a.v, counts, start, added, since],
        [stored if stored != _NONE else (a.q[0], [0]), adds, to],
        {"options": options, "config": {"stages": stages}},
    )


def outputs(
    a=ARRAYS,
    *,
    k=None,
    counts=_NONE,
    start=_NONE,
    added=_NONE,
    since=_NO_NUMBERS,
    sums=_NONE,
    to=_NONE,
    divisors=_NONE,
    normalize=False,
    stages=3,
):
    options = {"scale": 1.0, "chunks_of_segment": 1, "normalize": normalize}
    return Call(
        "tk_based_attention_outputs_v1",
        [a.q, k or a.q, a.v, counts, start, added, since, sums],
        [a.v, to, divisors],
        {"options": options, "config": {"stages": stages}},
    )


def chunk_outputs(a=OF_32, *, counts=_NONE, stages=1):
    return Call(
        "tk_based_attention_chunk_outputs_v1",
        [a.q, a.q, a.v, a.states, counts],
        [a.v],
        {"options": {"scale": 1.0}, "config": {"stages": stages}},
    )


def walked_gradients(
    a=ARRAYS,
    *,
    counts=_NONE,
    start=_NONE,
    added=_NONE,
    since=_NO_NUMBERS,
    changes=_NONE,
    sums=_NONE,
    dkeys=None,
    dv=None,
    to=_NONE,
    reverse=False,
    stages=2,
):
    options = {"scale": 1.0, "reverse": reverse, "chunks_of_segment": 1}
    dv = dv or (a.v if reverse else (a.q[0], [0]))
    return Call(
        "tk_based_attention_walked_gradients_v1",
        [a.q, a.q, a.v, a.v, counts, start, added, since, changes, sums],
        [dkeys or a.parts, dv, to],
        {"options": options, "config": {"stages": stages}},
    )


def gradients(a=OF_32, *, states=None, counts=_NONE, stages=1):
    return Call(
        "tk_based_attention_gradients_v1",
        [a.q, a.q, a.v, a.v, states or a.states, a.states, counts],
        [a.q, a.q, a.v],
        {"options": {"scale": 1.0}, "config": {"stages": stages}},
    )


def test_launches():
    a = ARRAYS
    calls = [
        states(counts=a.counts, stored=a.states, to=a.state, reverse=True),
        states(OF_32, adds=OF_32.added),
        outputs(start=a.state, added=a.added, since=a.since, to=a.state),
        outputs(counts=a.counts, sums=a.sums, divisors=a.divisors, normalize=True),
        walked_gradients(start=a.state, added=a.added, since=a.since),
        walked_gradients(WHOLE, dkeys=WHOLE.q, counts=WHOLE.counts),
        walked_gradients(WHOLE, dkeys=WHOLE.q, to=WHOLE.state, reverse=True),
        walked_gradients(changes=a.changes, sums=a.sums, reverse=True),
        chunk_outputs(),
        gradients(),
    ]
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    launches = [(x["symbol"], x["grid"]) for each in ran for x in each.of("launch")]
    name = "tk_based_attention_"
    assert launches == [
        # Two slices for each of four heads; two segments.
        (f"{name}states_d16_documents_bf16", [8, 2, 2]),
        # Of six pieces each; nothing starts after the second segment.
        (f"{name}states_d32_bf16", [48, 1, 2]),
        (f"{name}outputs_d16_bf16", [8, 2, 2]),
        (f"{name}outputs_d16_documents_normalized_bf16", [8, 2, 2]),
        (f"{name}walked_gradients_d16_bf16", [8, 2, 2]),
        (f"{name}walked_gradients_d16_documents_bf16", [4, 2, 2]),
        (f"{name}walked_gradients_d16_reverse_bf16", [4, 2, 2]),
        (f"{name}walked_gradients_d16_normalized_reverse_bf16", [8, 2, 2]),
        (f"{name}chunk_outputs_d32_bf16", [2, 2, 2]),
        # As many blocks as there are tiles, which are fewer than multiprocessors.
        (f"{name}gradients_d32_bf16", [8, 1, 1]),
    ]
    keys, values, stored = ran[0].of("map")
    assert keys["dims"] == [16, 100, 2, 2]
    assert keys["strides"] == [64, 32, 6400]
    assert keys["box"] == [16, 64, 1, 1]
    assert values["dims"] == [96, 100, 4, 2]
    assert values["box"] == [64, 64, 1, 1]
    assert stored["dims"] == [160, 96, 2 * 4 * 2]
    assert stored["strides"] == [320, 96 * 320]
    assert stored["box"] == [32, 64, 1]
    assert len(ran[2].of("map")) == 4
    # Parts of dq are written without one; dk and dv with.
    assert [len(each.of("map")) for each in ran[4:]] == [4, 5, 6, 5, 5, 9]


def test_empty_batch_launches_nothing():
    sizes = (0, *_SIZES[1:])
    arrays, of_32 = Arrays(sizes), Arrays((0, 100, 2, 4, 32, 96))
    answers = Gpu().run(
        states(arrays, stored=arrays.states),
        outputs(arrays),
        walked_gradients(arrays),
        chunk_outputs(of_32),
        gradients(of_32),
    )
    for answer in answers:
        assert (answer.code, answer.message, answer.driver) == (0, "", [])


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            states(Arrays(dtype="float32"), to=ARRAYS.state),
            _UNIMPLEMENTED,
            "dtype fp32; the kernels take bfloat16 and float16",
        ),
        (
            outputs(Arrays((2, 100, 3, 4, 16, 96))),
            _INVALID,
            "v has 4 heads, which is not a multiple of the 3 of q",
        ),
        (
            gradients(Arrays((2, 100, 2, 4, 12, 96))),
            _INVALID,
            "rows of q, (2, 100, 2, 12), are not a multiple of 16 bytes",
        ),
        (
            states(to=floats(2, 4, 96, 153)),
            _INVALID,
            "to has shape (2, 4, 96, 153); expected (2, 4, 96, 160)",
        ),
        (states(), _INVALID, "neither chunk_states nor adds nor to is asked for"),
        (
            states(adds=floats(2, 4, 2, 1, 2, 64, 160)),
            _INVALID,
            "adds has shape (2, 4, 2, 1, 2, 64, 160); "
            "expected (2, 4, 2, 1, 1, 64, 160)",
        ),
        (
            states(adds=ARRAYS.added, to=ARRAYS.state),
            _INVALID,
            "adds is asked for beside other states",
        ),
        (
            outputs(added=floats(2, 4, 2, 1, 1, 64, 153)),
            _INVALID,
            "added has shape (2, 4, 2, 1, 1, 64, 153); "
            "expected (2, 4, 2, 1, 1, 64, 160)",
        ),
        (
            outputs(since=("int32", [2, 1])),
            _INVALID,
            "since has shape (2, 1); expected (2, 2)",
        ),
        (
            states(to=ARRAYS.state, chunks_of_segment=3),
            _INVALID,
            "chunks_of_segment is 3; expected 1 to the 2 chunks there are",
        ),
        (
            states(stored=("bfloat16", [2, 4, 2, 128, 160])),
            _INVALID,
            "chunk_states has shape (2, 4, 2, 128, 160); expected (2, 4, 2, 96, 160)",
        ),
        (
            states(to=ARRAYS.state, stages=9),
            _INVALID,
            "config.stages is 9; expected 2 to the 4",
        ),
        # The next chunk's keys are there beside a chunk.
        (outputs(stages=1), _INVALID, "config.stages is 1; expected 2 to the 3"),
        (
            outputs(OF_32),
            _UNIMPLEMENTED,
            "outputs of 32 values; their state is stored",
        ),
        (
            walked_gradients(OF_32),
            _UNIMPLEMENTED,
            "walked_gradients of 32 values; their state is stored",
        ),
        (
            gradients(ARRAYS),
            _UNIMPLEMENTED,
            "gradients of 16 values; their state is walked through",
        ),
        (
            walked_gradients(dkeys=ARRAYS.q),
            _INVALID,
            "dkeys has shape (2, 100, 2, 16); expected (2, 100, 4, 2, 16)",
        ),
        (
            walked_gradients(dkeys=("bfloat16", ARRAYS.parts[1])),
            _INVALID,
            "dkeys has FFI data type",
        ),
        (
            walked_gradients(WHOLE),
            _INVALID,
            "dkeys has shape (2, 100, 4, 1, 16); expected (2, 100, 4, 16)",
        ),
        (walked_gradients(dv=ARRAYS.v), _INVALID, "dv is asked for beside dq"),
        (
            walked_gradients(reverse=True, dv=WHOLE.v),
            _INVALID,
            "dv has shape (2, 100, 4, 64); expected (2, 100, 4, 96)",
        ),
        (
            walked_gradients(stages=3),
            _INVALID,
            "config.stages is 3; expected 2 to the 2",
        ),
        (outputs(k=("float16", ARRAYS.q[1])), _INVALID, "k has FFI data type"),
        (
            outputs(sums=ARRAYS.sums),
            _INVALID,
            "sums or divisors of what is not normalized",
        ),
        (
            outputs(divisors=ARRAYS.divisors),
            _INVALID,
            "sums or divisors of what is not normalized",
        ),
        (
            outputs(divisors=floats(2, 100, 4), normalize=True),
            _INVALID,
            "divisors has shape (2, 100, 4); expected (2, 4, 128)",
        ),
        (
            walked_gradients(sums=ARRAYS.sums),
            _INVALID,
            "sums of what is not normalized",
        ),
        (
            walked_gradients(changes=ARRAYS.divisors),
            _INVALID,
            "changes has shape (2, 4, 128); expected (2, 4, 2, 128)",
        ),
        (
            walked_gradients(changes=ARRAYS.changes, sums=floats(2, 4, 1, 18, 16)),
            _INVALID,
            "sums has shape (2, 4, 1, 18, 16); expected (2, 4, 2, 18, 16)",
        ),
        (
            outputs(sums=floats(2, 4, 1, 18, 16), normalize=True),
            _INVALID,
            "sums has shape (2, 4, 1, 18, 16); expected (2, 4, 2, 18, 16)",
        ),
        (
            outputs(counts=floats(2, 4, 128)),
            _INVALID,
            "counts has shape (2, 4, 128); expected (2, 128)",
        ),
        (
            chunk_outputs(stages=2),
            _INVALID,
            "config.stages is 2; expected 1 to the 1",
        ),
        (
            gradients(states=ARRAYS.states),
            _INVALID,
            "states has shape (2, 4, 2, 96, 160); expected (2, 4, 2, 96, 576)",
        ),
        (gradients(stages=0), _INVALID, "config.stages is 0; expected 1 to the 1"),
        (
            gradients(Arrays((1, 1, 70000, 70000, 32, 8))),
            _UNIMPLEMENTED,
            "70000 groups; the kernels take up to 65535",
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
