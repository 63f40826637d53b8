"""Steps of one token by their kernel, in the interpreter, under transformations."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recurrent_cases import quick_jit
from state_step_cases import (
    BASED,
    CASES,
    HEDGEHOGS,
    LINEAR,
    MORE,
    SMALL_WINDOWS,
    SSD,
    arrays_of,
    check,
    given,
    specs_of,
    step,
)

import tk_jax
from tk_jax import _dispatch, _ffi
from tk_jax.ops import _state_step
from tk_jax.ops.hedgehog_attention import hedgehog_attention_reference

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)
EXHAUSTIVE = pytest.mark.exhaustive
ROWS, COLUMNS, NORMALIZED, WINDOWS = CASES[0], CASES[4], CASES[5], CASES[11]
FEATURES = CASES[12]


@pytest.fixture(scope="module")
def compiled(request):
    """Many kernels of a header take little longer to compile than one."""
    exhaustive = request.config.getoption("--exhaustive")
    cases = CASES + (MORE if exhaustive else [SMALL_WINDOWS])
    specs = sorted(specs_of(cases), key=lambda spec: spec["header"])
    for _, group in itertools.groupby(specs, lambda spec: spec["header"]):
        _ffi.interpreter().compile(list(group))


interpreted = [on_cpu, pytest.mark.usefixtures("compiled")]


def marked(function):
    for mark in interpreted:
        function = mark(function)
    return function


@marked
@pytest.mark.parametrize(
    "case", CASES + [pytest.param(case, marks=EXHAUSTIVE) for case in MORE], ids=str
)
def test_values(case):
    check(step(case), case)


@on_cpu
@pytest.mark.parametrize(
    "case",
    [
        case
        if case in (ROWS, NORMALIZED, WINDOWS, FEATURES)
        else pytest.param(case, marks=EXHAUSTIVE)
        for case in CASES + MORE
    ],
    ids=str,
)
def test_what_the_gpu_executes(case, ptx):
    check(step(case), case)


@marked
@pytest.mark.parametrize("case", [ROWS, NORMALIZED, SMALL_WINDOWS, WINDOWS], ids=str)
def test_schedules_change_nothing_and_start_from_the_same_state(case):
    arrays = given(case)

    def run():
        return jax.block_until_ready(quick_jit(step(case))(**arrays))

    expected = run()
    with tk_jax.interpret_options(seed=1, schedules=4, multiprocessors=2):
        got = run()
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


@marked
@pytest.mark.parametrize("case", [ROWS, NORMALIZED, WINDOWS], ids=str)
def test_a_state_that_is_given_away_is_updated_in_place(case):
    arrays = given(case)
    expected = quick_jit(step(case))(**arrays)
    # Nobody gave it away: it is as it was.
    for x, y in zip(*map(jax.tree.leaves, (arrays, given(case))), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))
    function = quick_jit(step(case), donate_argnames="state")
    text = function.lower(**arrays).compile().as_text()
    for x in jax.tree.leaves(arrays["state"]):
        sizes = ",".join(map(str, x.shape))
        assert x.ndim < 4 or not re.search(rf"f\d+\[{sizes}\]\S* copy\(", text)

    arrays["state"] = jax.tree.map(jnp.copy, arrays["state"])
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(arrays["state"])]
    out, state = function(**arrays)
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert after == before
    assert all(x.is_deleted() for x in jax.tree.leaves(arrays["state"]))
    for x, y in zip(*map(jax.tree.leaves, ((out, state), expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


@marked
def test_a_scan_carries_the_state_in_place():
    case = COLUMNS
    tokens = [given(case, arrays_of(case, seed)) for seed in range(3)]
    state = tokens[0]["state"]
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x),
        *[{k: x for k, x in token.items() if k != "state"} for token in tokens],
    )

    def decode(state, tokens):
        def body(state, token):
            out, state = step(case)(**token, state=state)
            return state, out

        return jax.lax.scan(body, state, tokens)

    compiled = quick_jit(decode, donate_argnums=0).lower(state, stacked).compile()
    sizes = ",".join(map(str, state.shape))
    assert not re.search(rf"f32\[{sizes}\]\S* copy\(", compiled.as_text())
    expected = []
    for token in tokens:
        out, state = quick_jit(step(case))(**(token | {"state": state}))
        expected.append(out)
    final, outs = compiled(jnp.copy(tokens[0]["state"]), stacked)
    np.testing.assert_array_equal(np.float32(outs), np.float32(jnp.stack(expected)))
    np.testing.assert_array_equal(final, state)


@marked
@pytest.mark.parametrize(
    ("case", "some"),
    [(ROWS, ()), (NORMALIZED, ()), (WINDOWS, ("k_map",))],
    ids=str,
)
def test_vmap_over_each_argument_and_over_all(case, some):
    arrays = given(case)
    some = some or tuple(arrays)

    def halved(x):
        return (0.5 * x).astype(x.dtype)

    @quick_jit
    def both(arrays):
        results = []
        for names in [*((name,) for name in some), tuple(arrays)]:
            part = {name: arrays[name] for name in names}
            others = {k: x for k, x in arrays.items() if k not in names}

            def run(part, others=others):
                return step(case)(**others, **part)

            pair = jax.tree.map(lambda x: jnp.stack([x, halved(x)]), part)
            mapped = jax.tree.map(lambda x: x[1], jax.vmap(run)(pair))
            results.append((mapped, run(jax.tree.map(halved, part))))
        return results

    for got, expected in both(arrays):
        for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(
                np.float32(x), np.float32(y), rtol=1e-2, atol=1e-5
            )


@marked
@pytest.mark.parametrize(
    ("case", "derivatives"),
    [
        pytest.param(ROWS, ["reverse"], marks=EXHAUSTIVE),
        (NORMALIZED, ["reverse", "forward"]),
        pytest.param(NORMALIZED, ["second"], marks=EXHAUSTIVE),
        pytest.param(SMALL_WINDOWS, ["reverse"], marks=EXHAUSTIVE),
    ],
    ids=str,
)
def test_derivatives_are_those_of_xla(case, derivatives):
    arrays = given(case)
    length = None
    if case.op == "hedgehog_attention":
        length, arrays["state"] = arrays["state"].length, arrays["state"][:4]

    def loss(implementation, arrays):
        if length is not None:
            arrays = arrays | {"state": (*arrays["state"], length)}
        results = step(case, implementation)(**arrays)
        return sum(
            jnp.sum(jnp.sin(0.05 * x.astype(jnp.float32)))
            for x in jax.tree.leaves(results)
            if jnp.issubdtype(x.dtype, jnp.floating)
        )

    def derive(implementation):
        fn = functools.partial(loss, implementation)
        gradient = jax.grad(fn)
        return [
            {
                "reverse": lambda: gradient(arrays),
                "forward": lambda: jax.jvp(fn, (arrays,), (arrays,))[1],
                "second": lambda: jax.jvp(gradient, (arrays,), (arrays,))[1],
            }[kind]()
            for kind in derivatives
        ]

    got, expected = (
        quick_jit(derive, static_argnums=0)(x) for x in ("interpret", "xla")
    )
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        scale = float(jnp.abs(y.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.float32(x), np.float32(y), rtol=0, atol=2e-2 * scale
        )


@marked
def test_hedgehog_steps_are_the_sequence():
    """Through blocks, and from nothing on."""
    case = SMALL_WINDOWS
    rng = np.random.default_rng(0)
    heads, kv_heads = case.heads
    tokens = {
        "q": rng.standard_normal((1, 11, heads, 8)),
        "k": rng.standard_normal((1, 11, kv_heads, 8)),
        "v": rng.standard_normal((1, 11, kv_heads, case.value_dim)),
    }
    tokens = {name: jnp.float32(x) for name, x in tokens.items()}
    arrays = given(case)
    others = {name: arrays[name] for name in ("q_map", "k_map", "alpha", "beta")}
    others = jax.tree.map(jnp.float32, others)
    state = jax.tree.map(
        lambda x: jnp.zeros_like(
            x[:1], jnp.int32 if x.dtype == jnp.int32 else jnp.float32
        ),
        arrays["state"],
    )
    run = quick_jit(step(case))
    outs = []
    for t in range(11):
        token = {name: x[:, t] for name, x in tokens.items()}
        out, state = run(**token, **others, state=state)
        outs.append(out)
    reference = functools.partial(hedgehog_attention_reference, **case.settings)
    expected, sums = quick_jit(reference)(**tokens, **others)
    np.testing.assert_allclose(jnp.stack(outs, 1), expected, rtol=1e-4, atol=1e-5)
    for x, y in zip(state[:2], sums, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert state.length == 11


@marked
@pytest.mark.parametrize("case", [CASES[3], CASES[6], NORMALIZED, CASES[2]], ids=str)
def test_what_is_not_finite_stays_where_it_is(case):
    """Also beside rows and columns that a tile has and the state has not."""
    values, *products = ("x", "C", "B") if case.op == "ssd" else ("v", "q", "k")
    # Of one sign: no order of a sum makes infinities NaN that others do not.
    arrays = given(case)
    arrays |= {name: jnp.abs(arrays[name]) + 0.1 for name in products}
    spoiled = [(values, jnp.inf, (0, 0, 0)), (products[1], -jnp.inf, (0, 0, 1))]
    spoiled.append((values, jnp.nan, (0, -1, 2)))
    for name, number, place in spoiled:
        changed = arrays | {name: arrays[name].at[place].set(number)}
        got = quick_jit(step(case))(**changed)
        expected = quick_jit(step(case, "xla"))(**changed)
        for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            for kind in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(*map(kind, map(np.float32, (x, y))))


@marked
def test_a_decay_of_zero_forgets_what_is_not_a_number():
    arrays = given(COLUMNS)
    arrays["log_decay"] = jnp.full_like(arrays["log_decay"], -jnp.inf)
    zeros = jnp.zeros_like(arrays["state"])
    expected = quick_jit(step(COLUMNS))(**arrays | {"state": zeros})
    got = quick_jit(step(COLUMNS))(**arrays | {"state": zeros + jnp.nan})
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))


@marked
def test_shard_map_over_batch_and_heads(cpu_devices):
    arrays = given(COLUMNS)
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), types, devices=cpu_devices[:4])
    for implementation in (None, "interpret"):
        run = step(COLUMNS, implementation)
        sharded = jax.shard_map(
            lambda arrays, run=run: run(**arrays),
            mesh=mesh,
            in_specs=P("batch", "heads"),
            out_specs=P("batch", "heads"),
        )
        got, expected = quick_jit(sharded)(arrays), quick_jit(run)(**arrays)
        for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(np.float32(x), np.float32(y), atol=1e-6)


@marked
@pytest.mark.parametrize("case", [COLUMNS], ids=str)
def test_batches_of_any_rank_and_of_nothing(case):
    arrays = given(case)
    shared = ("A", "D", "dt_bias")
    expected = quick_jit(step(case))(**arrays)

    def batched(change):
        changed = {k: x if k in shared else change(x) for k, x in arrays.items()}
        return quick_jit(step(case))(**changed)

    for change, undo in (
        (lambda x: x[0], lambda x: x[None]),
        (lambda x: x[None], lambda x: x[0]),
    ):
        for x, y in zip(
            *map(jax.tree.leaves, (batched(change), expected)), strict=True
        ):
            got = np.float32(undo(x))
            np.testing.assert_array_equal(got, np.float32(y)[: got.shape[0]])
    for x, y in zip(
        *map(jax.tree.leaves, (batched(lambda x: x[:0]), expected)), strict=True
    ):
        assert x.shape == (0, *y.shape[1:])


# -- What is chosen, and what it is lowered to ----------------------------------------


def lowered_for_cuda(function, **arrays) -> str:
    traced = jax.jit(function).trace(**arrays)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


LARGE = [
    SSD(128, 64, (1, 64), skip="H", gate=True, batch=64),
    LINEAR(128, 128, (16, 16), batch=64),
    LINEAR(128, 128, (16, 16), batch=64, normalize=True),
    BASED(16, 64, (16, 16), batch=64, decay="none", normalize=True),
    HEDGEHOGS(64, 128, (16, 4), batch=3, decay="none"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_one_call_is_all_that_touches_the_state(case):
    arrays = jax.eval_shape(functools.partial(given, case))
    text = lowered_for_cuda(step(case, "tk"), **arrays)
    expected = {"tk_state_step_v1": 1}
    if case.normalize or case.op == "hedgehog_attention":
        expected["tk_state_step_v1"] = 2
    if case.op == "hedgehog_attention":
        expected["tk_hedgehog_attention_step_v1"] = 2
    found = re.findall(r"custom_call @(tk_\w+)\(.*", text)
    assert sorted(found) == sorted(expected)
    for target, count in expected.items():
        (call,) = re.findall(rf".*custom_call @{target}.*", text)
        assert call.count("output_operand_alias<") == count
    # Beside them functions, their calls and returns, the choice of the platform; and
    # the oldest token is taken from the windows.
    allowed = r"custom_call @tk_|func\.func|call @|return|\}\) :|stablehlo.slice.*\[0:"
    for x in jax.tree.leaves(arrays["state"]):
        sizes = "x".join(map(str, x.shape))
        for line in text.splitlines():
            if x.ndim == 4 and re.search(rf"<{sizes}x\w+>", line):
                assert re.search(allowed, line), line
    default = lowered_for_cuda(step(case, None), **arrays)
    assert re.findall(r"custom_call @(tk_\w+)\(.*", default) == found


@pytest.mark.parametrize("op", ["ssd", "linear_attention", "based_attention"])
def test_float64_is_xla(op, monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    case = next(case for case in CASES if case.op == op)
    arrays = given(case)
    lacking = "steps in dtype float64 (it takes bfloat16, float16 and float32)"
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), arrays)
        choice = tk_jax.explain(step(case, None).func, **arrays, **case.settings)
        assert choice.reason == f"the TK kernel does not support {lacking}"
        for implementation in ("tk", "interpret"):
            with pytest.raises(NotImplementedError, match=re.escape(lacking)):
                step(case, implementation)(**arrays)
        if op != "linear_attention":
            return
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(_dispatch, "_unsupported_gpu", lambda: None)
        monkeypatch.setattr(_dispatch, "_warned", set())
        with pytest.warns(tk_jax.FallbackWarning, match=f"{op}_step runs its XLA"):
            step(case, None)(**arrays)


@pytest.mark.parametrize(
    ("shape", "queries", "lacking"),
    [
        ((2, 4, 64), 9, "9 heads of queries to one of keys (it takes up to 8)"),
        (
            (2**16, 2**14, 32),
            1,
            "a B * H times slices of 16 values of 2147483648 (it takes up to "
            "2147483647)",
        ),
        (
            (1, 1, 2**31 - 1),
            1,
            "values of a dimension of 2147483647 (it takes up to 2147483583)",
        ),
    ],
    ids=str,
)
def test_what_the_kernel_lacks(shape, queries, lacking):
    found = _state_step.unsupported(shape, 64, jnp.bfloat16, queries=queries)
    assert found == lacking


def test_explain_says_that_there_is_a_kernel(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    for case in CASES:
        arrays = jax.eval_shape(functools.partial(given, case))
        choice = tk_jax.explain(step(case, None).func, **arrays, **case.settings)
        assert (choice.op, choice.cuda) == (f"{case.op}_step", "tk")


def test_cpu_refuses_the_kernel():
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        jax.block_until_ready(step(COLUMNS, "tk")(**given(COLUMNS)))


@pytest.mark.parametrize(
    ("columns", "queries", "tile"),
    [(1, 1, 16), (16, 1, 16), (17, 1, 32), (80, 2, 64), (80, 3, 32), (80, 8, 16)],
)
def test_configs(columns, queries, tile):
    assert _state_step.config(columns, queries).columns == tile


def test_export_keeps_the_target():
    arrays = given(COLUMNS)
    exported = jax.export.export(
        quick_jit(step(COLUMNS, None)),
        platforms=["cuda", "cpu"],
        disabled_checks=tk_jax.export_checks(),
    )(**arrays)
    restored = jax.export.deserialize(exported.serialize())
    assert "tk_state_step_v1" in restored.mlir_module()
    got, expected = restored.call(**arrays), jax.jit(step(COLUMNS, "xla"))(**arrays)
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))
