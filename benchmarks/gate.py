"""No speed without correctness: compares a sample of each result before it is timed.

The sample is whole along every dimension that a kernel splits into tiles: one key head
with all its queries for attention, rows from all over the result for matmul. It is held
against float32 at the highest precision, whose error is far below that of 16-bit
results, and may err twice as much as plain XLA in 16 bits, plus one rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import AttentionCase, Case, make_inputs

_MATMUL_ROWS = 256
# What is computed once is not worth XLA's search for the best way: seconds a product.
_UNTUNED = {"xla_gpu_autotune_level": 0}
# The scores of one head at T=16384 take 1 GiB, several times over: one case at a time.
_one_at_a_time = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Expected:
    """A sample of one result: exact, and as plain XLA has it in 16 bits."""

    exact: np.ndarray
    low_precision: np.ndarray

    def complaint(self, got: np.ndarray, eps: float) -> str | None:
        """What is wrong with ``got``, if anything."""
        if got.shape != self.exact.shape:
            return f"has a sample of shape {got.shape}, expected {self.exact.shape}"
        if not np.isfinite(got).all():
            return f"has {np.sum(~np.isfinite(got))} values that are not finite"
        error, low = got - self.exact, self.low_precision - self.exact
        for name, size in (("largest", _largest), ("RMS", _rms)):
            allowed = 2 * size(low) + eps * size(self.exact)
            if not size(error) <= allowed:
                return f"{name} error {size(error):.3e} exceeds {allowed:.3e}"
        return None


def _largest(x) -> float:
    return float(np.abs(x).max())


def _rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def expected(case: Case) -> dict[str, Expected]:
    """Samples by the name of the result: out, and for attention dq, dk, dv."""
    with _one_at_a_time:
        if isinstance(case, AttentionCase):
            return _expected_attention(case)
        return _expected_matmul(case)


def samples(case: Case, out, gradients=None) -> dict[str, np.ndarray]:
    """The same samples of what an implementation returned."""
    if not isinstance(case, AttentionCase):
        return {"out": _host(_matmul_rows(case, out))}
    found = {"out": _host(_query_heads(case, out))}
    if gradients is not None:
        dq, dk, dv = gradients
        found["dq"] = _host(_query_heads(case, dq))
        found["dk"], found["dv"] = _host(_key_head(dk)), _host(_key_head(dv))
    return found


def complaints(
    case: Case, expected_samples: dict[str, Expected], got: dict[str, np.ndarray]
) -> list[str]:
    eps = float(jnp.finfo(make_dtype(case)).eps)
    return [
        f"{name} {complaint}"
        for name, value in got.items()
        if (complaint := expected_samples[name].complaint(value, eps))
    ]


def make_dtype(case: Case):
    return {"bf16": jnp.bfloat16, "fp16": jnp.float16}[case.dtype]


def _host(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


# The last batch element and the last key head: what a kernel reaches at the far end.
def _query_heads(case: AttentionCase, x):
    return x[-1, :, -(case.num_heads // case.num_kv_heads) :]


def _key_head(x):
    return x[-1, :, -1]


def _matmul_rows(case, x):
    x = x.reshape(-1, x.shape[-2], x.shape[-1])[-1]
    return x[np.unique(np.linspace(0, x.shape[0] - 1, _MATMUL_ROWS).astype(int))]


def _expected_attention(case: AttentionCase) -> dict[str, Expected]:
    (q, k, v), dout = make_inputs(case, seed=0)
    q, dout = (_query_heads(case, x) for x in (q, dout))
    k, v = (_key_head(x) for x in (k, v))
    results = [
        [_host(x) for x in _one_key_head(*arrays, dout.astype(arrays[0].dtype), case)]
        for arrays in (
            [x.astype(jnp.float32) for x in (q, k, v)],
            [q, k, v],
        )
    ]
    return {
        name: Expected(exact, low)
        for name, exact, low in zip(("out", "dq", "dk", "dv"), *results, strict=True)
    }


@functools.partial(jax.jit, static_argnums=4, compiler_options=_UNTUNED)
def _one_key_head(q, k, v, dout, case: AttentionCase):
    """out, dq, dk, dv of q [T, G, D] and k, v [S, D], by the definition."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision)

    def attention(q, k, v):
        scores = einsum("tgd,sd->gts", q, k, preferred_element_type=jnp.float32)
        scores *= case.head_dim**-0.5
        if case.is_causal:
            visible = jnp.tri(q.shape[0], k.shape[0], dtype=bool)
            scores = jnp.where(visible, scores, -jnp.inf)
        return einsum("gts,sd->tgd", jax.nn.softmax(scores).astype(v.dtype), v)

    out, pull_back = jax.vjp(attention, q, k, v)
    return out, *pull_back(dout)


def _expected_matmul(case) -> dict[str, Expected]:
    (a, b), _ = make_inputs(case, seed=0)
    a = jnp.swapaxes(a, -1, -2) if case.transposes[0] == "t" else a
    b = jnp.swapaxes(b, -1, -2) if case.transposes[1] == "t" else b
    a = _matmul_rows(case, a).astype(jnp.float32)
    b = b.reshape(-1, *b.shape[-2:])[-1].astype(jnp.float32)
    exact = _exact_matmul(a, b)
    return {"out": Expected(_host(exact), _host(exact.astype(make_dtype(case))))}


@functools.partial(jax.jit, compiler_options=_UNTUNED)
def _exact_matmul(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
