"""The kernels' own sources, run and checked on the CPU through JAX."""

import functools

import attention_cases
import jax
import jax.numpy as jnp
import matmul_cases
import numpy as np
import pytest
import tolerance
from attention_cases import Case

import tk_jax
from tk_jax import _dispatch, _ffi, interpret
from tk_jax.ops.matmul import config
from tk_jax.ops.matmul.vjp import kernel_matmul

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)

# The GPU's cases, without the longest. Each walks over several tiles on four
# multiprocessors as a long one does on more. Of those that differ in length alone,
# every second is for --exhaustive: of each length, a case or two of three remain. So
# are those that combine a mask, a type and head dims that others have.
_COMBINED = (
    "B1-T300-S97-H2-K1-D128-fp16-bottom_right",
    "B2-T97-S300-H4-K1-D64-fp16-full",
    "B2-T129-S65-H2-K1-D96-fp16-bottom_right",
    "B1-T257-S130-H2-K1-D256-bf16-bottom_right",
    "B1-T129-S129-H2-K1-D136x200-bf16-causal",
    "B1-T65-S129-H2-K2-D64x256-bf16-full",
    "B1-T321-S321-H4-K2-D256-bf16-causal-100-7",
    "B1-T300-S129-H2-K1-D192x128-bf16-full-40-30",
)
_SELDOM = [
    *attention_cases.LENGTHS[1::2],
    *(case for case in attention_cases.CASES if str(case) in _COMBINED),
]
assert len(_SELDOM) == len(attention_cases.LENGTHS[1::2]) + len(_COMBINED)
CASES = [
    pytest.param(
        case, marks=[pytest.mark.exhaustive] if case in _SELDOM else [], id=str(case)
    )
    for case in attention_cases.CASES
    if case.scores <= 600_000
]


def _kernel(case, **settings):
    attention = functools.partial(
        tk_jax.attention,
        return_lse=True,
        implementation="interpret",
        **case.settings,
        **settings,
    )

    @jax.jit
    def run(q, k, v, dout, dlse):
        (out, lse), pull = jax.vjp(attention, q, k, v)
        return (out, lse, *pull((dout, dlse)))

    return run


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(case):
    inputs = case.inputs()
    results = _kernel(case)(*inputs)
    exact = attention_cases.reference_f64(case, *inputs)
    low = attention_cases.low_precision(case, *inputs)
    floors = attention_cases.floors(case, *inputs[:4])
    names = ("out", "lse", "dq", "dk", "dv")
    for name, *arrays, floor in zip(names, results, exact, low, floors, strict=True):
        tolerance.assert_close(*arrays, what=name, floor=floor)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 130, 200, 4, 2, 128, "bottom_right"),
        Case(1, 65, 97, 2, 1, 64, "causal", "fp16"),
        Case(1, 97, 65, 1, 1, 256),
    ],
    ids=str,
)
def test_what_the_gpu_executes(case, ptx):
    test_attention_and_its_gradients(case)


def test_what_the_gpu_executes_of_matmul(ptx):
    test_matmul((False, True), (129, 255, 193))


def test_without_a_mask_where_whole_heads_leave_multiprocessors_idle():
    """Three blocks of keys on four multiprocessors go through the causal kernel."""
    test_attention_and_its_gradients(Case(1, 100, 300, 4, 4, 64))
    test_attention_and_its_gradients(Case(2, 65, 260, 4, 2, 128, gain=30.0))


def test_attention_in_any_order():
    case = Case(2, 65, 65, 2, 1, 64, "causal")
    inputs = case.inputs()
    dq = _kernel(case, deterministic=False)(*inputs)[2]
    exact = attention_cases.reference_f64(case, *inputs)[2]
    low = attention_cases.low_precision(case, *inputs)[2]
    tolerance.assert_close(dq, exact, low, what="dq")


def test_every_schedule_gives_the_same_bits():
    case = Case(1, 200, 300, 2, 1, 64, "bottom_right")
    inputs = case.inputs()
    run = _kernel(case)
    first = jax.block_until_ready(run(*inputs))
    for seed in (1, 2, 3):
        with tk_jax.interpret_options(seed=seed, schedules=2):
            again = jax.block_until_ready(run(*inputs))
        for x, y in zip(first, again, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
    "transposes", matmul_cases.TRANSPOSES, ids=matmul_cases.transposes_id
)
@pytest.mark.parametrize("sizes", [(1, 8, 8), (65, 63, 129), (129, 255, 193)], ids=str)
def test_matmul(transposes, sizes):
    rng = np.random.default_rng(0)
    a, b = matmul_cases.operands(rng, transposes, ((2,), ()), sizes)
    got = matmul_cases.product(transposes, "interpret")(a, b)
    low = matmul_cases.product(transposes, "xla")(a, b)
    exact = matmul_cases.definition(a, b, transposes)
    tolerance.assert_close(got, exact, low, what="c")


