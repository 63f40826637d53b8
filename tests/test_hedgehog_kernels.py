"""Hedgehog attention's kernels, in the interpreter: values, gradients and states."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hedgehog_kernel_cases import (
    CASES,
    DOCUMENT_STATES,
    DOCUMENTS,
    EXACT,
    MORE,
    MORE_DOCUMENT_STATES,
    MORE_DOCUMENTS,
    MORE_STATES,
    STATES,
    Case,
    arrays_of,
    check,
    definition,
    in_segments,
    public,
    specs_of,
)
from recurrent_cases import (
    BARS,
    quick_jit,
    relative_rms,
    rounded,
    values_and_gradients,
    weights_like,
)

import tk_jax
from tk_jax import _ffi

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)
EXHAUSTIVE = pytest.mark.exhaustive
# In segments of so many chunks; the last one's sums are made of two pieces.
SEGMENTED = Case(400)
SEGMENTS = ((SEGMENTED, 1), (SEGMENTED, 3), (Case(513), 8))
MORE_SEGMENTS = tuple(
    pytest.param(case, chunks, marks=EXHAUSTIVE)
    for case, chunks in (
        (Case(400, 128, 128, (2, 1)), 3),
        (Case(700, 64, 128, dtype="float16"), 2),
    )
)
# The same of packed documents, which some segments have several of and some a part.
PACKED = Case(400, 40, 24, (2, 1), batch=2, documents=(3, 280, 70, 130))
PACKED_SEGMENTS = (
    (PACKED, 2),
    pytest.param(Case(450, documents=(3, 300, 10, 130)), 1, marks=EXHAUSTIVE),
    pytest.param(Case(1100, documents=(900, 1)), 8, marks=EXHAUSTIVE),
)


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Many kernels of a header take little longer to compile than one."""
    if jax.default_backend() != "cpu":
        return
    cases = [*CASES, *STATES, *DOCUMENTS, PACKED, *(case for case, _ in SEGMENTS)]
    if request.config.getoption("--exhaustive"):
        cases += [*MORE, *MORE_DOCUMENTS, *MORE_DOCUMENT_STATES]
    specs = itertools.chain.from_iterable(map(specs_of, cases))
    specs = {spec["function"]: spec for spec in specs}.values()
    by_header = functools.partial(sorted, key=lambda spec: spec["header"])
    for _, group in itertools.groupby(by_header(specs), lambda spec: spec["header"]):
        _ffi.interpreter().compile(list(group))


@pytest.mark.parametrize(
    "case", CASES + [pytest.param(case, marks=EXHAUSTIVE) for case in MORE], ids=str
)
def test_values_and_gradients(case):
    check(public(case), case)


@pytest.mark.parametrize(
    "case",
    [
        case if case in CASES[-1:] else pytest.param(case, marks=EXHAUSTIVE)
        for case in CASES + DOCUMENTS
    ],
    ids=str,
)
def test_what_the_gpu_executes(case, ptx):
    check(public(case), case)


@pytest.mark.parametrize(
    "case",
    DOCUMENTS + [pytest.param(case, marks=EXHAUSTIVE) for case in MORE_DOCUMENTS],
    ids=str,
)
def test_packed_documents(case):
    check(public(case), case)


@pytest.mark.parametrize(("case", "chunks"), PACKED_SEGMENTS, ids=str)
def test_packed_documents_in_segments(case, chunks):
    check(in_segments(case, chunks), case)


@pytest.mark.parametrize(
    "case",
    DOCUMENT_STATES
    + [pytest.param(case, marks=EXHAUSTIVE) for case in MORE_DOCUMENT_STATES],
    ids=str,
)
def test_packed_documents_after_a_state(case):
    check(public(case), case, public(case, "xla"))


@pytest.mark.parametrize(("case", "chunks"), SEGMENTS + MORE_SEGMENTS, ids=str)
def test_segments_side_by_side(case, chunks):
    check(in_segments(case, chunks), case)


@pytest.mark.parametrize(
    "case",
    STATES + [pytest.param(case, marks=EXHAUSTIVE) for case in MORE_STATES],
    ids=str,
)
def test_states_and_their_gradients(case):
    """XLA's implementation in float64 is compared with the definition elsewhere."""
    check(public(case), case, public(case, "xla"))


def test_segments_after_a_state():
    case = Case(150, heads=(2, 1), batch=2, lengths=(37, 300))
    check(in_segments(case, 2), case, public(case, "xla", final=False))


@pytest.mark.parametrize("seqlen", [1, 130])
def test_final_state_without_an_initial_one(seqlen):
    case = Case(seqlen)
    with jax.enable_x64(True):
        given = rounded(arrays_of(case), case.dtype, EXACT)
        got = jax.jit(public(case, final=True))(**given)
        wide = {name: x.astype(jnp.float64) for name, x in given.items()}
        expected = jax.jit(public(case, "xla", True))(**wide)
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert relative_rms(x, y) <= BARS[case.dtype][0]


