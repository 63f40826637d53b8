"""A case of each op: its shapes and mask, its name, its flops and bytes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import recurrent

_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """q [B, T, H, D]; k [B, S, K, D]; v [B, S, K, Dv]; out [B, T, H, Dv]."""

    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool
    dtype: str = "bf16"
    head_dim_v: int | None = None  # None: head_dim
    window: int | None = None  # keys this far before a query and, not causal, after it
    documents: int = 1  # of equal length, packed into every row

    pattern: ClassVar = re.compile(
        r"B(\d+)-T(\d+)-S(\d+)-H(\d+)-K(\d+)-D(\d+)-(causal|full)-(bf16|fp16)"
        r"(?:-DV(\d+))?(?:-w(\d+))?(?:-docs(\d+))?"
    )
    directions: ClassVar = ("fwd", "bwd")

    def __post_init__(self):
        # One name a case.
        if self.head_dim_v == self.head_dim:
            object.__setattr__(self, "head_dim_v", None)
        if self.documents > 1 and (
            self.seqlen_q != self.seqlen_kv or self.seqlen_q % self.documents
        ):
            raise ValueError(
                f"{self.documents} documents need T = S and a multiple of their "
                f"number, got T = {self.seqlen_q} and S = {self.seqlen_kv}"
            )

    @classmethod
    def parse(cls, text: str) -> AttentionCase | None:
        match = cls.pattern.fullmatch(text)
        if match is None:
            return None
        *sizes, mask, dtype, head_dim_v, window, documents = match.groups()
        return cls(
            *map(int, sizes),
            is_causal=mask == "causal",
            dtype=dtype,
            head_dim_v=head_dim_v and int(head_dim_v),
            window=window and int(window),
            documents=int(documents or 1),
        )

    def __str__(self) -> str:
        mask = "causal" if self.is_causal else "full"
        text = (
            f"B{self.batch}-T{self.seqlen_q}-S{self.seqlen_kv}-H{self.num_heads}"
            f"-K{self.num_kv_heads}-D{self.head_dim}-{mask}-{self.dtype}"
        )
        if self.head_dim_v is not None:
            text += f"-DV{self.head_dim_v}"
        if self.window is not None:
            text += f"-w{self.window}"
        return text + (f"-docs{self.documents}" if self.documents > 1 else "")

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        q = (self.batch, self.seqlen_q, self.num_heads, self.head_dim)
        k = (self.batch, self.seqlen_kv, self.num_kv_heads, self.head_dim)
        return q, k, (*k[:-1], self.value_dim)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.shapes[0][:-1], self.value_dim)

    @property
    def local_window_size(self) -> tuple[int, int] | None:
        if self.window is None:
            return None
        return self.window, 0 if self.is_causal else self.window

    @property
    def visible(self) -> float:
        """Pairs of a query and a key that it sees, of one head and batch element.

        Without a window, half of all with a causal mask, as everyone counts.
        """
        seqlen_q = self.seqlen_q // self.documents
        seqlen_kv = self.seqlen_kv // self.documents
        if self.window is None:
            count = seqlen_q * seqlen_kv / (2 if self.is_causal else 1)
        else:
            position = np.arange(seqlen_q)
            left, right = self.local_window_size
            first = np.maximum(position - left, 0)
            end = np.minimum(position + right + 1, seqlen_kv)
            count = float(np.maximum(end - first, 0).sum())
        return count * self.documents

    def flops(self, direction: str) -> float:
        """Of the products: 2 a pair of query and key, and dimension."""
        heads = self.batch * self.num_heads
        dims = self.head_dim + self.value_dim
        if direction == "bwd":  # s, dq and dk are of D; dp and dv are of Dv.
            dims = 3 * self.head_dim + 2 * self.value_dim
        return 2.0 * heads * self.visible * dims

    def bytes(self, direction: str) -> float:
        """Every array once: forward q, k, v, out; backward also dout, dq, dk, dv."""
        sizes = sum(math.prod(shape) for shape in (*self.shapes, self.out_shape))
        return 2.0 * sizes * (2 if direction == "bwd" else 1)


@dataclasses.dataclass(frozen=True)
class MatmulCase:
    """c [M, N] = op(a) @ op(b), with batch of them if batch is not 1."""

    batch: int
    m: int
    n: int
    k: int
    transposes: str = "nn"  # "t": the operand is stored transposed
    dtype: str = "bf16"

    pattern: ClassVar = re.compile(
        r"B(\d+)-M(\d+)-N(\d+)-K(\d+)-([nt][nt])-(bf16|fp16)"
    )
    directions: ClassVar = ("fwd",)

    @classmethod
    def parse(cls, text: str) -> MatmulCase | None:
        match = cls.pattern.fullmatch(text)
        if match is None:
            return None
        *sizes, transposes, dtype = match.groups()
        return cls(*map(int, sizes), transposes=transposes, dtype=dtype)

    def __str__(self) -> str:
        return (
            f"B{self.batch}-M{self.m}-N{self.n}-K{self.k}"
            f"-{self.transposes}-{self.dtype}"
        )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        lead = () if self.batch == 1 else (self.batch,)
        a, b = (self.m, self.k), (self.k, self.n)
        return (
            lead + (a if self.transposes[0] == "n" else a[::-1]),
            lead + (b if self.transposes[1] == "n" else b[::-1]),
        )

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (() if self.batch == 1 else (self.batch,)) + (self.m, self.n)

    def flops(self, direction: str) -> float:
        del direction
        return 2.0 * self.batch * self.m * self.n * self.k

    def bytes(self, direction: str) -> float:
        del direction
        return 2.0 * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


Case = AttentionCase | MatmulCase | recurrent.RecurrentCase
CASE_TYPES = {
    "attention": AttentionCase,
    "matmul": MatmulCase,
    **recurrent.CASE_TYPES,
}


def make_dtype(case: Case):
    return _DTYPES[case.dtype]


def input_structs(case: Case) -> tuple[list[jax.ShapeDtypeStruct], ...]:
    """What :func:`make_inputs` returns, without values."""
    structs = [
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in _shapes_and_dtypes(case)
    ]
    return structs[:-1], structs[-1]


def make_inputs(case: Case, seed: int) -> tuple[list[jax.Array], jax.Array]:
    """Standard-normal operands, and a cotangent of the result."""
    *arrays, dout = _normal(_shapes_and_dtypes(case), seed)
    return arrays, dout


def _shapes_and_dtypes(case: Case) -> tuple:
    """Of the operands and the result."""
    dtype = make_dtype(case)
    dtypes = [dtype] * len(case.shapes)
    if isinstance(case, recurrent.RecurrentCase):
        dtypes = [own or dtype for _, own in case.arrays.values()]
    operands = zip(case.shapes, dtypes, strict=True)
    return (*operands, (case.out_shape, dtype))


@functools.partial(jax.jit, static_argnums=0)
def _normal(shapes_and_dtypes, seed):
    keys = jax.random.split(jax.random.key(seed), len(shapes_and_dtypes))
    return [
        jax.random.normal(key, shape, dtype)
        for key, (shape, dtype) in zip(keys, shapes_and_dtypes, strict=True)
    ]
