"""No speed without correctness: compares a sample of each result before it is timed.

The sample is whole along every dimension that a kernel splits into tiles: one key head
with all its queries for attention, rows from all over the result for matmul. It is held
against float32 at the highest precision, whose error is far below that of 16-bit
results, and may err twice as much as plain XLA in 16 bits, plus one rounding.

All of it stays on the device but for a few numbers. Masks are data, so that cases that
differ in nothing else share their programs.
"""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import recurrent
from benchmarks.cases import AttentionCase, Case, input_structs, make_dtype, make_inputs

_MATMUL_ROWS = 256
# What is computed once is not worth XLA's search for the best way: seconds a product.
_UNTUNED = {"xla_gpu_autotune_level": 0}
# An offset beyond every length, yet far from overflowing when a position is added.
_FAR = 2**30


def make(case: Case):
    """What judges the results of a case."""
    if isinstance(case, recurrent.RecurrentCase):
        return recurrent.Gate(case, make_inputs)
    return Gate(case)


class Gate:
    """Judges the results of a case on ``make_inputs(case, seed=0)``."""

    def __init__(self, case: Case):
        self._case = case
        self._eps = float(jnp.finfo(make_dtype(case)).eps)
        self._expected = None
        arrays, dout = input_structs(case)
        if isinstance(case, AttentionCase):
            # Results have the types of the operands.
            results = [dout, *arrays]
            self._masks = _masks(case)
            reference = _expected_attention
        else:
            results = [dout]
            self._masks = ()
            reference = _expected_matmul
        shape = _shape_of(case)
        self._programs = _compiled(
            reference, shape, (*arrays, dout), tuple(results), self._masks
        )

    def compile(self) -> None:
        """Needs no GPU: may run beside what is being timed."""
        self._programs.compile()

    def complaints(self, out, gradients=None) -> list[str]:
        """What is wrong with the results, if anything."""
        results = [out, *(gradients or ())]
        names = ("out", "dq", "dk", "dv")[: len(results)]
        shapes = [tuple(x.shape) for x in results]
        wanted = [tuple(x.shape) for x in self._programs.results[: len(results)]]
        if shapes != wanted:
            return [f"results have shapes {shapes}, expected {wanted}"]
        dtypes = {str(x.dtype) for x in results}
        if dtypes != {str(jnp.dtype(make_dtype(self._case)))}:
            return [f"results have dtypes {dtypes}, expected {self._case.dtype}"]
        if self._expected is None:
            arrays, dout = make_inputs(self._case, seed=0)
            self._expected = self._programs.expect(*arrays, dout, *self._masks)
        # What is not there is held against nothing: it stands in for itself.
        padding = self._expected_shapes(len(results))
        sizes = np.asarray(
            self._programs.compare(*self._expected, [*results, *padding])
        )
        found = (
            (name, _complaint(size, self._eps))
            for name, size in zip(names, sizes, strict=False)
        )
        return [f"{name} {complaint}" for name, complaint in found if complaint]

    def _expected_shapes(self, count: int):
        return [jnp.zeros(x.shape, x.dtype) for x in self._programs.results[count:]]


def _complaint(sizes: np.ndarray, eps: float) -> str | None:
    num_infinite, *sizes = map(float, sizes)
    if num_infinite:
        return f"has {num_infinite:.0f} values that are not finite"
    for name, error, low, exact in zip(
        ("largest", "RMS"), sizes[:2], sizes[2:4], sizes[4:], strict=True
    ):
        allowed = 2 * low + eps * exact
        if not error <= allowed:
            return f"{name} error {error:.3e} exceeds {allowed:.3e}"
    return None


class _Programs:
    """The reference and the comparison of one set of shapes."""

    def __init__(self, reference, shape, inputs, results, masks):
        self.results = results
        # One after the other: the scores of a key head at T=16384 take 4 GiB, several
        # times over.
        self._references = [
            jax.jit(
                functools.partial(reference, shape, is_exact),
                compiler_options=_UNTUNED,
            ).lower(*inputs, *masks)
            for is_exact in (True, False)
        ]
        expected = [x.out_info for x in self._references]
        self._compare = jax.jit(functools.partial(_compare, shape)).lower(
            *expected, list(results)
        )
        self._lock = threading.Lock()
        self._executables = None

    def compile(self) -> None:
        with self._lock:
            if self._executables is None:
                lowered = (*self._references, self._compare)
                self._executables = [program.compile() for program in lowered]

    def expect(self, *args):
        """The samples: exact ones, and as plain XLA has them in 16 bits."""
        self.compile()
        return [jax.block_until_ready(run(*args)) for run in self._executables[:2]]

    def compare(self, *args):
        self.compile()
        return self._executables[2](*args)


