"""Linear attention's kernels, in the interpreter: values and gradients of both ops."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import rounded, split_at, values_and_gradients
from recurrent_kernel_cases import (
    CASES,
    EXACT,
    LINEAR,
    MORE,
    SSD,
    TIME_AXES,
    Case,
    arrays_of,
    assert_all_close,
    check,
    floats64,
    kernels,
    public,
    reference,
    seeds_of,
    specs_of,
)

import tk_jax
from tk_jax import _ffi
from tk_jax.ops.linear_attention import config

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)
EXHAUSTIVE = pytest.mark.exhaustive


# Places of gradients, which are chunks of groups, of one step and of two.
PLACES = [LINEAR(260, 16, value_dim, (2, 2)) for value_dim in (64, 72)]


def with_key_stages(case, stages: int) -> config.ScanConfig:
    tiles = config.scan_config(
        case.batch, case.seqlen, *case.heads, case.key_dim, case.value_dim
    )
    gradients = config.GradientsConfig(stages=2, key_stages=stages)
    return dataclasses.replace(tiles, gradients=gradients)


# Two slices to a block: heads that share keys, of several groups, halves of a head.
PAIRED = [
    SSD(200, 128, 64, (1, 4), skip="H", gate=True),
    SSD(70, 16, 64, (2, 4), "float16", packed=True),
    LINEAR(130, 64, 100, (1, 1)),
]
# And one without a helper, of which two share a multiprocessor.
ALONE = [
    SSD(130, 128, 64, (1, 3), skip="H", gate=True),
    LINEAR(200, 16, 80, (1, 1), "float16", packed=True),
]


def in_pairs(case: Case) -> config.ScanConfig:
    return config.ScanConfig(
        chunks_of_segment=-(-case.seqlen // config.CHUNK),
        states=config.WalkConfig(consumers=2, stages=2),
        outputs=config.WalkConfig(consumers=2, stages=2, helpers=1),
        gradients=config.GradientsConfig(stages=1, key_stages=1),
    )


def one_by_one(case: Case) -> config.ScanConfig:
    outputs = config.WalkConfig(consumers=1, stages=2)
    return dataclasses.replace(in_pairs(case), states=outputs, outputs=outputs)


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """Many kernels of a header take little longer to compile than one."""
    if jax.default_backend() != "cpu":
        return
    more = MORE if request.config.getoption("--exhaustive") else []
    specs = [
        *itertools.chain.from_iterable(map(specs_of, CASES + more)),
        *specs_of(PLACES[0], with_key_stages(PLACES[0], 1)),
        *itertools.chain.from_iterable(specs_of(x, in_pairs(x)) for x in PAIRED),
        *itertools.chain.from_iterable(specs_of(x, one_by_one(x)) for x in ALONE),
    ]
    specs = {spec["function"]: spec for spec in specs}.values()
    by_header = functools.partial(sorted, key=lambda spec: spec["header"])
    for _, group in itertools.groupby(by_header(specs), lambda spec: spec["header"]):
        _ffi.interpreter().compile(list(group))


@pytest.mark.parametrize(
    "case", CASES + [pytest.param(case, marks=EXHAUSTIVE) for case in MORE], ids=str
)
def test_values_and_gradients(case):
    check(public(case), case, seeds=seeds_of(case))


@pytest.mark.parametrize(
    "case",
    [
        case if case in (CASES[3], CASES[8]) else pytest.param(case, marks=EXHAUSTIVE)
        for case in CASES
    ],
    ids=str,
)
def test_what_the_gpu_executes(case, ptx):
    check(public(case), case, seeds=seeds_of(case, tokens=2**8))


@pytest.mark.parametrize("case", PLACES, ids=str)
@pytest.mark.parametrize("key_stages", [1, 2])
def test_a_block_of_gradients_walks_many_places(key_stages, case):
    _ffi.interpreter()
    with tk_jax.interpret_options(seed=2, schedules=4, multiprocessors=2):
        check(kernels(case, with_key_stages(case, key_stages)), case)


def test_what_the_gpu_executes_of_a_walk(ptx):
    with tk_jax.interpret_options(multiprocessors=2):
        check(public(PLACES[1]), PLACES[1])


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_slices_in_pairs(case):
    _ffi.interpreter()
    check(kernels(case, in_pairs(case)), case)


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_slices_without_a_helper(case):
    _ffi.interpreter()
    check(kernels(case, one_by_one(case)), case)


@pytest.mark.parametrize("case", [LINEAR(65, 128, 128, (2, 4), packed=True)], ids=str)
def test_split_sequence_is_the_whole_one(case):
    arrays = arrays_of(case)

    def in_pieces(**arrays):
        outs, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, TIME_AXES, [40]):
            out, state = public(case)(**piece, initial_state=state)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    # Ids that change exactly where the sequence is split would have to be told.
    arrays["segment_ids"][:, 40] = arrays["segment_ids"][:, 39]
    check(in_pieces, case, arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decays_next_to_large_ones_keep_their_digits(dtype):
    """After many decays of -80, a small one is a difference of large sums.

    Measured by XLA's implementation, in float32 but for the results.
    """
    case = LINEAR(64, 64, 64, (1, 3), dtype, state=False)
    with jax.enable_x64(True):
        arrays = rounded(arrays_of(case), dtype, EXACT)
        log_decay = arrays["log_decay"].at[:, ::2].set(-80).at[:, 1::2].set(-1e-3)
        arrays["log_decay"] = log_decay
        run = jax.jit(public(case))(**arrays)
        exact = reference(case)(**jax.tree.map(floats64, arrays))
        xla = jax.jit(public(case, "xla"))(**arrays)
    assert_all_close(dtype, run[0], exact[0], xla[0])


def test_a_token_that_is_not_a_number_reaches_no_chunk_before_it():
    case = SSD(200, 16, 64, (2, 4), "float16", skip="P", packed=True, gate=True)
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    arrays["segment_ids"] = None
    run = jax.jit(public(case))
    expected, _ = run(**arrays)
    for name in ("x", "B"):
        spoiled = arrays | {name: arrays[name].at[:, 70].set(jnp.nan)}
        y, state = run(**spoiled)
        np.testing.assert_array_equal(y[:, :64], expected[:, :64])
        assert jnp.isnan(y[:, 70:]).all() and jnp.isnan(state).all()


def test_a_rate_of_minus_infinity_forgets_everything():
    """And nothing that is not a token has a part in it."""
    case = SSD(70, 16, 64, (1, 2))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    arrays["dt"] = arrays["dt"] + 1
    arrays["A"] = jnp.array([-jnp.inf, -1.0])
    (y, state), gradients = values_and_gradients(public(case), arrays)
    x, dt, B, C = (np.float32(arrays[name]) for name in ("x", "dt", "B", "C"))
    added = dt[..., None, None] * x[..., None] * B[..., None, :]
    np.testing.assert_allclose(state[:, 0], added[:, -1, 0], rtol=1e-2, atol=1e-2)
    read = np.einsum("bthvk,btgk->bthv", added[:, :, :1], C)
    np.testing.assert_allclose(np.float32(y[:, :, :1]), read, rtol=5e-2, atol=5e-2)
    assert all(jnp.isfinite(gradients[name]).all() for name in ("x", "B", "C"))


@pytest.mark.parametrize("case", [CASES[2], CASES[8]], ids=str)
def test_schedules_change_nothing(case):
    arrays = rounded(arrays_of(case), case.dtype, EXACT)

    def run():
        return jax.block_until_ready(values_and_gradients(public(case), arrays))

    expected = run()
    with tk_jax.interpret_options(seed=1, schedules=4, multiprocessors=2):
        got = run()
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


def test_vmap_of_gradients_is_a_larger_batch():
    case = LINEAR(64, 80, 72)
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    scales = jnp.array([1.0, 0.5, 2.0])

    def loss(arrays):
        out, state = public(case)(**arrays)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(state))

    def scaled(scale):
        return jax.tree.map(lambda x: (scale * x).astype(x.dtype), arrays)

    gradient = jax.jit(jax.grad(loss))
    got = jax.jit(jax.vmap(lambda scale: jax.grad(loss)(scaled(scale))))(scales)
    for i, scale in enumerate(scales):
        expected = gradient(scaled(scale))
        for name, x in expected.items():
            np.testing.assert_array_equal(np.float32(got[name][i]), np.float32(x))
