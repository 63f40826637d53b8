"""Settings of linear attention: what is computed (options) and how (configs).

Those from ``ChunkSumsOptions`` on cross to C++ as one attribute each, decoded into the
struct of the same fields: in ``cuda/ffi/linear_attention_kernels.h``, but for
``WalkConfig``, which ``cuda/kernels/linear_attention/linear_attention.h`` has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
STEP_DTYPES = (jnp.float32, *KERNEL_DTYPES)  # of raw steps
# As in linear_attention.h: tokens of a chunk, columns of values of a slice, the largest
# dimension of keys.
CHUNK = 64
PAIR = 2  # chunks that share a stored state
SLICE = 64
MAX_KEY_DIM = 256
HEAD_PARTS = 3
ONES = 2  # more columns of values, where outputs are divided (quotient.py)
# Rows, which the copy engine reads, are padded to multiples of this ...
DIM_STEP = 8
# ... and in tiles to multiples of this.
TILE_STEP = 64
MARKED_ROWS = 16  # of a state, that have one mark
# A logarithm of a decay below this counts as this: it leaves nothing in float32.
LEAST_LOG_DECAY = -128.0
# Grids have up to this many blocks along two of their axes ...
MAX_GRID = 65535
# ... and kernels count rows of the states of chunks in 32 bits.
MAX_ROWS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class LinearAttentionOptions:
    """What is computed."""

    scale: float
    normalize: bool


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """How XLA computes it."""

    chunk: int = 64  # tokens of one step


@dataclasses.dataclass(frozen=True)
class ChunkSumsOptions:
    """What the sums of chunks are: of ``scale * max(x, least)``."""

    seqlen: int  # of x, which may have one token for all
    scale: float
    least: float


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How raw steps become steps, and those the logarithms of decays."""

    softplus: bool
    least: float  # steps
    most: float
    least_log_decay: float


@dataclasses.dataclass(frozen=True)
class StatesOptions:
    """Which states are computed: forward those of keys and values, or gradients."""

    scale: float  # of the keys
    reverse: bool
    chunks_of_segment: int
    stored_every: int  # chunks to a stored state


@dataclasses.dataclass(frozen=True)
class SegmentSumsOptions:
    """What segments add to the state, or with ``reverse`` to its gradient."""

    scale: float  # of the keys
    reverse: bool
    of_all: bool  # or of all but the last, reverse: but the first
    chunks_of_segment: int


@dataclasses.dataclass(frozen=True)
class OutputsOptions:
    """What the outputs are."""

    scale: float  # of the queries
    chunks_of_segment: int


@dataclasses.dataclass(frozen=True)
class SpreadOptions:
    """Into what is spread that is no number: which walk's states, or outputs."""

    reverse: bool
    chunks_of_segment: int
    stored_every: int  # chunks to a stored state; 0 of outputs


@dataclasses.dataclass(frozen=True)
class GradientsOptions:
    """Of what the gradients are."""

    scale: float  # of the queries


@dataclasses.dataclass(frozen=True)
class WalkConfig:
    """How the kernels that walk through a sequence do it."""

    # Slices of values of a block, which share their keys: 1 or 2.
    consumers: int
    stages: int  # depth of the ring of chunks
    # 1 where a warpgroup more makes the scores: in outputs alone, for keys of up to 128
    # dimensions; those of two slices have it always.
    helpers: int = 0


@dataclasses.dataclass(frozen=True)
class GradientsConfig:
    """How the kernel of gradients computes them."""

    stages: int  # depth of the ring of slices
    key_stages: int  # depth of that of groups' keys


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """How all of a call's kernels run."""

    chunks_of_segment: int  # segments of a sequence are walked through side by side
    states: WalkConfig
    outputs: WalkConfig
    gradients: GradientsConfig


