"""The shapes that attention is tested on, and its definition in NumPy and plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: str = "full"  # full, causal or bottom_right
    dtype: str = "bf16"
    gain: float = 1.0  # multiplies q, k and v
    window: tuple[int, int] | None = None  # keys seen before and after a query's own
    bottom_right: bool = False  # with mask "full" and a window
    head_dim_v: int = 0  # 0: head_dim

    def __post_init__(self):
        if self.head_dim_v == 0:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    def __str__(self) -> str:
        gain = "" if self.gain == 1 else f"-x{self.gain:g}"
        gain += "" if self.window is None else "-{}-{}".format(*self.window)
        gain += "-bottom_right" if self.bottom_right else ""
        same = self.head_dim_v == self.head_dim
        head_dim = f"D{self.head_dim}" + ("" if same else f"x{self.head_dim_v}")
        return (
            f"B{self.batch}-T{self.seqlen_q}-S{self.seqlen_kv}-H{self.num_heads}"
            f"-K{self.num_kv_heads}-{head_dim}-{self.dtype}-{self.mask}{gain}"
        )

    @property
    def settings(self) -> dict:
        """Keyword arguments of ``tk_jax.attention``."""
        return {
            "is_causal": self.mask != "full",
            "causal_align": "bottom_right" if self.offset else "top_left",
            "local_window_size": self.window,
        }

    @property
    def offset(self) -> int:
        """Query i is at position i + this among the keys."""
        aligned = self.bottom_right or self.mask == "bottom_right"
        return self.seqlen_kv - self.seqlen_q if aligned else 0

    def hidden(self) -> np.ndarray:
        """Which keys a query does not see, [T, S] or [B, H, T, S]."""
        position = np.arange(self.seqlen_q)[:, None] + self.offset
        key = np.arange(self.seqlen_kv)[None, :]
        hidden = (key > position) & (self.mask != "full")
        if self.window is not None:
            left, right = self.window
            hidden |= (key < position - left) | (key > position + right)
        return hidden

    @property
    def scores(self) -> int:
        return self.batch * self.num_heads * self.seqlen_q * self.seqlen_kv

    def inputs(self, seed: int = 0):
        """q, k, v, dout and dlse."""
        rng = np.random.default_rng(seed)
        rows = (self.batch, self.seqlen_q, self.num_heads)
        q_shape = (*rows, self.head_dim)
        keys = (self.batch, self.seqlen_kv, self.num_kv_heads)
        dtype = _DTYPES[self.dtype]
        q, k, v, dout = (
            (rng.standard_normal(shape, np.float32) * gain).astype(dtype)
            for shape, gain in (
                (q_shape, self.gain),
                ((*keys, self.head_dim), self.gain),
                ((*keys, self.head_dim_v), self.gain),
                ((*rows, self.head_dim_v), 1),
            )
        )
        return q, k, v, dout, rng.standard_normal(rows, np.float32)


def _lengths() -> list[Case]:
    """Cases that differ in little but their lengths."""
    lengths = (1, 7, 63, 64, 65, 127, 129, 191, 193, 1000, 1023, 1025, 4096)
    cases = []
    for index, length in enumerate(lengths):
        batch, heads = (2, 4) if length < 1000 else (1, 2)
        one, other = (64, 128) if index % 2 else (128, 64)
        cases += [
            Case(batch, length, length, heads, heads // 2, one, "causal"),
            Case(batch, length, length, heads, heads // 2, other, "causal"),
            Case(batch, length, length, heads, heads // 2, one, "full"),
        ]
    for index, (seqlen_q, seqlen_kv) in enumerate(
        (
            (1, 129),
            (129, 1),
            (1, 1000),
            (1000, 1),
            (97, 113),
            (113, 97),
            (64, 65),
            (65, 64),
            (128, 1025),
            (1025, 128),
            (191, 1000),
            (1000, 191),
        )
    ):
        head_dim = (64, 128)[index % 2]
        cases += [
            Case(1, seqlen_q, seqlen_kv, 4, 2, head_dim, "causal"),
            Case(1, seqlen_q, seqlen_kv, 4, 2, 192 - head_dim, "bottom_right"),
            Case(1, seqlen_q, seqlen_kv, 2, 2, head_dim, "full"),
        ]
    return cases


def _others() -> list[Case]:
    return [
        # Eight query heads for each key head, multi-query, equal and odd head counts.
        Case(1, 257, 257, 16, 2, 64, "causal"),
        Case(1, 257, 257, 16, 2, 128, "causal"),
        Case(2, 130, 200, 8, 1, 64, "full"),
        Case(2, 200, 130, 8, 1, 128, "bottom_right"),
        Case(1, 300, 300, 5, 5, 64, "causal"),
        Case(1, 300, 300, 9, 3, 128, "full"),
        Case(3, 97, 113, 4, 2, 64, "causal"),
        Case(3, 161, 161, 4, 4, 128, "causal"),
        Case(3, 257, 129, 6, 2, 64, "full"),
        # Scores in the hundreds: the softmax picks single keys.
        Case(1, 193, 193, 2, 1, 64, "causal", gain=30),
        Case(1, 193, 193, 2, 1, 128, "causal", gain=30),
        Case(1, 130, 520, 2, 2, 64, "full", gain=30),
        Case(1, 130, 520, 2, 2, 128, "full", gain=30),
        # Windows: narrower and wider than blocks, past either end, with blind queries.
        Case(1, 321, 321, 4, 2, 64, "causal", window=(64, 0)),
        Case(1, 321, 321, 4, 2, 128, "causal", window=(100, 7)),
        Case(1, 700, 700, 2, 1, 64, window=(127, 65)),
        Case(1, 700, 700, 2, 1, 128, window=(0, 0)),
        Case(2, 129, 500, 2, 2, 64, window=(40, 200), bottom_right=True),
        Case(2, 500, 129, 2, 2, 128, window=(40, 30), bottom_right=True),
        Case(1, 500, 129, 2, 1, 64, window=(40, 30)),
        Case(1, 200, 600, 2, 1, 128, "bottom_right", window=(1000, 0)),
        Case(1, 1025, 1025, 2, 1, 64, "causal", "fp16", window=(256, 0)),
        Case(1, 1025, 1025, 2, 1, 128, "full", "fp16", window=(3, 300)),
        Case(1, 129, 129, 4, 2, 64, "causal", "fp16"),
        Case(1, 129, 129, 4, 2, 128, "causal", "fp16"),
        Case(2, 97, 300, 4, 1, 64, "full", "fp16"),
        Case(2, 97, 300, 4, 1, 128, "full", "fp16"),
        Case(1, 1025, 1025, 2, 1, 64, "bottom_right", "fp16"),
        Case(1, 300, 97, 2, 1, 128, "bottom_right", "fp16"),
        *_other_head_dims(),
    ]


def _other_head_dims() -> list[Case]:
    """Head dims that do not fill their tiles, that are beyond 128, or not v's."""
    return [
        Case(1, 130, 130, 2, 1, 8, "causal"),
        Case(1, 70, 200, 2, 2, 72, "full"),
        Case(2, 129, 65, 2, 1, 96, "bottom_right", "fp16"),
        Case(1, 65, 130, 2, 1, 128, "causal", head_dim_v=64),
        Case(1, 130, 65, 2, 2, 40, "full", head_dim_v=120),
        Case(1, 1025, 1025, 2, 1, 192, "causal", head_dim_v=128),
        Case(1, 300, 300, 4, 2, 192, "full", "fp16", head_dim_v=128),
        Case(2, 97, 130, 4, 1, 192, "causal", head_dim_v=128),
        Case(1, 191, 320, 2, 2, 192, "bottom_right"),
        Case(1, 1000, 1000, 2, 1, 256, "causal"),
        Case(2, 193, 257, 2, 1, 256, "full"),
        Case(1, 130, 70, 4, 2, 256, "causal", "fp16"),
        Case(1, 257, 130, 2, 1, 256, "bottom_right"),
        Case(1, 129, 129, 2, 1, 136, "causal", head_dim_v=200),
        Case(1, 65, 129, 2, 2, 64, "full", head_dim_v=256),
        Case(1, 129, 65, 2, 1, 248, "causal", head_dim_v=8),
        Case(1, 1, 1, 1, 1, 256, "full"),
        Case(1, 193, 193, 2, 1, 256, "causal", gain=30),
        Case(1, 321, 321, 4, 2, 256, "causal", window=(100, 7)),
        Case(2, 129, 300, 2, 2, 192, window=(40, 200), bottom_right=True),
        Case(1, 300, 129, 2, 1, 192, window=(40, 30), head_dim_v=128),
    ]


