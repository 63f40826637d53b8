"""The recurrent ops' cases, implementations and bars: ssd, linear attention and kin."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import tk_jax

_CHUNK = 64


class UnsupportedCaseError(Exception):
    """An implementation does not compute a case; says why."""


@dataclasses.dataclass(frozen=True)
class RecurrentCase:
    """What the cases of all recurrent ops have: a name made of their fields."""

    directions: ClassVar = ("fwd", "bwd")
    pattern: ClassVar[re.Pattern]

    @classmethod
    def parse(cls, text: str):
        match = cls.pattern.fullmatch(text)
        if match is None:
            return None
        *sizes, dtype, documents = match.groups()
        return cls(*map(int, sizes), dtype=dtype, documents=int(documents or 1))

    def __str__(self) -> str:
        sizes = "-".join(
            f"{letter}{getattr(self, name)}" for letter, name in self.letters
        )
        documents = f"-docs{self.documents}" if self.documents > 1 else ""
        return f"{sizes}-{self.dtype}{documents}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.arrays.values())

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.arrays[self.like_out][0]

    @property
    def head_tokens(self) -> int:
        return self.batch * self.seqlen * self.num_heads

    def bytes(self, direction: str) -> float:
        """Every array once: the operands and out; backward their gradients as well.

        Backward reads the operands and dout and writes gradients: no states.
        """
        sizes = sum(
            math.prod(shape) * (2 if kind is None else 4)
            for shape, kind in self.arrays.values()
        )
        out = 2 * math.prod(self.out_shape)
        return float(sizes + out if direction == "fwd" else 2 * sizes + out)

    def documents_of(self) -> dict:
        """The argument that packs a case's documents."""
        if self.documents == 1:
            return {}
        ids = jnp.arange(self.seqlen, dtype=jnp.int32)
        ids //= self.seqlen // self.documents
        # As data: what is computed from it is part of every call.
        return {"segment_ids": jax.lax.optimization_barrier(ids)}


def _pattern(letters) -> re.Pattern:
    sizes = "-".join(rf"{letter}(\d+)" for letter, _ in letters)
    return re.compile(sizes + r"-(bf16|fp16)(?:-docs(\d+))?")


def _scan_flops(direction, tokens, key_dim, value_dim) -> float:
    """Of a scan in chunks of 64, of so many tokens of heads; scores by each head."""
    scores, values, states = (
        2 * _CHUNK * key_dim,
        2 * _CHUNK * value_dim,
        2 * key_dim * value_dim,
    )
    if direction == "fwd":
        return float(tokens * (scores + values + 2 * states))
    return float(tokens * (3 * scores + 2 * values + 5 * states))


@dataclasses.dataclass(frozen=True)
class SsdCase(RecurrentCase):
    """x [B, T, H, P]; dt [B, T, H]; B and C [B, T, G, N]; with D, bias and softplus."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    dtype: str = "bf16"
    documents: int = 1

    letters: ClassVar = (
        ("B", "batch"),
        ("T", "seqlen"),
        ("H", "num_heads"),
        ("P", "head_dim"),
        ("N", "state_dim"),
        ("G", "num_groups"),
    )
    pattern: ClassVar = _pattern(letters)
    like_out: ClassVar = "x"

    @property
    def arrays(self) -> dict:
        """Shapes, and dtypes where they are not the case's."""
        tokens = (self.batch, self.seqlen)
        heads = (self.num_heads,)
        group = (*tokens, self.num_groups, self.state_dim)
        return {
            "x": ((*tokens, self.num_heads, self.head_dim), None),
            "dt": ((*tokens, *heads), jnp.float32),
            "A_log": (heads, jnp.float32),
            "B": (group, None),
            "C": (group, None),
            "D": (heads, jnp.float32),
            "dt_bias": (heads, jnp.float32),
        }

    def flops(self, direction: str) -> float:
        return _scan_flops(direction, self.head_tokens, self.state_dim, self.head_dim)