@pytest.mark.parametrize(
    "case",
    [
        Case(129, 128, 128, (2, 1), "float16"),
        pytest.param(
            Case(270, 128, 128, (2, 1), "float16", documents=(10, 200)),
            marks=EXHAUSTIVE,
        ),
        pytest.param(Case(270, documents=(200, 1, 9)), marks=EXHAUSTIVE),
    ],
    ids=str,
)
def test_schedules_change_nothing(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)

    def run():
        return jax.block_until_ready(values_and_gradients(public(case), arrays))

    expected = run()
    with tk_jax.interpret_options(seed=1, schedules=4, multiprocessors=2):
        got = run()
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


def test_keys_that_are_the_largest_together_share_the_gradient():
    """Of equal keys each is the largest; plain differentiation shares it too."""
    case = Case(64)
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    arrays["k"] = arrays["k"].at[:, 1::2].set(arrays["k"][:, ::2])
    arrays["k"] = arrays["k"].at[:, :8].set(arrays["k"][:, :1])
    got = values_and_gradients(public(case), arrays)
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    expected = values_and_gradients(definition("float32"), wide)
    for name in ("q", "k", "v"):
        error = relative_rms(got[1][name], expected[1][name])
        assert error <= BARS[case.dtype][1], name


def test_a_token_that_is_not_a_number_reaches_no_chunk_before_it():
    case = Case(200)
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    run = jax.jit(public(case))
    (expected,) = run(**arrays)
    for name in ("q", "k", "v"):
        (out,) = run(**(arrays | {name: arrays[name].at[:, 70].set(jnp.nan)}))
        np.testing.assert_array_equal(out[:, :64], expected[:, :64])
        assert jnp.isnan(out[:, 70]).all()
        if name == "q":
            np.testing.assert_array_equal(out[:, 71:], expected[:, 71:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_token_is_its_value(dtype):
    """Whatever it weighs: to the last bit, as for the definition."""
    case = Case(1, heads=(16, 16), dtype=dtype)
    arrays = rounded(arrays_of(case), dtype, EXACT)
    arrays["beta"] = jnp.float32(np.geomspace(1e-6, 1e8, 16))
    (out,) = public(case)(**arrays)
    np.testing.assert_array_equal(out, arrays["v"])


def test_without_weights_there_is_nothing_to_divide():
    case = Case(130)
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    arrays["beta"] = jnp.zeros_like(arrays["beta"])
    (out,), gradients = values_and_gradients(public(case), arrays)
    assert (out[:, :128] == 0).all() and (out[:, 128:] != 0).any()
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("mapped", [("q", "k", "v"), ("q_map", "alpha")])
def test_vmap_of_gradients_is_a_larger_call(mapped):
    case = Case(65, heads=(2, 1))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    scales = jnp.array([1.0, 0.5])

    def loss(arrays):
        (out,) = public(case)(**arrays)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    def scaled(scale):
        changed = {name: (scale * arrays[name]) for name in mapped}
        changed = {name: x.astype(arrays[name].dtype) for name, x in changed.items()}
        return arrays | changed

    gradient = jax.jit(jax.grad(loss))
    got = jax.jit(jax.vmap(lambda scale: jax.grad(loss)(scaled(scale))))(scales)
    for i, scale in enumerate(scales):
        for name, x in gradient(scaled(scale)).items():
            np.testing.assert_allclose(
                np.float32(got[name][i]), np.float32(x), rtol=2e-2, atol=1e-5
            )


def _pulled_back(case, arrays, cotangent):
    def run(arrays, cotangent):
        (out,), pull_back = jax.vjp(lambda x: public(case)(**x), arrays)
        return out, pull_back((cotangent.astype(out.dtype),))[0]

    return quick_jit(run)(arrays, jnp.asarray(cotangent))


@EXHAUSTIVE
def test_each_document_is_as_if_it_were_alone():
    """Two rows, and the same tokens in one row, after ten others."""
    length, others = 150, 10
    alone = Case(length, heads=(2, 1), batch=2)
    arrays = rounded(arrays_of(alone), alone.dtype, EXACT)
    cotangent = weights_like(arrays["q"])
    expected = _pulled_back(alone, arrays, cotangent)

    def pack(x):
        rows = jnp.asarray(x).reshape(1, 2 * length, *x.shape[2:])
        return jnp.concatenate([rows[:, :others] * 3, rows], axis=1)

    case = Case(2 * length + others, heads=(2, 1), documents=(others, length))
    names = ("q", "k", "v")
    packed = arrays | {name: pack(arrays[name]) for name in names}
    ids = jnp.arange(2 * length + others) >= jnp.array([[others], [others + length]])
    ids = jnp.sum(ids, axis=0, dtype=jnp.int32)
    cotangent = pack(cotangent).at[:, :others].set(0)

    def run(packed, cotangent):
        def call(packed):
            return public(case)(**packed, segment_ids=ids)[0]

        out, pull_back = jax.vjp(call, packed)
        return out, pull_back(cotangent.astype(out.dtype))[0]

    out, gradients = quick_jit(run)(packed, cotangent)

    def rows(x):
        return np.float32(x[:, others:].reshape(2, length, *x.shape[2:]))

    np.testing.assert_allclose(rows(out), np.float32(expected[0]), rtol=1e-2, atol=1e-3)
    for name, x in gradients.items():
        got = rows(x) if name in names else np.float32(x)
        want = np.float32(expected[1][name])
        assert np.abs(got - want).max() <= 1e-2 * np.abs(want).max(), name
        if name in names:
            assert (x[:, :others] == 0).all(), name


def test_a_token_that_is_not_a_number_reaches_no_document_further_on():
    case = Case(400, documents=(150, 70, 180))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    run = quick_jit(public(case))
    (expected,) = run(**arrays)
    for name in ("q", "k", "v"):
        (out,) = run(**(arrays | {name: arrays[name].at[:, 20].set(jnp.nan)}))
        assert jnp.isnan(out[:, 20]).all()
        # Within the document its keys are seen by all that follow.
        last = 64 if name == "q" else 150
        np.testing.assert_array_equal(
            np.float32(out[:, last + 64 :]), np.float32(expected[:, last + 64 :])
        )


@EXHAUSTIVE
@pytest.mark.parametrize("mapped", [("q",), ("q_map",), ("q", "q_map")], ids=str)
@pytest.mark.parametrize("ids_mapped", [False, True])
def test_vmap_of_documents_is_a_larger_call(mapped, ids_mapped):
    case = Case(200, heads=(2, 1), documents=(150, 7))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    ids = jnp.asarray(arrays.pop("segment_ids"))
    ids = jnp.stack([ids, jnp.roll(ids, 30)]) if ids_mapped else ids
    stacked = {name: jnp.stack([arrays[name], arrays[name] * 0.5]) for name in mapped}

    def gradients(changed, ids):
        def loss(arrays):
            (out,) = public(case)(**arrays, segment_ids=ids)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.grad(loss)(arrays | changed)

    got = quick_jit(jax.vmap(gradients, in_axes=(0, 0 if ids_mapped else None)))(
        stacked, ids
    )
    one = quick_jit(gradients)
    for i in range(2):
        changed = {name: x[i] for name, x in stacked.items()}
        for name, x in one(changed, ids[i] if ids_mapped else ids).items():
            np.testing.assert_allclose(
                np.float32(got[name][i]), np.float32(x), rtol=2e-2, atol=1e-4
            )


LACKING = [
    ({}, {"window": 32}, "a window of 32 (it takes 64)"),
    ({"q_map": (2, 64, 32), "k_map": (1, 64, 32)}, {}, "maps of 32 columns"),
    (
        {
            "q": (1, 8, 2, 136),
            "k": (1, 8, 1, 136),
            "q_map": (2, 136, 64),
            "k_map": (1, 136, 64),
        },
        {},
        "keys of 136 dimensions (it takes up to 128)",
    ),
    ({"v": (1, 8, 1, 136)}, {}, "values of 136 dimensions (it takes up to 128)"),
]


@pytest.mark.parametrize(("shapes", "settings", "lacking"), LACKING)
def test_what_the_kernels_lack(shapes, settings, lacking):
    shapes = {
        "q": (1, 8, 2, 64),
        "k": (1, 8, 1, 64),
        "v": (1, 8, 1, 64),
        "q_map": (2, 64, 64),
        "k_map": (1, 64, 64),
    } | shapes
    arrays = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for name, shape in shapes.items()
    }
    settings = {
        name: jax.ShapeDtypeStruct(x, jnp.int32) if isinstance(x, tuple) else x
        for name, x in settings.items()
    }
    op = tk_jax.hedgehog_attention
    choice = tk_jax.explain(op, **arrays, alpha=1.0, beta=1.0, **settings)
    assert choice.cuda == "xla" and lacking in choice.reason
    supported = tk_jax.explain(
        op,
        *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in SUPPORTED),
        alpha=1,
        beta=1,
        segment_ids=jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    assert supported.cuda == "tk"


SUPPORTED = ((1, 8, 2, 64), (1, 8, 1, 64), (1, 8, 1, 64), (2, 64, 64), (1, 64, 64))