# Multiprocessors of an H100 or H200.
_MULTIPROCESSORS = 132
# With fewer chunks to a segment, what a second pass and the first state cost is more
# than what is won.
_LEAST_CHUNKS_OF_SEGMENT = 4
# Measured on an H100 (docs/kernels/linear_attention.md), in us: a chunk's step of one
# consumer on a multiprocessor, before it had a helper, of two blocks of one on one, and
# of two of a block, which have a helper; and the bytes that passes move in a
# microsecond. What a second pass costs beside its work is 14 us, and here 3 more: the
# backward pass has two, and wins less by them.
_STEP_US = {1: 1.5, 2: 2.35}
_PAIR_STEP_US = 2.07
_SECOND_PASS_US = 17.0
_BYTES_PER_US = 2.6e6
# Up to this dimension of keys' tiles, two blocks of one consumer, or one of two, fit.
_NARROW_KEYS = 128
# Shared memory of a block and how much of it linear_attention.h keeps for other things.
_SHARED_BYTES = 227 * 1024
_SHARED_SLACK = 2048


# Dimensions of keys, and blocks of outputs, of kernels compiled ahead and gated ...
KERNEL_KEY_DIMS = (
    *((dim, block) for dim in (64, 128) for block in ("alone", "helped", "pair")),
    (256, "alone"),
)
# ... of sizes (batch, seqlen, groups, heads) that ask for a slice without a helper, for
# one with a helper where keys are narrow, or for two ...
SIZES_OF_BLOCKS = {
    "alone": (8, 4096, 11, 33),
    "helped": (1, 1, 1, 1),
    "pair": (8, 4096, 1, 32),
}
# ... and the features they are compiled with: those of linear_attention, and of ssd.
KERNEL_FEATURES = ((), ("weights",), ("weights", "skip"))


# Kernels that do not depend on dimensions: between segments, of gates, and of steps.
SEGMENT_KERNELS = ("segment_starts", "spread_states", "spread_out")
GATE_KERNELS = ("chunk_sums", "gate_gradients")
STEP_KERNELS = ("step_gates", "step_gradients", "head_sums")


def kernels(config: ScanConfig, features: Iterable[str]):
    """The kernels of a call: their names, features and configs (None: it has none)."""
    taken = {
        "states": {"weights", "counts"},
        "reverse_states": {"counts"},
        "segment_sums": {"weights", "counts"},
        "reverse_segment_sums": {"counts"},
        "outputs": {"weights", "counts", "skip"},
        "gradients": {"weights", "counts", "skip"},
    }
    configs = {
        "states": config.states,
        "reverse_states": config.states,
        "segment_sums": config.states,
        "reverse_segment_sums": config.states,
        "outputs": config.outputs,
        "gradients": config.gradients,
    }
    for name, offered in taken.items():
        yield name, [x for x in features if x in offered], configs[name]
    others = SEGMENT_KERNELS + GATE_KERNELS
    for name in others + (STEP_KERNELS if "weights" in features else ()):
        yield name, [], None


