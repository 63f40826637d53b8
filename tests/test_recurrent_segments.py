"""Segments of a sequence, side by side, in the interpreter: what joins them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import rounded
from recurrent_kernel_cases import (
    EXACT,
    LINEAR,
    SSD,
    Case,
    arrays_of,
    check,
    kernels,
    specs_of,
)

from tk_jax import _ffi
from tk_jax.ops.linear_attention import calls, config

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)

MILD = LINEAR(330, 16, 64, (1, 1), decay="mild", packed=True)
# Seven chunks, the last one short; two slices of values, of a head or of two heads.
ONE_HEAD = LINEAR(400, 16, 80, (1, 1))
TWO_HEADS = SSD(400, 16, 64, (1, 2), skip="H")


def in_segments(
    chunks: int, consumers: int = 1, helpers: int | None = None
) -> config.ScanConfig:
    helpers = consumers - 1 if helpers is None else helpers
    return config.ScanConfig(
        chunks_of_segment=chunks,
        states=config.WalkConfig(consumers=consumers, stages=2),
        outputs=config.WalkConfig(consumers=consumers, stages=2, helpers=helpers),
        gradients=config.GradientsConfig(stages=2, key_stages=2),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Many kernels of a header take little longer to compile than one."""
    if jax.default_backend() != "cpu":
        return
    specs = [
        *specs_of(MILD, in_segments(1)),
        *specs_of(MILD, in_segments(2, helpers=1)),
        *specs_of(ONE_HEAD, in_segments(1)),
        *specs_of(TWO_HEADS, in_segments(1, consumers=2)),
    ]
    specs = {spec["function"]: spec for spec in specs}.values()
    by_header = functools.partial(sorted, key=lambda spec: spec["header"])
    for _, group in itertools.groupby(by_header(specs), lambda spec: spec["header"]):
        _ffi.interpreter().compile(list(group))


def forgetting(case: Case, second: float = -40.0) -> dict:
    """Of which a chunk leaves nothing in float32; the second head has its own rate."""
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    if case.op == "ssd":
        arrays["A"] = jnp.array([-40.0, second], jnp.float32)
        return arrays | {"dt": jnp.full_like(arrays["dt"], 0.1)}
    return arrays | {"log_decay": jnp.full_like(arrays["log_decay"], -3.0)}


@pytest.mark.parametrize(("chunks", "helpers"), [(1, 0), (2, 1)])
def test_segments_side_by_side(chunks, helpers):
    _ffi.interpreter()
    check(kernels(MILD, in_segments(chunks, helpers=helpers)), MILD)


@pytest.mark.parametrize(
    ("case", "consumers"), [(ONE_HEAD, 1), (TWO_HEADS, 2)], ids=["one", "two"]
)
def test_sums_that_end_early(case, consumers):
    """Where one of a block's two heads forgets, the other one is walked to its end."""
    tiles = in_segments(3, consumers)
    check(kernels(case, tiles), case, forgetting(case, second=-1e-3))


def test_what_the_gpu_executes(ptx):
    check(kernels(ONE_HEAD, in_segments(2)), ONE_HEAD, forgetting(ONE_HEAD))


@pytest.mark.parametrize("what", ["values", "dout"])
def test_what_the_gpu_spreads(ptx, what):
    assert_same_places(what, ONE_HEAD, 1)


def sums_with_nan(log_decay: float, chunk: int, *, reverse: bool):
    """Of segments of two chunks, of whose tokens one of a chunk is not a number."""
    keys, values = jax.random.normal(jax.random.key(0), (2, 1, 256, 1, 64))
    keys, values = keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    values = values.at[:, 64 * chunk + 10].set(jnp.nan)
    decays = jnp.full((1, 256, 1), log_decay)
    sums = calls.chunk_sums(decays, values, scale=np.log2(np.e), least=-128.0)
    return calls.segment_sums(
        keys, values, calls.Gates(sums), in_segments(2), reverse=reverse, of_all=True
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_leave_out_what_has_decayed(reverse):
    """To what is far from a segment's end (reverse: start), nobody looks."""
    _ffi.interpreter()
    near, far = (0, 1) if reverse else (1, 0)
    for log_decay, chunk, is_found in (
        (-3.0, far, False),
        (-3.0, near, True),
        (-0.5, far, True),
    ):
        added, kept = sums_with_nan(log_decay, chunk, reverse=reverse)
        # Of two segments the first, which comes last in reverse.
        found = np.isnan(added[0, 0, 1 if reverse else 0])
        assert found.all() if is_found else not found.any()
        np.testing.assert_allclose(kept[0, 0], np.exp(128 * log_decay), 1e-5, 1e-38)


def nan_maps(case, tiles, arrays, spoil_cotangent):
    out, pull = jax.vjp(lambda arrays: kernels(case, tiles)(**arrays), arrays)
    cotangents = jax.tree.map(jnp.ones_like, out)
    if spoil_cotangent:
        # Late enough that earlier segments have to be told.
        dout = cotangents[0].at[:, 350, 0, 3].set(jnp.nan)
        cotangents = (dout, cotangents[1])
    (gradients,) = pull(cotangents)
    return jax.tree.map(np.isnan, (out, gradients))


@pytest.mark.parametrize(
    ("case", "consumers"), [(ONE_HEAD, 1), (TWO_HEADS, 2)], ids=["one", "two"]
)
@pytest.mark.parametrize("what", ["values", "keys", "dout"])
def test_what_is_no_number_reaches_the_segments_that_do_not_see_it(
    what, case, consumers
):
    """The same places as in one segment, though nothing is left of what is there."""
    _ffi.interpreter()
    assert_same_places(what, case, consumers)


def assert_same_places(what, case, consumers):
    names = {"ssd": ("x", "B")}.get(case.op, ("v", "k"))
    arrays = {k: v for k, v in forgetting(case).items() if v is not None}
    if what != "dout":
        name = names[what == "keys"]
        arrays[name] = arrays[name].at[:, 5, 0, 3].set(jnp.nan)
    run = functools.partial(
        nan_maps, case, arrays=arrays, spoil_cotangent=what == "dout"
    )
    found, expected = (run(in_segments(chunks, consumers)) for chunks in (2, 7))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if what == "dout":
        assert expected[1][names[0]][0, 0, 0, 3]
    else:
        assert expected[0][0][0, -1, 0, 3] and expected[0][1].any()
