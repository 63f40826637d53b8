"""Calls of the two ops that linear attention's kernels compute, and their accuracy."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent_kernel_model as model
from recurrent_cases import (
    BARS,
    ENOUGH,
    assert_within_bars,
    decays,
    pooled,
    relative_rms,
    rounded,
    samples,
    seeds_for,
)
from tolerance import assert_close

import tk_jax
from tk_jax import _ffi
from tk_jax.ops.linear_attention import config, linear_attention_reference
from tk_jax.ops.linear_attention.vjp import kernel_linear_attention
from tk_jax.ops.ssd import ssd_reference
from tk_jax.ops.ssd.config import SsdOptions
from tk_jax.ops.ssd.vjp import kernel_ssd
from tk_jax.ops.ssd.xla import Inputs

EXACT = ("log_decay", "initial_state", "dt", "A", "D", "dt_bias")
# Of these, gradients have a wider bar.
GATES = ("log_decay", "dt", "A", "dt_bias")
PER_TOKEN = ("q", "k", "v", "log_decay", "segment_ids", "x", "dt", "B", "C", "z")
TIME_AXES = dict.fromkeys(PER_TOKEN, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call; for ssd, K and V are called N and P."""

    op: str
    seqlen: int
    key_dim: int
    value_dim: int
    heads: tuple[int, int] = (1, 2)  # G, H
    dtype: str = "bfloat16"
    batch: int = 1
    decay: str = "token"  # or "mild", "head", "none"
    state: bool = True
    packed: bool = False
    normalize: bool = False
    skip: str = ""  # "H", "P"
    gate: bool = False  # z, and what makes dt
    steps: str = ""  # dtype of dt, if not float32
    limit: tuple[float, float] = (0.0, math.inf)  # of dt

    def __str__(self):
        fields = dataclasses.asdict(self).items()
        defaults = {field.name: field.default for field in dataclasses.fields(Case)}
        words = [f"{k}={v}" for k, v in fields if v != defaults[k]]
        return " ".join(words).replace("op=", "")


LINEAR = functools.partial(Case, "linear_attention")
SSD = functools.partial(Case, "ssd")
CASES = [
    LINEAR(1, 16, 16, decay="none", state=False),
    LINEAR(63, 64, 64, (1, 3), "float16", decay="head"),
    LINEAR(64, 80, 72),
    LINEAR(65, 128, 128, (2, 4), packed=True),
    LINEAR(200, 16, 80, (1, 3), "float16", batch=2, packed=True),
    LINEAR(70, 256, 64, (1, 1)),
    LINEAR(130, 64, 64, (1, 2), normalize=True, packed=True),
    SSD(1, 16, 64, skip="H"),
    SSD(65, 128, 64, (1, 4), skip="H", gate=True),
    SSD(200, 16, 64, (2, 4), "float16", skip="P", packed=True, gate=True),
    LINEAR(66, 192, 16, (1, 1), "float16", decay="head", state=False),
    # More heads and chunks than a block of the kernels of steps has.
    SSD(330, 16, 16, (1, 20), skip="H", steps="bfloat16", limit=(0.2, 1.5)),
    SSD(70, 16, 64, (1, 3), "float16", gate=True, limit=(0.1, 2.0), steps="float16"),
]
MORE = [
    LINEAR(130, 6, 10, (2, 2), decay="none", packed=True),
    LINEAR(129, 256, 72, (1, 1), "float16", packed=True),
    LINEAR(1000, 64, 64, (1, 2), "float16"),
    LINEAR(193, 128, 64, (2, 2), normalize=True, decay="head"),
    LINEAR(193, 40, 200, (1, 2), normalize=True, decay="none", packed=True),
    SSD(130, 64, 40, (1, 3), state=False),
    # The gradient of A is a sum for each head: of few, its error is a matter of luck.
    SSD(66, 256, 64, (1, 8), skip="P", gate=True),
    SSD(257, 128, 64, (1, 2), "float16", packed=True),
]


def arrays_of(case: Case, seed: int = 0) -> dict:
    rng = np.random.default_rng([case.seqlen, seed] if seed else case.seqlen)
    groups, heads = case.heads
    rows = (case.batch, case.seqlen)
    q, k = rng.standard_normal((2, *rows, groups, case.key_dim))
    v, z = rng.standard_normal((2, *rows, heads, case.value_dim))
    state = rng.standard_normal((case.batch, heads, case.key_dim, case.value_dim))
    ids = None
    if case.packed:
        starts = rng.random(rows) < 0.03
        starts[:, case.seqlen // 3 : case.seqlen // 3 + 2] = True  # one of one token
        ids = np.asarray((starts.cumsum(1) * 3) % 21, np.int32)
    if case.op == "ssd":
        dt = rng.standard_normal((*rows, heads)) - 1
        dt[rng.random(dt.shape) < 0.1] = -40 if case.gate else 0  # a step of zero
        dt = dt if case.gate else np.abs(dt)
        skip = {"H": (heads,), "P": (heads, case.value_dim)}.get(case.skip)
        return {
            "x": v,
            "dt": dt,
            "A": -np.exp(rng.standard_normal(heads)),
            "B": k,
            "C": q,
            "D": None if skip is None else rng.standard_normal(skip),
            "z": z if case.gate else None,
            "dt_bias": rng.standard_normal(heads) if case.gate else None,
            "initial_state": np.swapaxes(state, -1, -2) if case.state else None,
            "segment_ids": ids,
        }
    if case.normalize:
        q, k = np.abs(q) + 0.1, np.abs(k)
        state = (state, np.abs(state[..., 0]))
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": {
            "token": decays(rng, (*rows, heads)),
            "mild": -np.exp(rng.standard_normal((*rows, heads)) - 5),
            "head": -np.exp(rng.standard_normal(heads) - 2),
            "none": None,
        }[case.decay],
        "initial_state": state if case.state else None,
        "segment_ids": ids,
    }