@functools.lru_cache
def _compiled_for(reference, shape, inputs, results, mask_shapes):
    return _Programs(reference, shape, inputs, results, mask_shapes)


def _compiled(reference, shape, inputs, results, masks) -> _Programs:
    structs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in masks)
    return _compiled_for(reference, shape, inputs, results, structs)


def _shape_of(case: Case):
    """What of a case its programs depend on, beside their arguments."""
    if isinstance(case, AttentionCase):
        return case.num_heads // case.num_kv_heads
    return case.transposes, case.dtype


def _compare(shape, exact_samples, low_samples, results):
    """[result, 7]: values not finite; largest and RMS of error, low error, exact."""
    rows = []
    got_samples = _samples(shape, results)
    for exact, low, got in zip(exact_samples, low_samples, got_samples, strict=True):
        got = got.astype(jnp.float32)
        error, low = got - exact, low.astype(jnp.float32) - exact
        sizes = [size for x in (error, low, exact) for size in (_largest(x), _rms(x))]
        infinite = jnp.sum(~jnp.isfinite(got)).astype(jnp.float32)
        rows.append(jnp.stack([infinite, *sizes]))
    return jnp.stack(rows)


def _largest(x):
    return jnp.abs(x).max()


def _rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _samples(shape, results):
    if len(results) == 1:
        return [_matmul_rows(results[0])]
    out, dq, dk, dv = results
    return [
        _query_heads(shape, out),
        _query_heads(shape, dq),
        _key_head(dk),
        _key_head(dv),
    ]


# The last batch element and the last key head: what a kernel reaches at the far end.
def _query_heads(group: int, x):
    return x[-1, :, -group:]


def _key_head(x):
    return x[-1, :, -1]


def _matmul_rows(x):
    x = x.reshape(-1, x.shape[-2], x.shape[-1])[-1]
    return x[np.unique(np.linspace(0, x.shape[0] - 1, _MATMUL_ROWS).astype(int))]


def _masks(case: AttentionCase) -> tuple[np.ndarray, ...]:
    """Keys from i + first to i + last, and of the same document, are seen."""
    left, right = case.local_window_size or (_FAR, 0 if case.is_causal else _FAR)
    documents = (
        np.arange(case.seqlen_q) // (case.seqlen_q // case.documents),
        np.arange(case.seqlen_kv) // (case.seqlen_kv // case.documents),
    )
    if case.documents == 1:
        documents = tuple(np.zeros_like(x) for x in documents)
    return np.int32(-left), np.int32(right), *(x.astype(np.int32) for x in documents)


def _expected_attention(group: int, is_exact: bool, q, k, v, dout, *masks):
    """Samples of out, dq, dk, dv."""
    q, dout = (_query_heads(group, x) for x in (q, dout))
    arrays = [q, _key_head(k), _key_head(v), dout]
    if is_exact:
        arrays = [x.astype(jnp.float32) for x in arrays]
    return list(_one_key_head(*arrays, *masks))


def _one_key_head(q, k, v, dout, first, last, q_documents, kv_documents):
    """out, dq, dk, dv of q [T, G, D] and k [S, D], v [S, Dv], by the definition."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision)
    offset = jnp.arange(k.shape[0])[None] - jnp.arange(q.shape[0])[:, None]
    visible = (offset >= first) & (offset <= last)
    visible &= q_documents[:, None] == kv_documents[None]

    def attention(q, k, v):
        scores = einsum("tgd,sd->gts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
        return einsum("gts,sd->tgd", jax.nn.softmax(scores).astype(v.dtype), v)

    out, pull_back = jax.vjp(attention, q, k, v)
    return out, *pull_back(dout)


def _expected_matmul(shape, is_exact: bool, a, b, dout):
    del dout
    transposes, _ = shape
    a = jnp.swapaxes(a, -1, -2) if transposes[0] == "t" else a
    b = jnp.swapaxes(b, -1, -2) if transposes[1] == "t" else b
    dtype = a.dtype
    a = _matmul_rows(a).astype(jnp.float32)
    b = b.reshape(-1, *b.shape[-2:])[-1].astype(jnp.float32)
    exact = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return [exact if is_exact else exact.astype(dtype)]
