"""Attention with a soft cap, sinks and a bias: cases, and the formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import Case
from tolerance import assert_close

import tk_jax

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


@dataclasses.dataclass(frozen=True)
class ScoreCase:
    base: Case
    soft_cap: float | None = None
    sinks: str | None = None  # "H", or "BH" for one of each batch element
    bias: str | None = None  # the axes that it is not shared along, of "BHTS"
    bias_dtype: str | None = None  # by default that of q
    spread: float = 1.0  # of sinks and bias

    def __str__(self) -> str:
        words = [str(self.base)]
        words += [] if self.soft_cap is None else [f"cap{self.soft_cap:g}"]
        words += [] if self.sinks is None else [f"sinks_{self.sinks}"]
        words += [] if self.bias is None else [f"bias_{self.bias or 'one'}"]
        words += [] if self.bias_dtype is None else [self.bias_dtype]
        words += [] if self.spread == 1 else [f"spread{self.spread:g}"]
        return "-".join(words)

    def inputs(self, seed=0):
        """q, k, v, dout, dlse, bias and sinks, where the last two may be None."""
        base = self.base
        arrays = base.inputs(seed)
        rng = np.random.default_rng(seed + 1)
        sizes = {
            "B": base.batch,
            "H": base.num_heads,
            "T": base.seqlen_q,
            "S": base.seqlen_kv,
        }

        def shared(axes, given):
            shape = tuple(sizes[axis] if axis in given else 1 for axis in axes)
            return (rng.standard_normal(shape) * self.spread).astype(np.float32)

        bias = sinks = None
        if self.bias is not None:
            bias = shared("BHTS", self.bias)
            bias = bias.astype(self.bias_dtype or arrays[0].dtype)
        if self.sinks is not None:
            sinks = shared("BH", self.sinks)
        return *arrays, bias, sinks


def run(case: ScoreCase, inputs, **settings):
    """Results in the order of NAMES, None for what there is not."""
    settings = case.base.settings | {"logits_soft_cap": case.soft_cap} | settings
    return _run(tuple(sorted(settings.items())), *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _run(settings, q, k, v, dout, dlse, bias, sinks):
    def attention(q, k, v, bias, sinks):
        return tk_jax.attention(
            q, k, v, bias=bias, sinks=sinks, return_lse=True, **dict(settings)
        )

    (out, lse), transpose = jax.vjp(attention, q, k, v, bias, sinks)
    # An infinite lse is that of a query without keys, whatever the inputs are.
    return out, lse, *transpose((dout, dlse))


def exact(case: ScoreCase, inputs):
    """The same in float64, by NumPy."""
    wide = [None if x is None else np.asarray(x, np.float64) for x in inputs]

    def dot(equation, a, b):
        return np.einsum(equation, a, b, optimize=True)

    with np.errstate(all="ignore"):
        return _formulas(np, dot, lambda x, _: x, case, case.base.hidden(), *wide)


def low_precision(case: ScoreCase, inputs):
    """The same by plain XLA in the dtype of the inputs, scores and all.

    As ``attention_cases.low_precision``: products take low-precision operands and sum
    in float32, everything between them is in float32.
    """
    return _low_precision(case, jnp.asarray(case.base.hidden()), *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _low_precision(case, hidden, q, *others):
    dtype = q.dtype

    def whole(x):  # XLA takes products of a vector off the tensor cores.
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 64)] + [(0, 0)] * (x.ndim - 2))

    def dot(equation, a, b):
        a, b = a.astype(dtype), b.astype(dtype)
        if equation == _SCORES:
            scores = jax.lax.optimization_barrier(_einsum(equation, whole(a), whole(b)))
            return scores[..., : a.shape[1], : b.shape[1]]
        return _einsum(equation, a, b)

    def rounded(x, like):
        return None if like is None else x.astype(like.dtype)

    return _formulas(jnp, dot, rounded, case, hidden, q, *others)


_SCORES = "btkgd,bskd->bkgts"
_einsum = functools.partial(
    jnp.einsum, precision="highest", preferred_element_type=jnp.float32
)


def _formulas(xp, dot, rounded, case, hidden, q, k, v, dout, dlse, bias, sinks):
    batch, seqlen_q, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    groups = (batch, seqlen_q, num_kv_heads, num_heads // num_kv_heads)
    scale = head_dim**-0.5
    wide = np.float64 if xp is np else jnp.float32

    def by_head(x):
        """[B, H, ...] -> [B, K, G, ...]"""
        x = xp.broadcast_to(x.astype(wide), (batch, num_heads, *x.shape[2:]))
        return x.reshape(batch, num_kv_heads, -1, *x.shape[2:])

    def over_shared(x, like):
        """The sum of [B, K, G, ...] over the axes that ``like`` shares."""
        x = x.reshape(batch, num_heads, *x.shape[3:])
        axes = tuple(i for i, n in enumerate(like.shape) if n != x.shape[i])
        return rounded(x.sum(axes, keepdims=True), like)

    q4, dout4, dlse4 = (x.reshape(*groups, *x.shape[3:]) for x in (q, dout, dlse))
    s = dot(_SCORES, q4, k) * scale
    slope = 1
    if case.soft_cap is not None:
        tanh = xp.tanh(s / case.soft_cap)
        s, slope = case.soft_cap * tanh, 1 - tanh * tanh
    if bias is not None:
        s = s + by_head(bias)
    s = xp.where(hidden, -xp.inf, s)
    top = s.max(-1, keepdims=True)
    sink = None
    if sinks is not None:
        sink = by_head(sinks)[..., None, None]
        top = xp.maximum(top, sink)
    shift = xp.where(top == -xp.inf, 0, top)
    total = xp.exp(s - shift).sum(-1, keepdims=True)
    if sink is not None:
        total = total + xp.exp(sink - shift)
    lse = shift + xp.log(total)
    shift = xp.where(lse == -xp.inf, 0, lse)
    p = xp.exp(s - shift)
    out = rounded(dot("bkgts,bskd->btkgd", p, v), q)

    product = out.astype(wide) * dout4.astype(wide)
    delta = product.sum(-1) - dlse4
    delta = xp.moveaxis(delta, 1, 3)[..., None]
    # Where no key and no sink is seen, nothing flows anywhere.
    delta = xp.where(lse == -xp.inf, 0, delta)
    ds = p * (dot("btkgd,bskd->bkgts", dout4, v) - delta)
    dbias = None if bias is None else over_shared(ds, bias)
    dsinks = None
    if sinks is not None:
        dsinks = over_shared(-(xp.exp(sink - shift) * delta).sum((-2, -1)), sinks)
    ds = ds * slope * scale
    return (
        out.reshape(q.shape[:-1] + v.shape[-1:]),
        xp.moveaxis(lse[..., 0], 3, 1).reshape(q.shape[:-1]),
        rounded(dot("bkgts,bskd->btkgd", ds, k), q).reshape(q.shape),
        rounded(dot("bkgts,btkgd->bskd", ds, q4), k),
        rounded(dot("bkgts,btkgd->bskd", p, dout4), v),
        dbias,
        dsinks,
    )


def floors(case: ScoreCase, inputs):
    """Allowances in the order of NAMES where an exact gradient cancels.

    Gradients are sums of p * (dp - delta), in which a row with one key has dp = delta:
    what remains is the rounding of two float32 sums over D.
    """
    base = case.base
    q, k, v, dout = (np.abs(x.astype(np.float32)).max() for x in inputs[:4])
    ds = 2.0**-23 * base.head_dim**0.5 * dout * v
    rows = base.seqlen_q * base.num_heads // base.num_kv_heads
    shared = {"B": base.batch, "H": base.num_heads, "T": base.seqlen_q}
    shared["S"] = base.seqlen_kv
    terms = np.prod([n for axis, n in shared.items() if axis not in (case.bias or "")])
    everything = base.batch * base.seqlen_q
    return (
        0.0,
        0.0,
        ds * k,
        ds * q * rows**0.5,
        0.0,
        ds * base.head_dim**0.5 * terms**0.5,
        ds * base.head_dim**0.5 * everything**0.5,
    )


def assert_all_close(case: ScoreCase, inputs, got):
    expected = exact(case, inputs), low_precision(case, inputs), floors(case, inputs)
    for name, x, *arrays, floor in zip(NAMES, got, *expected, strict=True):
        assert (x is None) == (arrays[0] is None), name
        if x is not None:
            assert_close(x, *arrays, what=f"{case} {name}", floor=floor)


CASES = [
    ScoreCase(Case(1, 97, 113, 4, 2, 64, "causal"), soft_cap=5.0),
    ScoreCase(Case(1, 130, 67, 2, 1, 128, "full", "fp16"), soft_cap=50.0),
    ScoreCase(Case(2, 65, 200, 2, 2, 64, window=(40, 30)), soft_cap=1.5, sinks="H"),
    # Scores far beyond the cap, and far below it.
    ScoreCase(Case(1, 129, 129, 2, 1, 128, "causal", gain=30), soft_cap=20.0),
    ScoreCase(Case(1, 70, 80, 2, 1, 64, "full", gain=0.1), soft_cap=30.0),
    ScoreCase(Case(2, 97, 130, 4, 2, 64, "causal"), sinks="H"),
    ScoreCase(Case(3, 67, 40, 4, 1, 128, "full", "fp16"), sinks="BH", spread=3.0),
    # Queries without keys: lse is the sink.
    ScoreCase(Case(1, 150, 60, 2, 2, 64, "bottom_right"), sinks="H", spread=8.0),
    ScoreCase(Case(1, 1, 1, 2, 2, 64, "full"), soft_cap=3.0, sinks="H"),
    ScoreCase(Case(1, 70, 90, 2, 1, 40, head_dim_v=72), bias="HTS", sinks="H"),
    ScoreCase(Case(1, 130, 150, 2, 1, 256, "causal"), soft_cap=3.0, sinks="H"),
    ScoreCase(Case(1, 70, 130, 2, 2, 192, head_dim_v=128), soft_cap=2.0),
    # A bias of everything, and shared in every way; odd lengths leave rows unaligned.
    ScoreCase(Case(2, 97, 113, 4, 2, 64, "causal"), bias="BHTS"),
    ScoreCase(Case(2, 70, 131, 2, 1, 128, "full", "fp16"), bias="HTS"),
    ScoreCase(Case(2, 200, 67, 4, 2, 64, "full"), bias="TS", spread=3.0),
    ScoreCase(Case(3, 67, 200, 2, 1, 64, "causal"), bias="BS"),
    ScoreCase(Case(2, 150, 130, 2, 2, 64, "bottom_right"), bias="HT"),
    ScoreCase(Case(2, 65, 65, 2, 1, 64, "full"), bias=""),
    # Rows of whole 16 bytes, which the copy engine brings.
    ScoreCase(Case(2, 70, 136, 2, 1, 128, "causal"), bias="BHTS"),
    ScoreCase(Case(1, 130, 72, 2, 1, 256, "full", "fp16"), soft_cap=2.0, bias="HTS"),
    ScoreCase(Case(2, 140, 97, 4, 2, 128, "full"), bias="BTS", bias_dtype="float32"),
    ScoreCase(Case(1, 97, 136, 4, 2, 64, window=(40, 20)), bias="HTS", sinks="H"),
    ScoreCase(Case(1, 130, 70, 2, 1, 128, "causal"), soft_cap=2.0, bias="HTS"),
    ScoreCase(
        Case(2, 65, 152, 4, 2, 64, "full", "fp16"),
        soft_cap=5.0,
        sinks="BH",
        bias="BHTS",
        bias_dtype="float32",
    ),
    ScoreCase(Case(1, 70, 130, 2, 1, 192, "causal", head_dim_v=128), bias="HTS"),
    ScoreCase(Case(1, 130, 70, 2, 1, 256, "full", "fp16"), bias="S", sinks="H"),
    ScoreCase(
        Case(1, 97, 113, 2, 1, 256, "causal"),
        soft_cap=2.0,
        bias="BHTS",
        bias_dtype="float32",
    ),
    ScoreCase(
        Case(1, 97, 113, 2, 2, 192, head_dim_v=128),
        soft_cap=2.0,
        bias="HTS",
    ),
    # Steps of 48 keys: of a tile's, its first queries do not see the last two.
    ScoreCase(Case(1, 250, 250, 2, 1, 256, "causal"), bias="TS"),
]
