"""Steps of one token: cases, and the recurrences in float64 that judge them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from recurrent_cases import quick_jit, rounded
from tolerance import assert_close

import tk_jax
from tk_jax import _ffi
from tk_jax.ops import _state_step
from tk_jax.ops.based_attention.features import TAYLOR

EXACT = ("dt", "A", "D", "dt_bias", "log_decay", "state", "alpha", "beta")
MAPS = ("q_map", "k_map")


@dataclasses.dataclass(frozen=True)
class Case:
    """A step; heads are (of keys, of values), for Hedgehog (of queries, of keys)."""

    op: str
    key_dim: int
    value_dim: int
    heads: tuple[int, int]
    dtype: str = "bfloat16"
    batch: int = 2
    normalize: bool = False
    decay: str = "token"  # "head", "none"
    skip: str = ""  # "H", "P"
    gate: bool = False

    def __str__(self):
        words = [self.op, self.key_dim, self.value_dim, *self.heads, self.dtype]
        words += [x for x in (self.normalize and "normalize", self.skip) if x]
        return "-".join(map(str, words))

    @property
    def window(self) -> int:
        """Hedgehog's: that of its kernel of windows, with the maps that it takes."""
        return 64 if self.key_dim == 64 else 2

    @property
    def head_dim(self) -> int:
        return 72 if self.key_dim == 64 else 8

    @property
    def settings(self):
        if self.op == "ssd":
            return {"dt_softplus": self.gate}
        if self.op == "hedgehog_attention":
            return {"window": self.window}
        return {"normalize": self.normalize}

    @property
    def settings_of_state(self) -> dict:
        """What the kernel makes of it, as ``state_step_specs`` takes it."""
        is_hedgehog = self.op == "hedgehog_attention"
        columns = self.key_dim if self.op == "ssd" else self.value_dim
        queries = self.heads[0] // self.heads[1] if is_hedgehog else 1
        return {
            "key_dtype": "float32" if is_hedgehog else self.dtype,
            "value_dtype": self.dtype,
            "values_last": self.op != "ssd",
            "whole": columns % 4 == 0,
            "normalize": self.normalize or is_hedgehog,
            "queries": queries,
            "taylor": self.op == "based_attention",
            "config": dataclasses.asdict(_state_step.config(columns, queries)),
        }


SSD = functools.partial(Case, "ssd")
LINEAR = functools.partial(Case, "linear_attention")
BASED = functools.partial(Case, "based_attention")
HEDGEHOGS = functools.partial(Case, "hedgehog_attention")
CASES = [
    SSD(128, 64, (1, 4), skip="H", gate=True),
    SSD(16, 70, (2, 4), "float16", batch=1, skip="P"),
    SSD(80, 5, (1, 2), gate=True),
    SSD(7, 65, (3, 3), "float32", batch=3),
    LINEAR(64, 64, (2, 4)),
    LINEAR(70, 72, (1, 3), "float16", decay="head", normalize=True),
    LINEAR(5, 7, (3, 3), "float32", batch=1, decay="none"),
    LINEAR(130, 136, (1, 2), batch=1, normalize=True),
    LINEAR(1, 1, (1, 1), "float32", decay="none", normalize=True),
    BASED(8, 64, (1, 2), decay="none", normalize=True),
    BASED(16, 20, (2, 2), "float16", batch=1, decay="none"),
    HEDGEHOGS(64, 64, (2, 1), batch=4, decay="none"),
    BASED(16, 136, (1, 2), batch=1, decay="none", normalize=True),
]
# Its windows are XLA's.
SMALL_WINDOWS = HEDGEHOGS(5, 12, (4, 2), decay="none")
MORE = [
    SMALL_WINDOWS,
    HEDGEHOGS(12, 7, (3, 3), "float32", batch=1, decay="none"),
    HEDGEHOGS(64, 72, (2, 2), "float16", batch=1, decay="none"),
    HEDGEHOGS(64, 128, (8, 1), batch=2, decay="none"),
    LINEAR(200, 30, (2, 2), "float16"),
    SSD(256, 40, (1, 1), "float32", skip="P"),
    BASED(24, 33, (1, 1), decay="none", normalize=True),
    BASED(32, 16, (1, 1), "float32", decay="none", normalize=True),
]


