"""Calls of Based attention's kernels, and their accuracy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from recurrent_cases import (
    BARS,
    assert_within_bars,
    pooled,
    relative_rms,
    rounded,
    samples,
)
from tolerance import assert_close

import tk_jax
from tk_jax import _ffi
from tk_jax.ops.based_attention import based_attention_reference, config
from tk_jax.ops.based_attention.features import TAYLOR
from tk_jax.ops.based_attention.vjp import kernel_based_attention
from tk_jax.ops.linear_attention.config import LinearAttentionOptions

# In float32 whatever the tokens are in.
EXACT = ("initial_state",)
TIME_AXES = dict.fromkeys(("q", "k", "v", "segment_ids"), 1)


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
    scale: float | None = None

    @property
    def scale_of_scores(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale

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
    Case(130, 16, 72, (1, 2), normalize=True, packed=True),
    Case(130, 16, 64, (1, 1), scale=0.3),  # which is no power of two
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
    (Case(200, 16, 72, (1, 2)), 1),
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
        scale=case.scale,
        normalize=case.normalize,
        return_final_state=True,
        implementation=implementation,
    )


def kernels(case: Case, tiles: config.ScanConfig):
    def based_attention(q, k, v, initial_state=None, segment_ids=None):
        options = LinearAttentionOptions(case.scale_of_scores, case.normalize)
        return kernel_based_attention(
            options, True, q, k, v, None, initial_state, segment_ids, tiles=tiles
        )

    return based_attention


def reference(case: Case):
    return functools.partial(
        based_attention_reference,
        scale=case.scale,
        normalize=case.normalize,
        dtype=jnp.float64,
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
        scale, (batch, seqlen, heads, value_dim) = case.scale_of_scores, v.shape
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
        # What the divisors' state gets is large for the constant feature alone: of a
        # number for each head, the error is a matter of luck. Hence several cotangents.
        times, few = (4, 1024) if case.normalize and case.state else (1, 0)
        got = pooled(samples(fn, [arrays] * times), few)
        low = pooled(
            samples(low_precision(case), [arrays] * times, as_written=True), few
        )
        wide = jax.tree.map(floats64, arrays)
        exact = pooled(samples(reference(case), [wide] * times), few)
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
    assert_within_bars(got, exact, case.dtype)


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
