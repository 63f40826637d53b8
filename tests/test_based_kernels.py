"""Based attention's kernels, in the interpreter: values and gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import BARS, relative_rms, rounded, split_at, values_and_gradients
from tolerance import assert_close

import tk_jax
from tk_jax import _ffi
from tk_jax.ops.based_attention import based_attention_reference, config, order
from tk_jax.ops.based_attention.features import TAYLOR
from tk_jax.ops.based_attention.vjp import kernel_based_attention
from tk_jax.ops.linear_attention.config import LinearAttentionOptions

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)
EXHAUSTIVE = pytest.mark.exhaustive
EXACT = ("initial_state",)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call."""

    seqlen: int
    dim: int
    value_dim: int
    heads: tuple[int, int] = (1, 2)  # G, H
    dtype: str = "bfloat16"
    batch: int = 1
    state: bool = True
    packed: bool = False
    normalize: bool = False

    def __str__(self):
        fields = dataclasses.asdict(self).items()
        defaults = {field.name: field.default for field in dataclasses.fields(Case)}
        return " ".join(f"{k}={v}" for k, v in fields if v != defaults[k])


CASES = [
    Case(1, 16, 64, state=False),
    Case(63, 8, 64, (1, 1), "float16"),
    Case(64, 32, 64, (1, 1), packed=True),
    Case(65, 16, 128, (2, 4), packed=True),
    Case(200, 16, 72, (1, 2), "float16", batch=2, packed=True),
    Case(130, 16, 64, (1, 2), normalize=True, packed=True),
]
MORE = [
    Case(64, 24, 128, (1, 1)),
    Case(70, 8, 64, (1, 1), normalize=True, state=False),
    Case(129, 8, 200, (2, 2), packed=True),
    Case(193, 24, 64, (1, 2), "float16", packed=True),
    Case(130, 32, 128, (1, 2), normalize=True, packed=True),
    Case(200, 32, 64, (1, 1), "float16", packed=True),
    Case(66, 32, 64, (1, 1), "float16", state=False),
    Case(1000, 16, 64, (1, 1), normalize=True),
    Case(1000, 16, 64, (1, 1), "float16"),
]
# In pieces that are walked through side by side.
SEGMENTED = [
    (Case(200, 16, 64, (1, 1), packed=True), 1),
    (Case(200, 8, 64, (1, 1), normalize=True), 2),
    (Case(140, 24, 64, (1, 1)), 2),
]


def in_segments(case: Case, chunks: int) -> config.ScanConfig:
    chosen = config.scan_config(1, case.seqlen, 1, case.dim, case.value_dim)
    return dataclasses.replace(chosen, chunks_of_segment=chunks)