def specs_of(cases):
    """What the cases' calls ask for, by kernel."""
    extension = _ffi.extension()
    specs = [extension.state_step_specs(**case.settings_of_state)[0] for case in cases]
    for case in cases:
        if case.op == "hedgehog_attention" and case.key_dim == 64:
            specs += extension.hedgehog_attention_specs(
                kernel="step",
                dtype=case.dtype,
                key_dim=case.head_dim,
                value_dim=case.value_dim,
            )
    return list({spec["function"]: spec for spec in specs}.values())


def arrays_of(case: Case, seed: int = 0) -> dict:
    rng = np.random.default_rng([seed, case.key_dim, case.value_dim])
    groups, heads = case.heads
    normal = rng.standard_normal
    v = normal((case.batch, heads, case.value_dim))
    if case.op == "hedgehog_attention":
        return _hedgehog_arrays(case, rng)
    q, k = normal((2, case.batch, groups, case.key_dim))
    if case.op == "ssd":
        skip = {"H": (heads,), "P": (heads, case.value_dim)}.get(case.skip)
        dt = normal((case.batch, heads))
        dt.flat[0] = -40 if case.gate else 0  # a step of zero
        return {
            "x": v,
            "dt": dt if case.gate else np.abs(dt),
            "A": -np.exp(normal(heads)),
            "B": k,
            "C": q,
            "D": None if skip is None else normal(skip),
            "z": normal(v.shape) if case.gate else None,
            "dt_bias": normal(heads) if case.gate else None,
            "state": normal((case.batch, heads, case.value_dim, case.key_dim)),
        }
    features = case.key_dim
    if case.op == "based_attention":
        features = TAYLOR.num_features(case.key_dim)
    state = normal((case.batch, heads, features, case.value_dim))
    if case.normalize:
        if case.op == "linear_attention":
            q, k = np.abs(q) + 0.1, np.abs(k)
            z = np.abs(normal(state.shape[:-1]))
        else:
            # What the weights of a query sum up to, mostly that of the first feature.
            z = 0.1 * normal(state.shape[:-1])
            z[..., 0] = 5
        state = (state, z)
    arrays = {"q": q, "k": k, "v": v, "state": state}
    if case.op == "linear_attention":
        shapes = {"token": (case.batch, heads), "head": (heads,)}
        log_decay = None
        if case.decay in shapes:
            log_decay = -np.exp(normal(shapes[case.decay]))
            log_decay.flat[-1] = -np.inf
        arrays["log_decay"] = log_decay
    return arrays


def _hedgehog_arrays(case, rng):
    """A state that has had some tokens; sequences of different lengths."""
    heads, kv_heads = case.heads
    normal = rng.standard_normal
    window, head_dim = case.window, case.head_dim
    tokens = 2 * window
    rows, features = (case.batch, kv_heads), 2 * case.key_dim
    lengths = np.array([4 * window + 1, tokens, window, 0], np.int32)[: case.batch]
    old = (lengths > tokens)[:, None, None]
    steps_back = np.arange(tokens - 1, -1, -1)
    own = (steps_back < lengths[:, None])[..., None, None]
    phi = rng.random((*rows, features))
    state = tk_jax.HedgehogState(
        sums=np.where(old[..., None], normal((*rows, features, case.value_dim)), 0),
        normalizer=np.where(old, 3 * phi, 0),
        keys=np.where(own, normal((case.batch, tokens, kv_heads, head_dim)), 0),
        values=np.where(own, normal((case.batch, tokens, kv_heads, case.value_dim)), 0),
        length=lengths,
    )
    return {
        "q": normal((case.batch, heads, head_dim)),
        "k": normal((*rows, head_dim)),
        "v": normal((*rows, case.value_dim)),
        "q_map": normal((heads, head_dim, case.key_dim)) / head_dim**0.5,
        "k_map": normal((kv_heads, head_dim, case.key_dim)) / head_dim**0.5,
        "alpha": rng.random(heads),
        "beta": rng.random(heads),
        "state": state,
    }


