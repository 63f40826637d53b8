"""Calls of the targets of linear attention's kernels, as XLA would make them."""

from handler_process import Call

NONE = ("float32", [0])
# B, T, G, H, K, V: two chunks, one slice and a half, heads that share two groups.
SIZES = (2, 100, 2, 4, 80, 96)


def floats(*shape):
    return ("float32", list(shape))


class Arrays:
    """Of a call of these sizes."""

    def __init__(self, sizes=SIZES, segments=2, dtype="bfloat16"):
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
        self.marks = floats(B, H, segments, columns // 16)
        # Of all segments but one.
        self.added = floats(B, H, max(segments - 1, 0), V, K)
        self.kept = floats(B, H, max(segments - 1, 0))
        self.state = floats(B, H, V, K)
        self.states = (dtype, [B, -(-chunks // 2), H, columns, K])  # of pairs


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
    biases=NONE,
    skip=NONE,
    *,
    sums=ARRAYS.gates,
    weights=ARRAYS.gates,
    columns=NONE,
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
    biases=NONE,
    parts=ARRAYS.gates,
    dweights=ARRAYS.gates,
    dskip=NONE,
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
    weights=NONE,
    to=None,
    kept=None,
    reverse=False,
    of_all=False,
    chunks_of_segment=1,
    consumers=2,
    stages=3,
):
    return Call(
        "tk_linear_attention_segment_sums_v1",
        [arrays.q, arrays.v, arrays.gates, weights, NONE],
        [to or arrays.added, kept or arrays.kept],
        {
            "options": {
                "scale": 1.0,
                "reverse": reverse,
                "of_all": of_all,
                "chunks_of_segment": chunks_of_segment,
            },
            "config": {"consumers": consumers, "stages": stages, "helpers": 0},
        },
    )


def segment_starts(
    first=NONE, kept=ARRAYS.kept, added=ARRAYS.added, starts=ARRAYS.ends
):
    target = "tk_linear_attention_segment_starts_v1"
    return Call(target, [first, kept, added], [starts], {})


def spread(
    arrays=ARRAYS,
    *,
    marks=None,
    ends=None,
    results=None,
    reverse=False,
    chunks_of_segment=1,
    stored_every=0,
    in_place=None,
):
    """Of states where there is ``stored_every``, else of outputs."""
    ends = ends or arrays.ends
    results = results or (arrays.states if stored_every else arrays.v)
    return Call(
        "tk_linear_attention_spread_v1",
        [arrays.v, marks or arrays.marks, ends, results],
        [ends, results],
        {
            "options": {
                "reverse": reverse,
                "chunks_of_segment": chunks_of_segment,
                "stored_every": stored_every,
            }
        },
        in_place={0: 2, 1: 3} if in_place is None else in_place,
    )


def states(
    arrays=ARRAYS,
    *,
    weights=NONE,
    counts=NONE,
    start=NONE,
    stored=None,
    to=None,
    marks=None,
    reverse=False,
    chunks_of_segment=1,
    stored_every=2,
    consumers=2,
    stages=3,
):
    return Call(
        "tk_linear_attention_states_v1",
        [arrays.q, arrays.v, arrays.gates, weights, counts, start],
        [stored or arrays.states, to or arrays.ends, marks or arrays.marks],
        {
            "options": {
                "scale": 1.0,
                "reverse": reverse,
                "chunks_of_segment": chunks_of_segment,
                "stored_every": stored_every,
            },
            "config": {"consumers": consumers, "stages": stages, "helpers": 0},
        },
    )


def outputs(
    arrays=ARRAYS,
    *,
    k=None,
    sums=None,
    weights=NONE,
    counts=NONE,
    skip=NONE,
    start=NONE,
    out=None,
    to=None,
    marks=None,
    chunks_of_segment=1,
    consumers=2,
    stages=2,
    helpers=None,
):
    gates = [sums or arrays.gates, weights, counts]
    return Call(
        "tk_linear_attention_outputs_v1",
        [arrays.q, k or arrays.q, arrays.v, *gates, skip, start],
        [out or arrays.v, to or arrays.ends, marks or arrays.marks],
        {
            "options": {"scale": 1.0, "chunks_of_segment": chunks_of_segment},
            "config": {
                "consumers": consumers,
                "stages": stages,
                "helpers": consumers - 1 if helpers is None else helpers,
            },
        },
    )


def gradients(
    arrays=ARRAYS,
    *,
    states=None,
    weights=NONE,
    counts=NONE,
    skip=NONE,
    dweights=NONE,
    dskip=NONE,
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
