"""What the handlers of linear attention's kernels refuse, and what they launch."""

import pytest
from handler_process import Gpu, both_stages, launched
from recurrent_handler_calls import (
    ARRAYS,
    NONE,
    SIZES,
    Arrays,
    chunk_sums,
    floats,
    gate_gradients,
    gradients,
    head_sums,
    outputs,
    segment_starts,
    segment_sums,
    spread,
    states,
    step_gates,
    step_gradients,
)

_INVALID, _UNIMPLEMENTED = 3, 12


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
        outputs(weights=a.gates, skip=a.skip, start=a.ends),
        gradients(weights=a.gates, dweights=a.gates),
        gate_gradients(),
        outputs(wide, to=NONE, marks=NONE, consumers=1),
        outputs(
            chunks_of_segment=2,
            to=NONE,
            marks=NONE,
            consumers=1,
            helpers=1,
        ),
        gradients(wide),
        segment_sums(weights=a.gates),
        step_gates(
            ("float16", a.tokens[1]), skip=floats(4), columns=a.skip, biases=a.heads
        ),
        step_gradients(rates=floats(2, 4), dskip=a.dskip),
        head_sums(floats(7, 5, 3, 40), floats(7, 40), NONE, floats(7, 40)),
        segment_starts(a.state),
        spread(),
        spread(stored_every=2, reverse=True),
    ]
    ran = [answer for _, answer in launched(Gpu(), *calls)]
    launches = [(x["symbol"], x["grid"]) for each in ran for x in each.of("launch")]
    name = "tk_linear_attention_"
    assert launches == [
        (f"{name}chunk_sums", [2, 1, 2]),
        # Two slices for each of four heads, by two consumers; two segments.
        (f"{name}states_reverse_d128_counts_bf16", [4, 2, 2]),
        (f"{name}helped_outputs_d128_weights_skip_bf16", [4, 2, 2]),
        (f"{name}gradients_d128_weights_bf16", [8, 1, 1]),
        (f"{name}gate_gradients", [2, 1, 2]),
        (f"{name}outputs_d256_bf16", [3, 1, 1]),
        (f"{name}helped_outputs_d128_bf16", [8, 1, 2]),
        # Of a chunk, four blocks have a part of the columns of dq and dk each.
        (f"{name}gradients_d256_bf16", [12, 1, 1]),
        (f"{name}segment_sums_d128_weights_bf16", [4, 1, 2]),
        (f"{name}step_gates_fp16", [2, 1, 2]),
        (f"{name}step_gradients_fp32", [2, 1, 2]),
        (f"{name}head_sums", [3, 3, 7]),
        # Of states of 7680 numbers, blocks have 1024.
        (f"{name}segment_starts", [8, 8, 1]),
        (f"{name}spread_out_bf16", [8, 1, 2]),
        (f"{name}spread_states_bf16", [8, 1, 2]),
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
    arrays = Arrays((0, *SIZES[1:]))
    answers = Gpu().run(
        chunk_sums(arrays.tokens, sums=arrays.gates),
        step_gates(arrays.tokens, sums=arrays.gates, weights=arrays.gates),
        step_gradients(
            arrays.tokens,
            parts=arrays.gates,
            dweights=arrays.gates,
            head_parts=arrays.head_parts,
        ),
        head_sums(floats(0, 5, 3, 4), floats(0, 4), floats(0, 4), NONE),
        segment_sums(arrays),
        segment_starts(
            arrays.state, kept=arrays.kept, added=arrays.added, starts=arrays.ends
        ),
        spread(arrays),
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
            head_sums(floats(5, 2, 4), floats(4), NONE, NONE),
            _INVALID,
            "head_parts has shape (5, 2, 4); expected (.., rows, 3, H)",
        ),
        (
            head_sums(floats(5, 3, 4), floats(4), floats(5), NONE),
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
        (segment_sums(to=NONE), _INVALID, "to is not given"),
        (
            segment_sums(kept=floats(2, 4, 2)),
            _INVALID,
            "kept has shape (2, 4, 2); expected (2, 4, 1)",
        ),
        (
            segment_starts(ARRAYS.ends),
            _INVALID,
            "first has shape (2, 4, 2, 96, 80); expected (2, 4, 96, 80)",
        ),
        (
            segment_starts(kept=floats(2, 4, 2)),
            _INVALID,
            "kept has shape (2, 4, 2); expected (2, 4, 1)",
        ),
        (
            segment_starts(added=ARRAYS.ends),
            _INVALID,
            "added has shape (2, 4, 2, 96, 80); expected (2, 4, 1, 96, 80)",
        ),
        (
            segment_starts(starts=floats(2, 4, 1, 96, 80)),
            _INVALID,
            "starts has shape (2, 4, 1, 96, 80); expected several segments",
        ),
        (
            segment_starts(starts=floats(2, 4, 2, 5, 8)),
            _INVALID,
            "expected several segments of states of a multiple of 64 numbers",
        ),
        (
            spread(marks=floats(2, 4, 2, 4)),
            _INVALID,
            "marks has shape (2, 4, 2, 4); expected (2, 4, 2, 8)",
        ),
        (
            spread(ends=floats(2, 4, 1, 96, 80)),
            _INVALID,
            "ends has shape (2, 4, 1, 96, 80); expected (2, 4, 2, 96, 80)",
        ),
        (
            spread(results=ARRAYS.states),
            _INVALID,
            "results has shape (2, 1, 4, 128, 80); expected (2, 100, 4, 96)",
        ),
        (
            spread(results=ARRAYS.v, stored_every=2),
            _INVALID,
            "results has shape (2, 100, 4, 96); expected (2, 1, 4, 128, 80)",
        ),
        (
            spread(chunks_of_segment=2),
            _INVALID,
            "segments of 2 of 2 chunks, stored every 0; expected several segments",
        ),
        (
            spread(Arrays(dtype="float32")),
            _UNIMPLEMENTED,
            "dtype fp32; the kernels take bfloat16 and float16",
        ),
        (states(marks=NONE), _INVALID, "several segments need to and marks"),
        (
            outputs(marks=floats(2, 4, 2, 6)),
            _INVALID,
            "marks has shape (2, 4, 2, 6); expected (2, 4, 2, 8)",
        ),
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
        (outputs(helpers=0), _INVALID, "config.helpers is 0; expected 1 to 1"),
        (states(stages=8), _INVALID, "bytes of shared memory"),
        (
            states(stored=("bfloat16", [2, 4, 1, 96, 80])),
            _INVALID,
            "stored has shape (2, 4, 1, 96, 80); expected (2, 1, 4, 128, 80)",
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
            "states has shape (2, 4, 1, 128, 128); expected (2, 1, 4, 128, 80)",
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


@pytest.mark.parametrize(
    ("in_place", "message"),
    [({1: 3}, "new_ends is not where"), ({0: 2}, "new_results is not where")],
)
def test_what_is_spread_into_is_in_place(in_place, message):
    (answer,) = Gpu().run(spread(in_place=in_place))
    assert answer.code == _INVALID
    assert message in answer.message
    assert answer.driver == []