def given(case: Case, arrays: dict | None = None) -> dict:
    """The arrays in the case's dtypes, without those that are not there."""
    arrays = arrays_of(case) if arrays is None else arrays
    arrays = {name: x for name, x in arrays.items() if x is not None}
    if case.op == "hedgehog_attention":
        windows = rounded({"x": arrays["state"]}, case.dtype)["x"]
        found = rounded(arrays, case.dtype, EXACT)
        state = found["state"]._replace(keys=windows.keys, values=windows.values)
        return found | {"state": state}
    return rounded(arrays, case.dtype, EXACT)


def step(case: Case, implementation: str = "interpret"):
    """The public function of a case's arrays, and of no others."""
    function = getattr(tk_jax, f"{case.op}_step")
    return functools.partial(function, implementation=implementation, **case.settings)


def exact_step(case: Case, arrays: dict):
    """The recurrence in float64, token by head by number."""
    arrays = jax.tree.map(
        lambda x: np.asarray(x, np.int32 if x.dtype == jnp.int32 else np.float64),
        arrays,
    )
    if case.op == "hedgehog_attention":
        # There the definition is one of whole sequences, and XLA's step follows it
        # (test_hedgehog_attention.py).
        with jax.enable_x64(True):
            arrays = jax.tree.map(jnp.asarray, arrays)
            return quick_jit(step(case, "xla"))(**arrays)
    return {
        "ssd": _ssd,
        "linear_attention": _linear_attention,
        "based_attention": _based_attention,
    }[case.op](case, **arrays)


def _ssd(case, x, dt, A, B, C, state, D=None, z=None, dt_bias=None):
    if case.gate:
        dt = np.logaddexp(0, dt + dt_bias)
    repeats = x.shape[1] // B.shape[1]
    B, C = (np.repeat(a, repeats, axis=1) for a in (B, C))
    state = np.exp(dt * A)[..., None, None] * state
    state = state + (dt[..., None] * x)[..., None] * B[..., None, :]
    y = np.einsum("bhpn,bhn->bhp", state, C)
    if D is not None:
        y = y + D.reshape(x.shape[1], -1) * x
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return y, state


def _linear_attention(case, q, k, v, state, log_decay=None):
    repeats = v.shape[1] // k.shape[1]
    q, k = (np.repeat(a, repeats, axis=1) for a in (q, k))
    decay = np.ones(v.shape[:2])
    if log_decay is not None:
        decay = np.broadcast_to(np.exp(log_decay), v.shape[:2])
    scale = case.key_dim**-0.5
    sums = state[0] if case.normalize else state
    sums = decay[..., None, None] * sums + k[..., None] * v[..., None, :]
    out = scale * np.einsum("bhkv,bhk->bhv", sums, q)
    if not case.normalize:
        return out, sums
    z = decay[..., None] * state[1] + k
    out = out / (scale * np.einsum("bhk,bhk->bh", z, q)[..., None])
    return out, (sums, z)


def _based_attention(case, q, k, v, state):
    def features(x, factors):
        pairs = [
            factors[a == b] * x[..., a] * x[..., b]
            for a in range(case.key_dim)
            for b in range(a, case.key_dim)
        ]
        ones = np.ones_like(x[..., :1])
        return np.concatenate([ones, x, np.stack(pairs, -1)], -1)

    q = features(q * case.key_dim**-0.5, (1, 0.5))
    k = features(k, (1, 1))
    unscaled = dataclasses.replace(case, key_dim=1)
    return _linear_attention(unscaled, q, k, v, state)


def check(fn, case: Case, arrays: dict | None = None) -> None:
    """``fn`` against the recurrence in float64, measured by plain XLA's errors."""
    arrays = given(case, arrays)
    got = quick_jit(fn)(**arrays)
    low = quick_jit(step(case, "xla"))(**arrays)
    exact = exact_step(case, arrays)
    structures = {jax.tree.structure(x) for x in (got, low)}
    assert len(structures) == 1
    for index, (x, y, z) in enumerate(
        zip(*map(jax.tree.leaves, (got, exact, low)), strict=True)
    ):
        assert x.dtype == z.dtype
        if x.dtype == jnp.int32:
            np.testing.assert_array_equal(x, y)
            continue
        assert_close(x, y, z, what=f"{case}: result {index}")
