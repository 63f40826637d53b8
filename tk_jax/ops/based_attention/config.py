"""Settings of Based attention: what it computes is in LinearAttentionOptions.

``BasedOutputsOptions`` and ``BasedConfig`` cross to C++ as attributes, decoded into the
structs of the same fields in ``cuda/ffi/based_attention_kernels.h``; the options of the
other kernels are linear attention's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from tk_jax.ops.linear_attention.config import (
    CHUNK,
    KERNEL_DTYPES,
    MAX_GRID,
    MAX_ROWS,
    ONES,
    SLICE,
    padded_tokens,
    round_up,
)

# The feature dims that it takes: their states are what a kernel can keep on chip.
FEATURE_DIMS = (8, 16, 24, 32)
# Up to this one, a state is what a warpgroup keeps in registers.
_LARGEST_WALKED = 16


@dataclasses.dataclass(frozen=True)
class BasedStatesOptions:
    """Which states are computed: forward those of keys and values, or gradients."""

    scale: float  # of the queries
    reverse: bool
    chunks_of_segment: int


@dataclasses.dataclass(frozen=True)
class BasedOutputsOptions:
    """What the outputs are."""

    scale: float  # of the queries
    chunks_of_segment: int
    normalize: bool  # divided by the sums of weights


@dataclasses.dataclass(frozen=True)
class BasedConfig:
    """How a kernel runs."""

    stages: int  # depth of the ring of chunks, or of slices of values


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """How all of a call's kernels run."""

    chunks_of_segment: int  # segments of a sequence are walked through side by side
    states: BasedConfig
    outputs: BasedConfig  # of chunk_outputs where those are taken
    gradients: BasedConfig  # of walked_gradients where outputs walk

    def segments(self, seqlen: int) -> int:
        """How many segments a sequence has."""
        return -(-seqlen // (CHUNK * self.chunks_of_segment))


# Blocks that are there at once.
_RESIDENT = 264
# With fewer chunks to a segment, what a second pass and the first state cost is more
# than what is won.
_LEAST_CHUNKS_OF_SEGMENT = 4
# How many states a block sums in the time that both passes take for a chunk. n chunks
# in s segments cost n / s chunks and up to s states: least where s^2 is n times this.
_STATES_OF_CHUNK = 4


def scan_config(batch: int, seqlen: int, heads: int, dim: int, value_dim: int):
    """The ScanConfig for q [batch, seqlen, G, dim] and v [.., heads, value_dim]."""
    blocks = max(1, batch * heads * -(-value_dim // SLICE) * state_pieces(dim))
    chunks = -(-seqlen // CHUNK)
    segments = min(
        _RESIDENT // blocks,
        chunks // _LEAST_CHUNKS_OF_SEGMENT,
        math.isqrt(_STATES_OF_CHUNK * chunks),
    )
    return ScanConfig(
        chunks_of_segment=-(-chunks // max(1, segments)),
        states=BasedConfig(stages=3),
        outputs=BasedConfig(stages=2 if walks(dim) else 1),
        gradients=BasedConfig(stages=2 if walks(dim) else 1),
    )


def kernels(config: ScanConfig, dim: int) -> Iterator[tuple[str, BasedConfig]]:
    """The kernels of a call and their configs."""
    yield "states", config.states
    yield "outputs" if walks(dim) else "chunk_outputs", config.outputs
    yield "walked_gradients" if walks(dim) else "gradients", config.gradients


def walks(dim: int) -> bool:
    """Whether out is computed beside the state, as walks in based_attention.h."""
    return dim <= _LARGEST_WALKED


def state_pieces(dim: int) -> int:
    """As state_pieces in based_attention.h."""
    return 1 if walks(dim) else 2 if dim == 24 else 6


def state_columns(dim: int) -> int:
    """As state_columns in based_attention.h."""
    pieces = state_pieces(dim)
    return pieces * round_up(dim * (dim + 4) // 2 // pieces, 16)


def unsupported(q, v, *, normalize: bool = False) -> str | None:
    """What the kernels lack for a call, in words: this is the one place that knows.

    ``q`` and ``v`` are whatever has their shape [..., T, G, D] and [..., T, H, V], and
    their dtype. What it lets through, the kernels compute, forward and backward.
    """
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {jnp.dtype(q.dtype).name} (it takes bfloat16 and float16)"
    if normalize and q.dtype == jnp.float16:
        return "normalize in float16 (of which the sums may exceed the range)"
    return exceeded_limit(q.shape, (*v.shape[:-1], v.shape[-1] + ONES * normalize))


def exceeded_limit(q_shape, v_shape) -> str | None:
    """Which size is beyond the kernels, in words."""
    *leading, seqlen, heads, value_dim = v_shape
    batch = math.prod(leading)
    columns = heads * round_up(value_dim, SLICE)
    rows = batch * columns // SLICE * padded_tokens(seqlen)
    for name, size, limit in (
        ("a batch", batch, MAX_GRID),
        ("a number of groups", q_shape[-2], MAX_GRID),
        ("a number of heads times dimensions of values", columns, MAX_ROWS),
        ("a B * H * T times slices of 64 values", rows, MAX_ROWS),
    ):
        if size > limit:
            return f"{name} of {size} (it takes up to {limit})"
    return None