LENGTHS = _lengths()
CASES = LENGTHS + _others()


def reference_f64(case: Case, q, k, v, dout, dlse):
    """out, lse, dq, dk and dv in float64, head by head, by NumPy alone."""
    scale = case.head_dim**-0.5
    groups = case.num_heads // case.num_kv_heads
    hidden = np.broadcast_to(
        case.hidden(), (case.batch, case.num_heads, case.seqlen_q, case.seqlen_kv)
    )
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    out, lse = np.zeros(dout.shape), np.zeros(q.shape[:-1])
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b in range(case.batch):
        for h in range(case.num_heads):
            h_kv = h // groups
            q_h, dout_h = q[b, :, h], dout[b, :, h]
            k_h, v_h = k[b, :, h_kv], v[b, :, h_kv]
            with np.errstate(divide="ignore", invalid="ignore"):
                s = np.where(hidden[b, h], -np.inf, scale * (q_h @ k_h.T))
                top = s.max(1, keepdims=True)
                top = np.where(np.isneginf(top), 0, top)
                p = np.exp(s - top)
                total = p.sum(1, keepdims=True)
                lse[b, :, h] = (top + np.log(total))[:, 0]
                p /= np.where(total == 0, 1, total)
            out[b, :, h] = p @ v_h
            ds = dout_h @ v_h.T
            ds -= (p * ds).sum(1, keepdims=True) - dlse[b, :, h, None]
            ds *= p * scale
            dq[b, :, h] = ds @ k_h
            dk[b, :, h_kv] += ds.T @ q_h
            dv[b, :, h_kv] += p.T @ dout_h
    return out, lse, dq, dk, dv