@dataclasses.dataclass(frozen=True)
class LinearAttentionCase(RecurrentCase):
    """q, k and v [B, T, H, D]; a decay for each token and head."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    dtype: str = "bf16"
    documents: int = 1

    letters: ClassVar = (
        ("B", "batch"),
        ("T", "seqlen"),
        ("H", "num_heads"),
        ("D", "head_dim"),
    )
    pattern: ClassVar = _pattern(letters)
    like_out: ClassVar = "v"

    @property
    def arrays(self) -> dict:
        shape = (self.batch, self.seqlen, self.num_heads, self.head_dim)
        return {
            "q": (shape, None),
            "k": (shape, None),
            "v": (shape, None),
            "decay": (shape[:-1], jnp.float32),
        }

    def flops(self, direction: str) -> float:
        return _scan_flops(direction, self.head_tokens, self.head_dim, self.head_dim)


@dataclasses.dataclass(frozen=True)
class BasedAttentionCase(RecurrentCase):
    """q and k [B, T, H, F]; v [B, T, H, D]."""

    batch: int
    seqlen: int
    num_heads: int
    feature_dim: int
    head_dim: int
    dtype: str = "bf16"
    documents: int = 1

    letters: ClassVar = (
        ("B", "batch"),
        ("T", "seqlen"),
        ("H", "num_heads"),
        ("F", "feature_dim"),
        ("D", "head_dim"),
    )
    pattern: ClassVar = _pattern(letters)
    like_out: ClassVar = "v"

    @property
    def arrays(self) -> dict:
        tokens = (self.batch, self.seqlen, self.num_heads)
        return {
            "q": ((*tokens, self.feature_dim), None),
            "k": ((*tokens, self.feature_dim), None),
            "v": ((*tokens, self.head_dim), None),
        }

    def flops(self, direction: str) -> float:
        """With the symmetric half of the second-order features."""
        d = self.feature_dim
        return _scan_flops(
            direction, self.head_tokens, 1 + d + d * (d + 1) // 2, self.head_dim
        )


@dataclasses.dataclass(frozen=True)
class HedgehogAttentionCase(RecurrentCase):
    """q, k and v [B, T, H, D]; maps to as many features."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    dtype: str = "bf16"
    documents: int = 1

    letters: ClassVar = LinearAttentionCase.letters
    pattern: ClassVar = _pattern(letters)
    like_out: ClassVar = "v"

    @property
    def arrays(self) -> dict:
        shape = (self.batch, self.seqlen, self.num_heads, self.head_dim)
        maps = (self.num_heads, self.head_dim, self.head_dim // 2)
        mixing = (self.num_heads,)
        return {
            "q": (shape, None),
            "k": (shape, None),
            "v": (shape, None),
            "q_map": (maps, None),
            "k_map": (maps, None),
            "alpha": (mixing, jnp.float32),
            "beta": (mixing, jnp.float32),
        }

    def flops(self, direction: str) -> float:
        """A scan of D features, the maps, and a window of 96 keys on average."""
        scan = _scan_flops(direction, self.head_tokens, self.head_dim, self.head_dim)
        other = self.head_tokens * (4 * 96 * self.head_dim + 2 * self.head_dim**2)
        return scan + other * (1 if direction == "fwd" else 2.5)


CASE_TYPES = {
    "ssd": SsdCase,
    "linear_attention": LinearAttentionCase,
    "based_attention": BasedAttentionCase,
    "hedgehog_attention": HedgehogAttentionCase,
}


def _grid(make, *sizes):
    return lambda: [make(*size) for size in sizes]


CASE_SETS = {
    "ssd": {
        "grid": lambda: [
            SsdCase(8, 4096, 32, 64, 128, 1),
            SsdCase(8, 2048, 64, 64, 128, 1),
            SsdCase(1, 65536, 24, 64, 128, 1),
            SsdCase(1, 65536, 24, 64, 128, 1, documents=16),
        ]
    },
    "linear_attention": {
        "grid": _grid(
            LinearAttentionCase,
            (4, 4096, 16, 128),
            (1, 16384, 16, 128),
            (1, 65536, 8, 128),
        )
    },
    "based_attention": {
        "grid": _grid(BasedAttentionCase, (4, 4096, 16, 16, 64), (16, 3072, 16, 16, 64))
    },
    "hedgehog_attention": {
        "grid": lambda: [
            HedgehogAttentionCase(4, 4096, 16, 128),
            HedgehogAttentionCase(16, 3072, 16, 128),
            # None of which begins where a chunk does.
            HedgehogAttentionCase(4, 4096, 16, 128, documents=15),
        ]
    },
}


# -- Implementations ------------------------------------------------------------------


def tk_or_xla(case: RecurrentCase, implementation: str) -> Callable:
    """Ours, of a case's arrays in order."""
    options = {"implementation": implementation, **case.documents_of()}
    if isinstance(case, SsdCase):
        return lambda x, dt, A_log, B, C, D, dt_bias: tk_jax.ssd(
            x,
            dt,
            -jnp.exp(A_log),
            B,
            C,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            **options,
        )
    if isinstance(case, LinearAttentionCase):
        return lambda q, k, v, decay: tk_jax.linear_attention(
            q, k, v, log_decay=jax.nn.log_sigmoid(decay), scale=1.0, **options
        )
    if isinstance(case, BasedAttentionCase):
        return lambda q, k, v: tk_jax.based_attention(
            q, k, v, normalize=False, **options
        )
    return lambda q, k, v, q_map, k_map, alpha, beta: tk_jax.hedgehog_attention(
        q,
        k,
        v,
        q_map,
        k_map,
        alpha=jax.nn.sigmoid(alpha),
        beta=jax.nn.sigmoid(beta),
        **options,
    )


def jla(case: RecurrentCase) -> Callable:
    """jax-linear-attention's Mosaic kernels."""
    if case.documents > 1:
        raise UnsupportedCaseError("measured here without documents")
    if isinstance(case, SsdCase):
        from jla.layers.ssm import mamba2_ssd

        def ssd(x, dt, A_log, B, C, D, dt_bias):
            dt = jax.nn.softplus(dt + dt_bias)
            y = mamba2_ssd(
                x,
                dt,
                -jnp.exp(A_log),
                B,
                C,
                impl="mosaic_gpu",
                grouped_key_grads=True,
            )[0]
            return (y + D[:, None] * x).astype(x.dtype)

        return ssd
    if isinstance(case, LinearAttentionCase):
        from jla import ops

        return lambda q, k, v, decay: ops.linear_attention(
            "simple_gla",
            q,
            k,
            v,
            g=jax.nn.log_sigmoid(decay),
            scale=1.0,
            impl="mosaic_gpu",
        )[0]
    raise UnsupportedCaseError("it has no such op")


IMPLEMENTATIONS = {
    op: {
        "tk": (None, functools.partial(tk_or_xla, implementation="tk")),
        "jla": ("jla", jla),
        "xla": (None, functools.partial(tk_or_xla, implementation="xla")),
    }
    for op in CASE_TYPES
}


# -- The gate -------------------------------------------------------------------------

# Relative RMS errors that a result may have: out, gradients, and those of gates.
_BARS = {"out": 5e-3, "dt": 2e-2, "A_log": 2e-2, "dt_bias": 2e-2, "decay": 2e-2}
_GRADIENT_BAR = 1e-2


class Gate:
    """Judges a case's results against our XLA implementation in float32.

    The interface of benchmarks.gate.Gate. Of the batch, the last element is compared;
    what all elements share is compared for a batch of that element alone where it can
    be, and left out where it cannot: parameters' gradients are sums over all.
    """

    def __init__(self, case: RecurrentCase, make_inputs: Callable):
        self._case, self._make_inputs = case, make_inputs
        self._expected = None

    def compile(self) -> None:
        """Compiled when it is first needed."""

    def complaints(self, out, gradients=None) -> list[str]:
        if self._expected is None:
            self._expected = self._compute()
        names = ("out", *self._case.arrays)
        found = []
        for name, got, exact in zip(
            names, [out, *(gradients or ())], self._expected, strict=False
        ):
            error = _relative_rms(self._sample(name, got), exact)
            bar = _BARS.get(name, _GRADIENT_BAR)
            if not error <= bar:
                found.append(f"{name} has relative RMS error {error:.2e} over {bar}")
        return found

    def _sample(self, name, x):
        """The last element of the batch, or all of a parameter's gradient."""
        is_parameter = name != "out" and self._is_parameter(name)
        return np.asarray((x if is_parameter else x[-1:]).astype(jnp.float32))

    def _is_parameter(self, name) -> bool:
        shape = self._case.arrays[name][0]
        return shape[:2] != (self._case.batch, self._case.seqlen)

    def _compute(self):
        arrays, dout = self._make_inputs(self._case, seed=0)
        function = tk_or_xla(self._case, "xla")

        @jax.jit
        def run(dout, *arrays):
            out, pull_back = jax.vjp(function, *arrays)
            return out, *pull_back(dout)

        # One element at a time: in float32, all would take too much memory.
        totals = None
        for index in range(self._case.batch):
            piece = [
                x.astype(jnp.float32)
                if self._is_parameter(name)
                else x[index : index + 1].astype(jnp.float32)
                for name, x in zip(self._case.arrays, arrays, strict=True)
            ]
            with jax.default_matmul_precision("highest"):
                results = run(dout[index : index + 1].astype(jnp.float32), *piece)
            if totals is None:
                totals = list(results)
                continue
            for i, name in enumerate(("out", *self._case.arrays)):
                added = i > 0 and self._is_parameter(name)
                totals[i] = totals[i] + results[i] if added else results[i]
        return [np.asarray(x) for x in totals]


def _relative_rms(got, exact) -> float:
    difference = np.linalg.norm((got - exact).astype(np.float64))
    return float(difference / max(np.linalg.norm(exact.astype(np.float64)), 1e-30))
