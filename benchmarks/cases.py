"""What is measured: the shapes of each op, their names, flops and bytes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import ClassVar

import jax
import jax.numpy as jnp

_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """q, out [B, T, H, D]; k, v [B, S, K, D]."""

    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool
    dtype: str = "bf16"

    pattern: ClassVar = re.compile(
        r"B(\d+)-T(\d+)-S(\d+)-H(\d+)-K(\d+)-D(\d+)-(causal|full)-(bf16|fp16)"
    )
    directions: ClassVar = ("fwd", "bwd")

    @classmethod
    def parse(cls, text: str) -> AttentionCase | None:
        match = cls.pattern.fullmatch(text)
        if match is None:
            return None
        *sizes, mask, dtype = match.groups()
        return cls(*map(int, sizes), is_causal=mask == "causal", dtype=dtype)

    def __str__(self) -> str:
        mask = "causal" if self.is_causal else "full"
        return (
            f"B{self.batch}-T{self.seqlen_q}-S{self.seqlen_kv}-H{self.num_heads}"
            f"-K{self.num_kv_heads}-D{self.head_dim}-{mask}-{self.dtype}"
        )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        q = (self.batch, self.seqlen_q, self.num_heads, self.head_dim)
        k = (self.batch, self.seqlen_kv, self.num_kv_heads, self.head_dim)
        return q, k, k

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def flops(self, direction: str) -> float:
        """4 B H T S D, half of it with a causal mask; 2.5 times that backward."""
        scores = self.batch * self.num_heads * self.seqlen_q * self.seqlen_kv
        forward = 4.0 * scores * self.head_dim / (2 if self.is_causal else 1)
        return forward * (2.5 if direction == "bwd" else 1)

    def bytes(self, direction: str) -> float:
        """Every array once: forward q, k, v, out; backward also dout, dq, dk, dv."""
        rows_q = self.batch * self.seqlen_q * self.num_heads
        rows_kv = self.batch * self.seqlen_kv * self.num_kv_heads
        forward = 2.0 * (2 * rows_q + 2 * rows_kv) * self.head_dim
        return forward * (2 if direction == "bwd" else 1)


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


Case = AttentionCase | MatmulCase
CASE_TYPES = {"attention": AttentionCase, "matmul": MatmulCase}


def default_cases(op: str) -> list[Case]:
    if op == "matmul":
        sizes = (
            (4096, 4096, 4096),
            (8192, 8192, 8192),
            (16384, 2048, 8192),
            (4096, 14336, 4096),
        )
        return [MatmulCase(1, *size) for size in sizes]
    # 16384 tokens and a width of 2048 throughout.
    return [
        AttentionCase(
            16384 // seqlen,
            seqlen,
            seqlen,
            2048 // head_dim,
            2048 // head_dim,
            head_dim,
            is_causal,
        )
        for head_dim, seqlen, is_causal in itertools.product(
            (64, 128), (1024, 4096, 16384), (False, True)
        )
    ]


def quick_cases(op: str) -> list[Case]:
    if op == "matmul":
        return default_cases(op)[::2]
    return [case for case in default_cases(op) if case.seqlen_q == 4096]


def select_cases(op: str, patterns: list[str] | None, *, quick: bool) -> list[Case]:
    """The cases whose names a pattern is found in; a full name adds its own case."""
    cases = quick_cases(op) if quick else default_cases(op)
    if not patterns:
        return cases
    selected = []
    for pattern in patterns:
        named = CASE_TYPES[op].parse(pattern)
        found = [case for case in cases if re.search(pattern, str(case))]
        if named is None and not found:
            raise ValueError(f"no case of {op} matches {pattern!r}")
        selected += [named] if named else found
    return list(dict.fromkeys(selected))


def make_inputs(case: Case, seed: int) -> tuple[list[jax.Array], jax.Array]:
    """Standard-normal operands, and a cotangent of the result."""
    keys = jax.random.split(jax.random.key(seed), len(case.shapes) + 1)
    dtype = _DTYPES[case.dtype]
    arrays = [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, (*case.shapes, case.out_shape), strict=True)
    ]
    return arrays[:-1], arrays[-1]