def low_precision(case: Case, q, k, v, dout, dlse):
    """The same by plain XLA in the dtype of the inputs, scores and all.

    Matrix products take low-precision operands and are summed in float32, as the device
    under test sums them: tensor cores truncate where a CPU rounds, which alone makes
    half an ulp of a score. The softmax is in float32. The gradients follow
    FlashAttention's formulas, which know the result only as it was rounded.
    """
    return _low_precision(*jax.device_put((case.hidden(), q, k, v, dout, dlse)))


@jax.jit
def _low_precision(hidden, q, k, v, dout, dlse):
    dtype = q.dtype
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_kv, num_kv_heads = k.shape[1:3]
    q, dout, dlse = (
        x.reshape(batch, seqlen_q, num_kv_heads, -1, *x.shape[3:])
        for x in (q, dout, dlse)
    )

    def dot(equation, a, b):
        return jnp.einsum(
            equation,
            a.astype(dtype),
            b.astype(dtype),
            precision="highest",
            preferred_element_type=jnp.float32,
        )

    # XLA takes products of a vector off the tensor cores: not so few rows and keys.
    def whole(x):
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 64)] + [(0, 0)] * (x.ndim - 2))

    s = lax.optimization_barrier(dot("btkgd,bskd->bkgts", whole(q), whole(k)))
    s = s[..., :seqlen_q, :seqlen_kv] * head_dim**-0.5
    if hidden.ndim == 4:
        hidden = hidden.reshape(batch, num_kv_heads, -1, *hidden.shape[2:])
    s = jnp.where(hidden, -jnp.inf, s)
    lse = jax.nn.logsumexp(s, axis=-1, keepdims=True)
    p = jnp.exp(s - jnp.where(lse == -jnp.inf, 0, lse))
    out = dot("bkgts,bskd->btkgd", p, v).astype(dtype)

    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1) - dlse
    dp = dot("btkgd,bskd->bkgts", dout, v)
    ds = p * (dp - jnp.einsum("btkg->bkgt", delta)[..., None]) * head_dim**-0.5
    dq = dot("bkgts,bskd->btkgd", ds, k)
    dk = dot("bkgts,btkgd->bskd", ds, q)
    dv = dot("bkgts,btkgd->bskd", p, dout)
    rows = (batch, seqlen_q, num_heads)
    return (
        out.reshape(*rows, -1),
        jnp.einsum("bkgt->btkg", lse[..., 0]).reshape(rows),
        dq.reshape(*rows, head_dim).astype(dtype),
        dk.astype(dtype),
        dv.astype(dtype),
    )


def floors(case: Case, q, k, v, dout) -> tuple[float, ...]:
    """Allowances for out, lse, dq, dk and dv where the exact gradient cancels.

    dq and dk are sums of p * (dp - delta) * scale * (k or q), in which a row with one
    key has dp = delta: what remains is the rounding of two float32 sums over Dv.
    """
    largest = {
        name: float(np.abs(np.asarray(x, np.float32)).max())
        for name, x in (("q", q), ("k", k), ("v", v), ("dout", dout))
    }
    head_dim = case.head_dim
    ds = 2.0**-23 * case.head_dim_v * head_dim**-0.5 * largest["dout"] * largest["v"]
    rows = case.seqlen_q * case.num_heads // case.num_kv_heads
    return 0.0, 0.0, ds * largest["k"], ds * largest["q"] * rows**0.5, 0.0
