"""Hedgehog attention's kernels, in the interpreter: values, gradients and states."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hedgehog_kernel_cases import (
    CASES,
    EXACT,
    MORE,
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
from recurrent_cases import BARS, relative_rms, rounded, values_and_gradients

import tk_jax
from tk_jax import _ffi

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)
EXHAUSTIVE = pytest.mark.exhaustive
# In segments of so many chunks; the last one's sums are made of two pieces.
SEGMENTED = Case(400)
SEGMENTS = ((SEGMENTED, 1), (SEGMENTED, 3), (Case(513), 8))


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Many kernels of a header take little longer to compile than one."""
    if jax.default_backend() != "cpu":
        return
    more = MORE if request.config.getoption("--exhaustive") else []
    cases = [*CASES, *STATES, *more, *(case for case, _ in SEGMENTS)]
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
        for case in CASES
    ],
    ids=str,
)
def test_what_the_gpu_executes(case, ptx):
    check(public(case), case)


@pytest.mark.parametrize(("case", "chunks"), SEGMENTS, ids=str)
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


@pytest.mark.parametrize("case", [Case(129, 128, 128, (2, 1), "float16")], ids=str)
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
    ({}, {"segment_ids": (1, 8)}, "segment_ids (in whose segments windows begin"),
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
        op, *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in SUPPORTED), alpha=1, beta=1
    )
    assert supported.cuda == "tk"


SUPPORTED = ((1, 8, 2, 64), (1, 8, 1, 64), (1, 8, 1, 64), (2, 64, 64), (1, 64, 64))