def public(case: Case, implementation: str = "interpret"):
    settings = {"return_final_state": True, "implementation": implementation}
    if case.op == "ssd":
        steps = {"dt_softplus": case.gate, "dt_limit": case.limit}
        return functools.partial(tk_jax.ssd, **steps, **settings)
    return functools.partial(
        tk_jax.linear_attention, normalize=case.normalize, **settings
    )


def reference(case: Case):
    if case.op == "ssd":
        return functools.partial(
            ssd_reference,
            dt_softplus=case.gate,
            dt_limit=case.limit,
            dtype=jnp.float64,
        )
    return functools.partial(
        linear_attention_reference, normalize=case.normalize, dtype=jnp.float64
    )


def kernels(case: Case, tiles: config.ScanConfig | None = None):
    """The ops' kernel forms, whose calls are not those of a jit of their own."""
    if case.op == "ssd":
        options = SsdOptions(case.gate, *case.limit)

        def ssd(*, initial_state=None, **arrays):
            names = ("D", "z", "dt_bias", "segment_ids")
            inputs = Inputs(**dict.fromkeys(names) | arrays | {"state": initial_state})
            return kernel_ssd(options, True, inputs, tiles=tiles)

        return ssd

    def linear_attention(q, k, v, log_decay=None, initial_state=None, segment_ids=None):
        options = config.LinearAttentionOptions(q.shape[-1] ** -0.5, case.normalize)
        return kernel_linear_attention(
            options, True, q, k, v, log_decay, initial_state, segment_ids, tiles=tiles
        )

    return linear_attention


def seeds_of(case: Case, tokens: int = 2**16, enough: int = ENOUGH) -> range:
    """Of which few values are enough to compare, within ``tokens`` of all heads."""
    mine = case.batch * case.heads[1] * case.seqlen
    return seeds_for(arrays_of(case), mine / tokens, enough)


@contextlib.contextmanager
def modelled():
    """Calls of kernels are those of the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ffi, "call", model.call)
        yield


def floats64(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def assert_all_close(dtype, got, exact, low, floors=()):
    """``low`` is no excuse: it must be as exact as its precision lets it be."""
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(got)[0]
    ]
    for what, *each in zip(
        paths, *map(jax.tree.leaves, (got, exact, low)), strict=True
    ):
        floor = next((x for part, x in floors if part in what), 0.0)
        bar = BARS[jnp.dtype(dtype).name][2]
        assert relative_rms(each[2], each[1]) <= bar, f"plain XLA's {what} is wrong"
        assert_close(*each, what=what, floor=floor)


def check(
    fn,
    case: Case,
    arrays: dict | None = None,
    floors=(),
    seeds: range = range(1),
    enough: int = ENOUGH,
) -> None:
    """``fn`` against the recurrence in float64, measured by plain XLA's errors.

    Results of fewer than ``enough`` values are compared over all ``seeds``.
    """
    many = [arrays] if arrays else [arrays_of(case, seed) for seed in seeds]
    with jax.enable_x64(True):
        many = [rounded(each, case.dtype, EXACT) for each in many]
        if case.steps:
            many = [each | {"dt": each["dt"].astype(case.steps)} for each in many]
        got = pooled(samples(fn, many), enough)
        with modelled():
            low = pooled(samples(kernels(case), many, as_written=True), enough)
        wide = jax.tree.map(floats64, many)
        exact = pooled(samples(reference(case), wide), enough)
    for x, y in zip(*map(jax.tree.leaves, (got, low)), strict=True):
        assert x.dtype == y.dtype
    assert_all_close(case.dtype, got, exact, low, floors)
    assert_within_bars(got, exact, case.dtype, GATES)


def specs_of(case: Case, tiles: config.ScanConfig | None = None):
    """What a case's call and its gradient will ask for, as the names of kernels."""
    groups, heads = case.heads
    tiles = tiles or config.scan_config(
        case.batch,
        case.seqlen,
        groups,
        heads,
        case.key_dim,
        case.value_dim + config.ONES * case.normalize,
    )
    features = ["weights"] if case.op == "ssd" else []
    features += ["counts"] if case.packed else []
    features += ["skip"] if case.skip else []
    for kernel, taken, tile in config.kernels(tiles, features):
        yield from _ffi.extension().linear_attention_specs(
            kernel=kernel,
            dtype=case.dtype,
            key_dim=case.key_dim,
            features=taken,
            config={} if tile is None else dataclasses.asdict(tile),
        )
