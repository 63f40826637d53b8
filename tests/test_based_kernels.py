"""Based attention's kernels, in the interpreter: values and gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from based_kernel_cases import (
    CASES,
    EXACT,
    MORE,
    SEGMENTED,
    TIME_AXES,
    Case,
    arrays_of,
    check,
    in_segments,
    kernels,
    public,
    specs_of,
)
from recurrent_cases import rounded, split_at, values_and_gradients

import tk_jax
from tk_jax import _ffi
from tk_jax.ops.based_attention import config, order
from tk_jax.ops.based_attention.features import TAYLOR

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Many kernels of a header take little longer to compile than one."""
    if jax.default_backend() != "cpu":
        return
    more = MORE if request.config.getoption("--exhaustive") else []
    cases = [*CASES, *more, *(case for case, _ in SEGMENTED)]
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
        case if case in CASES[3:4] else pytest.param(case, marks=EXHAUSTIVE)
        for case in CASES
    ],
    ids=str,
)
def test_what_the_gpu_executes(case, ptx):
    check(public(case), case)


@pytest.mark.parametrize(("case", "chunks"), SEGMENTED, ids=str)
def test_segments_side_by_side(case, chunks):
    check(kernels(case, in_segments(case, chunks)), case)


def test_what_the_gpu_executes_of_segments(ptx):
    case, chunks = SEGMENTED[3]
    check(kernels(case, in_segments(case, chunks)), case)


def test_segments_start_from_those_since_a_document():
    # It starts in the second of four: the last two go on from that one alone.
    case = Case(250, 16, 64, (1, 1), packed=True)
    arrays = arrays_of(case)
    arrays["segment_ids"] = np.repeat(np.int32([[0, 1]]), (100, 150), axis=1)
    check(kernels(case, in_segments(case, 1)), case, arrays)


@pytest.mark.parametrize("case", [CASES[1], pytest.param(CASES[5], marks=EXHAUSTIVE)])
def test_split_sequence_is_the_whole_one(case):
    arrays = arrays_of(case)

    def in_pieces(**arrays):
        outs, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, TIME_AXES, [40]):
            out, state = public(case)(**piece, initial_state=state)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    if case.packed:  # ids that change where the sequence is split would have to be told
        arrays["segment_ids"][:, 40] = arrays["segment_ids"][:, 39]
    check(in_pieces, case, arrays)


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=str)
def test_schedules_change_nothing(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)

    def run():
        return jax.block_until_ready(values_and_gradients(public(case), arrays))

    expected = run()
    with tk_jax.interpret_options(seed=1, schedules=3, multiprocessors=2):
        got = run()
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


def test_vmap_of_gradients_is_a_larger_batch():
    case = CASES[3]
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    ids = arrays.pop("segment_ids")
    scales = jnp.array([1.0, 0.5])

    def loss(arrays):
        out, state = public(case)(**arrays, segment_ids=ids)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(state))

    def scaled(scale):
        return jax.tree.map(lambda x: (scale * x).astype(x.dtype), arrays)

    gradient = jax.jit(jax.grad(loss))
    got = jax.jit(jax.vmap(lambda scale: jax.grad(loss)(scaled(scale))))(scales)
    for i, scale in enumerate(scales):
        for name, x in gradient(scaled(scale)).items():
            np.testing.assert_array_equal(np.float32(got[name][i]), np.float32(x))


@pytest.mark.parametrize("dim", config.FEATURE_DIMS)
def test_order_of_features(dim):
    columns = order.columns(dim)
    assert columns.size == config.state_columns(dim)
    features = TAYLOR.num_features(dim)
    np.testing.assert_array_equal(np.sort(columns[columns >= 0]), np.arange(features))
    # Column by column as cuda/include/tk/product_columns.h says.
    x = np.random.default_rng(0).standard_normal(dim)
    public_features = np.append(np.asarray(TAYLOR.keys(jnp.asarray(x))), 0)
    pairs = [x * np.roll(x, -distance) for distance in range(dim // 2 + 1)]
    expected = np.concatenate([x, *pairs])
    expected[-dim // 2 :] = np.eye(dim // 2)[0]
    missing = columns.size - expected.size
    np.testing.assert_allclose(
        public_features[columns], np.pad(expected, (0, missing)), rtol=1e-6
    )
    state = np.random.default_rng(1).standard_normal((2, features, 3))
    back = order.to_public(order.to_kernel(state, dim), dim)
    np.testing.assert_array_equal(back, np.float32(state))


@pytest.mark.parametrize("dim", config.FEATURE_DIMS)
def test_stages_fit_shared_memory(dim):
    chosen = config.scan_config(4, 4096, 16, dim, 64)
    for kernel, each in config.kernels(chosen, dim):
        for spec in _ffi.extension().based_attention_specs(
            kernel=kernel,
            dtype="bfloat16",
            dim=dim,
            documents=True,
            normalize=True,
            config=dataclasses.asdict(each),
        ):
            assert spec["min_blocks"] * (spec["shared_bytes"] + 1024) <= 228 * 1024