def arrays_of(case: Case) -> dict:
    rng = np.random.default_rng(case.seqlen)
    groups, heads = case.heads
    rows = (case.batch, case.seqlen)
    q, k = rng.standard_normal((2, *rows, groups, case.dim))
    v = rng.standard_normal((*rows, heads, case.value_dim))
    ids = None
    if case.packed:
        starts = rng.random(rows) < 0.03
        starts[:, case.seqlen // 3 : case.seqlen // 3 + 2] = True  # one of one token
        ids = np.asarray((starts.cumsum(1) * 3) % 21, np.int32)
    # A state that keys have made: with another, the divisors may be zero.
    earlier, values = k[:, ::-1], rng.standard_normal(v.shape)
    _, state = based_attention_reference(q, earlier, values, normalize=case.normalize)
    state = jax.tree.map(np.asarray, state)
    return {
        "q": q,
        "k": k,
        "v": v,
        "initial_state": state if case.state else None,
        "segment_ids": ids,
    }


def public(case: Case, implementation: str = "interpret"):
    return functools.partial(
        tk_jax.based_attention,
        normalize=case.normalize,
        return_final_state=True,
        implementation=implementation,
    )


def kernels(case: Case, tiles: config.ScanConfig):
    def based_attention(q, k, v, initial_state=None, segment_ids=None):
        options = LinearAttentionOptions(q.shape[-1] ** -0.5, case.normalize)
        return kernel_based_attention(
            options, True, q, k, v, None, initial_state, segment_ids, tiles=tiles
        )

    return based_attention


def reference(case: Case):
    return functools.partial(
        based_attention_reference, normalize=case.normalize, dtype=jnp.float64
    )


def low_precision(case: Case):
    """The same maths in chunks, with every operand of a product rounded once."""
    dtype = jnp.dtype(case.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    first, second = np.triu_indices(case.dim)
    halves = np.where(first == second, 0.5, 1.0)
    factors = np.append(np.ones(1 + case.dim), halves).astype(np.float32)

    def features(x):
        pairs = x[..., first] * x[..., second]
        return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], -1)

    def run(q, k, v, initial_state=None, segment_ids=None):
        scale, (batch, seqlen, heads, value_dim) = q.shape[-1] ** -0.5, v.shape
        q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
        state = jnp.zeros(
            (batch, heads, TAYLOR.num_features(case.dim), value_dim), jnp.float32
        )
        if case.normalize:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
            state = jnp.pad(state, [(0, 0)] * 3 + [(0, 1)])
            if initial_state is not None:
                initial_state = jnp.concatenate(
                    [initial_state[0], initial_state[1][..., None]], -1
                )
        state = state if initial_state is None else initial_state
        document = jnp.zeros((batch, seqlen), jnp.int32)
        if segment_ids is not None:
            changes = segment_ids[:, 1:] != segment_ids[:, :-1]
            document = jnp.pad(jnp.cumsum(changes, 1), [(0, 0), (1, 0)])

        def in_chunks(x, mode="constant"):
            missing = [(0, 0), (0, -seqlen % 64)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, missing, mode=mode)
            return jnp.moveaxis(x.reshape(batch, -1, 64, *x.shape[2:]), 1, 0)

        def step(carry, chunk):
            state, last = carry
            qs, ks, vs, at = chunk
            seen = jnp.tril(at[:, :, None] == at[:, None])[:, None]
            scores = scale * product("bihd,bjhd->bhij", qs, ks)
            weights = jnp.where(seen, TAYLOR.weights(scores), 0).astype(dtype)
            queries = factors * features(scale * qs.astype(jnp.float32))
            keys = features(ks.astype(jnp.float32)).astype(dtype)
            old = product("bihf,bhfv->bihv", queries.astype(dtype), state.astype(dtype))
            old = jnp.where((at == last)[..., None, None], old, 0)
            out = product("bhij,bjhv->bihv", weights, vs) + old
            end = at[:, -1:]
            left = jnp.where((at == end)[..., None, None], vs, 0)
            state = jnp.where((end == last)[..., None, None], state, 0)
            return (state + product("bjhf,bjhv->bhfv", keys, left), end), out

        chunks = (*map(in_chunks, (q, k, v)), in_chunks(document, "edge"))
        first = jnp.zeros((batch, 1), document.dtype)
        (state, _), out = jax.lax.scan(step, (state, first), chunks)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *v.shape[2:])[:, :seqlen]
        out = out.astype(dtype)
        if not case.normalize:
            return out, state
        out = out.astype(jnp.float32)
        out = (out[..., :value_dim] / out[..., value_dim:]).astype(dtype)
        state = tk_jax.NormalizedState(state[..., :value_dim], state[..., value_dim])
        return out, state

    return run


def floats64(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def check(fn, case: Case, arrays: dict | None = None) -> None:
    """``fn`` against the recurrence in float64, measured by plain XLA's errors."""
    with jax.enable_x64(True):
        arrays = rounded(arrays or arrays_of(case), case.dtype, EXACT)
        got = values_and_gradients(fn, arrays)
        low = values_and_gradients(low_precision(case), arrays)
        exact = values_and_gradients(reference(case), jax.tree.map(floats64, arrays))
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(got)[0]
    ]
    leaves = map(jax.tree.leaves, (got, low, exact))
    for what, x, less, expected in zip(paths, *leaves, strict=True):
        assert x.dtype == less.dtype, what
        # No excuse: it must be as exact as its precision lets it be.
        bar = BARS[case.dtype][2]
        assert relative_rms(less, expected) <= bar, f"plain XLA's {what} is wrong"
        assert_close(x, expected, less, what=what)


def specs_of(case: Case, tiles: config.ScanConfig | None = None):
    """What a case's call and its gradient will ask for."""
    chosen = tiles or in_segments(case, 1)
    for kernel, each in config.kernels(chosen, case.dim):
        yield from _ffi.extension().based_attention_specs(
            kernel=kernel,
            dtype=case.dtype,
            dim=case.dim,
            documents=case.packed,
            normalize=case.normalize,
            config=dataclasses.asdict(each),
        )


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


@pytest.mark.parametrize("case", [CASES[1], pytest.param(CASES[5], marks=EXHAUSTIVE)])
def test_split_sequence_is_the_whole_one(case):
    arrays = arrays_of(case)

    def in_pieces(**arrays):
        outs, state = [], arrays.pop("initial_state")
        axes = dict.fromkeys(("q", "k", "v", "segment_ids"), 1)
        for piece in split_at(arrays, axes, [40]):
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
        (spec,) = _ffi.extension().based_attention_specs(
            kernel=kernel,
            dtype="bfloat16",
            dim=dim,
            documents=True,
            normalize=True,
            config=dataclasses.asdict(each),
        )
        assert spec["min_blocks"] * (spec["shared_bytes"] + 1024) <= 228 * 1024