def scan_config(
    batch: int, seqlen: int, groups: int, heads: int, key_dim: int, value_dim: int
) -> ScanConfig:
    """For q [batch, seqlen, groups, key_dim] and v [.., heads, value_dim].

    Segments walk side by side, at the price of another pass over keys and values: of
    the numbers of segments that fill the multiprocessors, with one consumer on each or
    with two, that of the least predicted time of the forward pass.
    """
    tile = round_up(key_dim, TILE_STEP)
    narrow = tile <= _NARROW_KEYS
    slices = heads * -(-value_dim // SLICE)
    chunks = -(-seqlen // CHUNK)
    key_bytes = 2 * batch * seqlen * groups * key_dim
    value_bytes = 2 * batch * seqlen * heads * value_dim
    # Two slices of a group share a block and its keys.
    shared = 2 if narrow and slices // groups % 2 == 0 else 1

    def predicted_us(on_each: int, segments: int) -> float:
        room = _MULTIPROCESSORS * on_each
        waves = -(-batch * slices * segments // room)
        steps = waves * -(-chunks // segments)
        step = _PAIR_STEP_US if on_each == shared == 2 else _STEP_US[on_each]
        step *= 1 if narrow else 2
        moved = 2 * (key_bytes + value_bytes)
        us = max(steps * step, moved / _BYTES_PER_US)
        if segments == 1:
            return us
        again = (key_bytes + value_bytes) * (segments - 1) / segments
        return us + again / _BYTES_PER_US + _SECOND_PASS_US

    def most_segments(on_each: int) -> int:
        blocks = max(1, batch * slices)
        room = _MULTIPROCESSORS * on_each // blocks
        return max(1, min(room, chunks // _LEAST_CHUNKS_OF_SEGMENT))

    options = [
        (on_each, segments)
        for on_each in ((1, 2) if narrow else (1,))
        for segments in range(1, most_segments(on_each) + 1)
    ]
    on_each, segments = min(options, key=lambda option: predicted_us(*option))
    consumers = shared if on_each == 2 else 1
    # What fits; one consumer alone has little else to hide what loads take, and room
    # for a helper.
    helpers = 1 if narrow and (consumers == 2 or on_each == 1) else 0
    stages = 3 if helpers else 2
    return ScanConfig(
        chunks_of_segment=-(-chunks // segments),
        states=WalkConfig(consumers=consumers, stages=3),
        outputs=WalkConfig(consumers=consumers, stages=stages, helpers=helpers),
        gradients=_gradients_config(tile),
    )


def _gradients_config(tile: int) -> GradientsConfig:
    """Two stages of both rings where they fit."""
    for stages, key_stages in ((2, 2), (2, 1)):
        if gradients_shared_bytes(tile, stages, key_stages) <= _SHARED_BYTES:
            return GradientsConfig(stages, key_stages)
    return GradientsConfig(1, 1)


def gradients_shared_bytes(tile: int, stages: int, key_stages: int) -> int:
    """As gradients_shared_bytes in linear_attention.h."""
    stage = 2 * CHUNK * 3 * SLICE + 2 * SLICE * 2 * tile + 2048
    keys = 2 * CHUNK * 3 * tile
    return key_stages * keys + stages * stage + 2 * CHUNK * SLICE + _SHARED_SLACK


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def padded_tokens(seqlen: int) -> int:
    """Tokens of whole chunks."""
    return round_up(seqlen, CHUNK)


def unsupported(q, v, *, normalize: bool = False) -> str | None:
    """What the kernels lack for a call, in words: this is the one place that knows.

    ``q`` and ``v`` are whatever has their shape [..., T, G, K] and [..., T, H, V], and
    their dtype. What it lets through, the kernels compute, forward and backward.
    """
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {jnp.dtype(q.dtype).name} (it takes bfloat16 and float16)"
    if q.shape[-1] > MAX_KEY_DIM:
        return f"keys of {q.shape[-1]} dimensions (it takes up to {MAX_KEY_DIM})"
    if normalize and q.dtype == jnp.float16:
        return "normalize in float16 (of which the sums may exceed the range)"
    return exceeded_limit((*v.shape[:-1], v.shape[-1] + ONES * normalize))


def exceeded_limit(v_shape) -> str | None:
    """Which size is beyond the kernels, in words."""
    *leading, seqlen, heads, value_dim = v_shape
    batch = math.prod(leading)
    columns = heads * round_up(value_dim, SLICE)
    rows = batch * columns // SLICE * padded_tokens(seqlen)
    for name, size, limit in (
        ("a batch", batch, MAX_GRID),
        ("a number of heads", heads, 16 * MAX_GRID),
        ("a number of heads times dimensions of values", columns, MAX_ROWS),
        ("a B * H * T times slices of 64 values", rows, MAX_ROWS),
    ):
        if size > limit:
            return f"{name} of {size} (it takes up to {limit})"
    return None
