"""Settings of Hedgehog attention: what is computed and how; its state.

Those from ``HedgehogSumsOptions`` on cross to C++ as one attribute each, decoded into
the struct of the same fields in ``cuda/ffi/hedgehog_attention_kernels.h``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
# As in hedgehog_attention.h: tokens of a chunk, which are those of a window; columns of
# a map; the largest dimension of q, k and v; columns of values of a slice.
CHUNK = 64
MAP = 64
MAX_DIM = 128
SLICE = 64
# Rows, which the copy engine reads, are padded to multiples of this.
DIM_STEP = 8
# Those that are compiled ahead: dimensions of keys and of values.
KERNEL_DIMS = ((64, 64), (64, 128), (128, 64), (128, 128))
KERNELS = ("sums", "outputs", "queries", "keys", "step")
# Those for packed documents, some of which are others of the same name.
DOCUMENT_KERNELS = (
    "outputs",
    "queries",
    "keys",
    "document_states",
    "reverse_document_states",
)
# As hedgehog_attention.h has them: flags of tiles of packed documents.
FAR_TILE = 1
ONE_WINDOW = 2
# Grids have up to this many blocks along two of their axes ...
MAX_GRID = 65535
# ... and kernels count rows in 32 bits.
MAX_ROWS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class HedgehogOptions:
    """What is computed."""

    scale: float
    window: int


@dataclasses.dataclass(frozen=True)
class HedgehogConfig:
    """How it is computed."""

    chunk: int  # tokens of one step, at most two windows


class HedgehogState(NamedTuple):
    """All that a sequence leaves behind for the tokens that follow."""

    sums: jax.Array  # [..., K, 2 F, V]: of features times values, older than 2 windows
    normalizer: jax.Array  # [..., K, 2 F]: of features, older than 2 windows
    keys: jax.Array  # [..., 2 window, K, D]: the latest, the very latest last
    values: jax.Array  # [..., 2 window, K, V]: the latest
    length: jax.Array  # int32 [...]: how many tokens the sequence has had


# So that steps, which take and return it, can be exported.
jax.export.register_namedtuple_serialization(
    HedgehogState, serialized_name="tk_jax.HedgehogState"
)


def xla_config(options: HedgehogOptions) -> HedgehogConfig:
    """A window to a step: the scores are three windows wide."""
    return HedgehogConfig(chunk=options.window)


def state_shapes(q_map_shape, k_shape, v_shape, window, num_axes) -> HedgehogState:
    """Of a call: ``num_axes`` are those of k that are no batch dimensions."""
    batch = tuple(k_shape[: len(k_shape) - num_axes])
    num_kv_heads, dim_v = v_shape[-2:]
    features = 2 * q_map_shape[-1]
    return HedgehogState(
        sums=(*batch, num_kv_heads, features, dim_v),
        normalizer=(*batch, num_kv_heads, features),
        keys=(*batch, 2 * window, *k_shape[-2:]),
        values=(*batch, 2 * window, num_kv_heads, dim_v),
        length=batch,
    )


@dataclasses.dataclass(frozen=True)
class HedgehogSumsOptions:
    """Which sums are computed: of segments of so many chunks."""

    chunks_of_segment: int


@dataclasses.dataclass(frozen=True)
class HedgehogOutputsOptions:
    """What the outputs are."""

    scale: float
    chunks_of_segment: int  # of packed documents: shares of tiles
    states_of_segment: int = 0  # that those after it begin with; not of documents
    shares: int = 0  # 0 where documents are not packed


@dataclasses.dataclass(frozen=True)
class HedgehogGradientsOptions:
    """Of what the gradients are."""

    scale: float


@dataclasses.dataclass(frozen=True)
class HedgehogStepOptions:
    """What a step computes."""

    scale: float


@dataclasses.dataclass(frozen=True)
class HedgehogDocumentStatesOptions:
    """Which states of packed documents are computed."""

    reverse: bool
    shares: int


# Blocks that are there at once: one for each multiprocessor.
_RESIDENT = 132
# With fewer chunks to a segment, what the sums of those before cost is more than what
# is won.
_LEAST_CHUNKS_OF_SEGMENT = 8


def chunks_of_segment(batch: int, seqlen: int, heads: int) -> int:
    """For q [batch, seqlen, heads, D]: segments are walked through side by side."""
    chunks = -(-seqlen // CHUNK)
    segments = _RESIDENT // max(1, batch * heads)
    segments = min(segments, chunks // _LEAST_CHUNKS_OF_SEGMENT)
    return -(-chunks // max(1, segments))


def segments(batch: int, seqlen: int, heads: int) -> int:
    """How many segments of so many chunks there are."""
    return -(-seqlen // CHUNK // chunks_of_segment(batch, seqlen, heads))


def pieces_of_segment(batch: int, seqlen: int, heads: int, of_segment: int) -> int:
    """Into how many equal pieces the sums of a segment are cut, to fill the GPU.

    For k [batch, seqlen, heads, D]: all segments but the last have sums.
    """
    segments = -(-seqlen // CHUNK // of_segment)
    blocks = max(1, batch * heads * (segments - 1))
    pieces = range(1, min(_RESIDENT // blocks, of_segment // 4) + 1)
    return max((n for n in pieces if of_segment % n == 0), default=1)


def padded_tokens(seqlen: int) -> int:
    """Tokens of whole chunks."""
    return -(-seqlen // CHUNK) * CHUNK


def most_tiles(seqlen: int) -> int:
    """Tiles of packed documents, at most: two in a row have more than a chunk."""
    return 2 * (seqlen // (CHUNK + 1)) + 1


def unsupported(
    options: HedgehogOptions, q, k, v, q_map, has_state: bool
) -> str | None:
    """What the kernels lack for a call, in words: this is the one place that knows.

    Arrays are whatever has their shapes and dtypes. What it lets through, the kernels
    compute, forward and backward.
    """
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {jnp.dtype(q.dtype).name} (it takes bfloat16 and float16)"
    if options.window != CHUNK:
        return f"a window of {options.window} (it takes {CHUNK})"
    if q_map.shape[-1] != MAP:
        return f"maps of {q_map.shape[-1]} columns (it takes {MAP})"
    for name, dim in (("keys", k.shape[-1]), ("values", v.shape[-1])):
        if dim > MAX_DIM:
            return f"{name} of {dim} dimensions (it takes up to {MAX_DIM})"
    seqlen = q.shape[-3] + (3 * CHUNK if has_state else 0)
    return exceeded_limit(math.prod(q.shape[:-3]), seqlen, q.shape[-2])


def exceeded_limit(batch: int, seqlen: int, heads: int) -> str | None:
    """Which size is beyond the kernels, in words."""
    rows = batch * heads * 2 * padded_tokens(seqlen)  # two slices of values
    for name, size, limit in (
        ("a batch", batch, MAX_GRID),
        ("a number of heads", heads, MAX_GRID),
        ("a B * H * T times slices of 64 values", rows, MAX_ROWS),
    ):
        if size > limit:
            return f"{name} of {size} (it takes up to {limit})"
    return None