@pytest.mark.parametrize("transposes", [(False, False), (True, True)], ids=str)
def test_tiles_that_are_compiled_when_asked_for(transposes):
    # An odd number of tiles along M: half of the last cluster has nothing to do.
    rng = np.random.default_rng(0)
    a, b = matmul_cases.operands(rng, transposes, sizes=(392, 264, 200))
    _ffi.interpreter()
    chosen = config.MatmulConfig(block_n=128, cluster_m=2)
    options = config.MatmulOptions(*transposes)
    c = kernel_matmul(a[None], b[None], options, chosen)[0]
    low = matmul_cases.product(transposes, "xla")(a, b)
    tolerance.assert_close(c, matmul_cases.definition(a, b, transposes), low, what="c")


def test_gradients_of_matmul():
    rng = np.random.default_rng(0)
    a, b = matmul_cases.operands(rng, (False, True), sizes=(40, 72, 56))

    def loss(implementation, a, b):
        c = tk_jax.matmul(a, b, transpose_b=True, implementation=implementation)
        return jnp.sum(jnp.sin(c.astype(jnp.float32)))

    got = jax.jit(jax.grad(functools.partial(loss, "interpret"), argnums=(0, 1)))(a, b)
    expected = jax.grad(functools.partial(loss, "xla"), argnums=(0, 1))(a, b)
    for x, y in zip(got, expected, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0.03, atol=0.03 * np.abs(y).max())


def test_vmap():
    q, k, v, _, _ = Case(2, 65, 65, 2, 1, 64, "causal").inputs()
    attention = functools.partial(tk_jax.attention, implementation="interpret")
    got = jax.vmap(attention)(jnp.stack([q, q]), jnp.stack([k, k]), jnp.stack([v, v]))
    np.testing.assert_array_equal(np.asarray(got[1]), np.asarray(attention(q, k, v)))


def test_values_beyond_the_arrays_are_not_read():
    # Neighbours in memory: whatever a tile reads past an odd length would be NaN.
    case = Case(1, 65, 67, 1, 1, 64, "full")
    q, k, v, _, _ = (jnp.asarray(x) for x in case.inputs())
    poisoned = [jnp.pad(x, ((0, 0), (0, 7), (0, 0), (0, 0)),
                        constant_values=np.nan) for x in (q, k, v)]  # fmt: skip
    cut = (x[:, : y.shape[1]] for x, y in zip(poisoned, (q, k, v), strict=True))
    out = tk_jax.attention(*cut, implementation="interpret")
    assert bool(jnp.isfinite(out.astype(jnp.float32)).all())


# -- What is refused -------------------------------------------------------------------


def test_what_the_kernel_lacks():
    q = jnp.ones((1, 4, 2, 36), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError,
        match="implementation='interpret' does not support head dim 36",
    ):
        tk_jax.attention(q, q, q, implementation="interpret")


def test_a_missing_library(monkeypatch):
    def missing():
        raise ImportError("no such file")

    monkeypatch.setattr(_ffi, "interpreter", missing)
    q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="cannot run: no such file"):
        tk_jax.attention(q, q, q, implementation="interpret")


def test_the_choice_explains_itself():
    a = jnp.ones((8, 8), jnp.bfloat16)
    choice = tk_jax.explain(tk_jax.matmul, a, a, implementation="interpret")
    assert (choice.cuda, choice.elsewhere) == ("no interpreter", "interpret")
    assert all(text in _dispatch._DESCRIPTIONS for text in (choice.cuda, "interpret"))


def test_lowering_for_a_gpu_is_refused():
    a = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    run = jax.jit(functools.partial(tk_jax.matmul, implementation="interpret"))
    with pytest.raises(NotImplementedError, match="'interpret' needs the CPU"):
        run.trace(a, a).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed is -1; expected at least 0"),
        ({"schedules": 0}, ValueError, "schedules is 0; expected at least 1"),
        ({"threads": -1}, ValueError, "threads is -1; expected at least 0"),
        (
            {"multiprocessors": 0},
            ValueError,
            "multiprocessors is 0; expected at least 1",
        ),
        ({"schedules": 2.0}, TypeError, "schedules is 2.0; expected an integer"),
    ],
)
def test_wrong_options(settings, error, message):
    with pytest.raises(error, match=message), tk_jax.interpret_options(**settings):
        pass


def test_options_are_restored():
    before = _ffi.interpreter().schedules()
    with (
        pytest.raises(ZeroDivisionError),
        interpret.interpret_options(seed=7, schedules=3),
    ):
        assert _ffi.interpreter().schedules() == (7, 3, 0, 4)
        raise ZeroDivisionError
    assert _ffi.interpreter().schedules() == before
