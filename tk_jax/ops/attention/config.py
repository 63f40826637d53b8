"""Settings of attention: what is computed (options, extras) and how (configs).

``KernelOptions`` and each config cross to C++ as one attribute, decoded into the struct
of the same fields in ``cuda/kernels/attention/attention.h``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
# The kernels' grids take up to this many batch elements and heads ...
MAX_GRID = 65535
# ... and they count rows, of all batch elements and heads, in 32 bits.
MAX_ROWS = 2**31 - 1
# Workspace rows are padded to this (kQueryPadding in attention.h) ...
QUERY_PADDING = 128
# ... and dq is accumulated in fragments of this many rows (kFragmentRows).
FRAGMENT_ROWS = 64
# Queries of a tile of dq's own kernel (kWideDqBlockQ).
WIDE_DQ_BLOCK_Q = 128
# Queries and keys of a tile of a bias's gradient (kBiasBlockQ, kBiasBlockKv).
BIAS_BLOCK_Q, BIAS_BLOCK_KV = 128, 64

# What AttentionOptions holds where there is no window, and no cap.
NO_WINDOW = -1
NO_SOFT_CAP = 0.0


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What is computed."""

    scale: float
    is_causal: bool
    bottom_right: bool
    deterministic: bool
    window_left: int = NO_WINDOW
    window_right: int = NO_WINDOW
    soft_cap: float = NO_SOFT_CAP

    @property
    def left(self) -> int | None:
        """A query at position p sees key j only if j >= p - this."""
        return None if self.window_left == NO_WINDOW else self.window_left

    @property
    def right(self) -> int | None:
        """A query at position p sees key j only if j <= p + this."""
        if self.is_causal:
            return 0
        return None if self.window_right == NO_WINDOW else self.window_right

    def offset(self, seqlen_q, seqlen_kv):
        """Query i is at position i + this among the keys."""
        return seqlen_kv - seqlen_q if self.bottom_right else 0

    @property
    def mask(self) -> str:
        """Which of KERNEL_MASKS the kernels run."""
        if self.left is not None:
            return "band"
        return "none" if self.right is None else "causal"

    def for_kernel(self) -> KernelOptions:
        """The part that the kernels know."""
        names = (field.name for field in dataclasses.fields(KernelOptions))
        return KernelOptions(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """What is computed, as far as the kernels know it; ``Options`` in C++."""

    scale: float
    is_causal: bool
    bottom_right: bool
    deterministic: bool
    window_left: int
    window_right: int
    soft_cap: float


class Extras(NamedTuple):
    """The arrays of a call beside q, k and v; None where there is none.

    With q [*batch, T, H, D] each has the rank below. Where *b stands for *batch, and
    in the axes of mask and bias, a size may also be 1, for all.
    """

    query_seq_lengths: jax.Array | None = None  # int32 [*b], from 0 to T
    key_value_seq_lengths: jax.Array | None = None  # int32 [*b], from 0 to S
    q_segment_ids: jax.Array | None = None  # int32 [*b, T], with kv_segment_ids
    kv_segment_ids: jax.Array | None = None  # int32 [*b, S], with q_segment_ids
    mask: jax.Array | None = None  # bool [*b, H, T, S]
    bias: jax.Array | None = None  # floating [*b, H, T, S]
    sinks: jax.Array | None = None  # floating [*b, H]


def features(options: AttentionOptions, extras: Extras, dtype) -> frozenset[str]:
    """What a call's kernels are compiled for beyond its mask (Feature in C++).

    ``dtype`` is that of q.
    """
    bias = extras.bias
    lengths = (extras.query_seq_lengths, extras.key_value_seq_lengths)
    tiled = (
        bias is not None
        and bias.shape[-2] > 1
        and bias.shape[-1] * (2 if bias.dtype == dtype else 4) % 16 == 0
    )
    names = {
        "lengths": any(x is not None for x in lengths),
        "segments": extras.q_segment_ids is not None,
        "mask": extras.mask is not None,
        "bias": bias is not None,
        "softcap": options.soft_cap != NO_SOFT_CAP,
        # Any other dtype than q's goes to the kernels in float32.
        "floatbias": bias is not None and bias.dtype != dtype,
        # The copy engine brings the forward kernel rows of whole 16 bytes, which may be
        # queries' own alone; or it reads two keys at once.
        "tiledbias": tiled,
        "pairedbias": bias is not None and not tiled and bias.shape[-1] % 2 == 0,
    }
    return frozenset(name for name, wanted in names.items() if wanted)


@dataclasses.dataclass(frozen=True)
class AttentionForwardConfig:
    """How the forward kernel computes it."""

    block_q: int  # query rows of a tile: 64 for each consumer warpgroup
    block_kv: int  # keys of one step
    stages: int  # depth of the key/value ring


@dataclasses.dataclass(frozen=True)
class AttentionBackwardConfig:
    """How the backward kernel computes it."""

    block_q: int  # query rows of one step
    # Keys of a tile: 64 for each consumer warpgroup; in the wide kernels, for each
    # block of a cluster of one or two.
    block_kv: int
    stages: int  # depth of the query/dout ring
    # Of the wide kernels, where dq has a kernel of its own.
    dq_block_kv: int = 0  # keys of one step
    dq_stages: int = 0  # depth of its key/value ring


# Tiles have head dims that are multiples of this (kHeadDimStep in attention.h) up to
# MAX_HEAD_DIM; arrays, whose rows the copy engine reads, multiples of HEAD_DIM_STEP.
TILE_HEAD_DIM_STEP = 64
HEAD_DIM_STEP = 8
MAX_HEAD_DIM = 256

# Tiles by the head dims of q and k, and of v.
_FORWARD = {
    (64, 64): AttentionForwardConfig(block_q=192, block_kv=128, stages=2),
    (128, 128): AttentionForwardConfig(block_q=128, block_kv=128, stages=2),
    (192, 192): AttentionForwardConfig(block_q=128, block_kv=112, stages=2),
    # Two stages of 80 keys are all the shared memory, and beside 128 registers of out
    # all the registers.
    (256, 256): AttentionForwardConfig(block_q=128, block_kv=80, stages=2),
}
# Of other pairs, those of the larger of both, if that is more than 128.
_FORWARD_MIXED = AttentionForwardConfig(block_q=128, block_kv=128, stages=2)
_FORWARD |= {(192, 128): _FORWARD_MIXED, (128, 192): _FORWARD_MIXED}
# Wider blocks mean fewer barriers for the same work, but more of it beyond a diagonal
# and in the last block: they pay off over many keys that all queries see.
_FORWARD_MANY_KEYS = {
    (128, 128): AttentionForwardConfig(block_q=128, block_kv=160, stages=2),
}
_MANY_KEYS = 8192
# A third of a tile of 192 queries has nothing to do where there are 128.
_FORWARD_FEW_CAUSAL_KEYS = {
    (64, 64): AttentionForwardConfig(block_q=128, block_kv=128, stages=3),
}
_FEW_CAUSAL_KEYS = 128
# Masks take registers too.
_FORWARD_MASKED = {
    (256, 256): AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
}
# Two diagonals take even more, of three consumers.
_FORWARD_BAND = {(64, 64): _FORWARD_MIXED}
# And so do features: the first of these that a call has all of, and that has tiles for
# both head dims, for the larger one beside a mask (one of KERNEL_MASKS), or for that.
_FORWARD_FEATURES = (
    # A bias that the copy engine brings takes shared memory, but few registers. The
    # maps of segments and masks are those of documents' ends, too: they are finer in
    # tiles of 128 queries than of 192.
    ({"tiledbias", "segments"}, {64: _FORWARD_MIXED}),
    (
        {"tiledbias", "mask", "floatbias"},
        {
            64: AttentionForwardConfig(block_q=192, block_kv=96, stages=2),
            128: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            192: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
    (
        {"tiledbias", "mask"},
        {
            64: AttentionForwardConfig(block_q=192, block_kv=96, stages=2),
            128: _FORWARD_MIXED,
            192: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
    (
        {"tiledbias", "softcap", "floatbias"},
        {64: AttentionForwardConfig(block_q=128, block_kv=96, stages=2)},
    ),
    (
        {"tiledbias", "softcap"},
        {64: AttentionForwardConfig(block_q=192, block_kv=96, stages=2)},
    ),
    (
        {"tiledbias", "lengths"},
        {(64, "band"): AttentionForwardConfig(block_q=192, block_kv=96, stages=2)},
    ),
    (
        {"tiledbias", "floatbias"},
        {
            64: AttentionForwardConfig(block_q=192, block_kv=96, stages=2),
            128: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            192: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
            (192, 128): AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
    (
        {"tiledbias"},
        {
            64: AttentionForwardConfig(block_q=192, block_kv=128, stages=2),
            128: _FORWARD_MIXED,
            192: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
    # A bias in pairs is a tile of half as many registers as scores, one of fp32 of as
    # many.
    (
        {"pairedbias", "floatbias"},
        {
            64: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            128: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            192: AttentionForwardConfig(block_q=128, block_kv=80, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=48, stages=2),
        },
    ),
    (
        {"pairedbias", "mask"},
        {
            64: _FORWARD_MIXED,
            128: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            192: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
    ({"pairedbias", "segments"}, {64: _FORWARD_MIXED}),
    (
        {"pairedbias", "softcap"},
        {64: AttentionForwardConfig(block_q=192, block_kv=80, stages=2)},
    ),
    (
        {"pairedbias"},
        {
            64: AttentionForwardConfig(block_q=192, block_kv=96, stages=2),
            128: _FORWARD_MIXED,
            192: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            (192, 128): AttentionForwardConfig(block_q=128, block_kv=112, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
            (256, "none"): _FORWARD[256, 256],
        },
    ),
    # Read number by number.
    (
        {"bias"},
        {
            64: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            128: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            192: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
            256: AttentionForwardConfig(block_q=128, block_kv=48, stages=2),
        },
    ),
    ({"mask", "segments"}, {64: _FORWARD_MIXED}),
    (
        {"mask"},
        {
            (64, "band"): _FORWARD_MIXED,
            64: _FORWARD[64, 64],
            128: _FORWARD_MIXED,
            192: AttentionForwardConfig(block_q=128, block_kv=96, stages=2),
            256: _FORWARD[256, 256],
        },
    ),
    (
        {"segments"},
        {
            64: _FORWARD_MIXED,
            128: _FORWARD_MIXED,
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
    ({"softcap", "lengths"}, {(64, "causal"): _FORWARD[64, 64]}),
    (
        {"softcap"},
        {
            (64, "none"): AttentionForwardConfig(block_q=192, block_kv=112, stages=2),
            (64, "causal"): AttentionForwardConfig(block_q=192, block_kv=112, stages=2),
            128: _FORWARD_MIXED,
            256: AttentionForwardConfig(block_q=128, block_kv=64, stages=2),
        },
    ),
)
# By narrow_head_dim.
_BACKWARD = {
    64: AttentionBackwardConfig(block_q=128, block_kv=128, stages=2),
    128: AttentionBackwardConfig(block_q=64, block_kv=128, stages=2),
}
# A cap or a bias takes more registers than two consumers at 128 queries have: one at
# 64, and two such blocks on a multiprocessor.
_BACKWARD_ONE_CONSUMER = AttentionBackwardConfig(block_q=64, block_kv=64, stages=2)
_BACKWARD_FEATURES = {
    "bias": {64: _BACKWARD_ONE_CONSUMER},
    "softcap": {64: _BACKWARD_ONE_CONSUMER},
}
# Shared memory of a block, and how much of it attention.h keeps for other things.
_SHARED_BYTES = 227 * 1024
_SHARED_SLACK = 2048
# Of q and k, and of v: those whose kernels are compiled ahead and gated, of all that
# there are.
KERNEL_HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256))
# The extras that they take.
KERNEL_EXTRAS = (
    "query_seq_lengths",
    "key_value_seq_lengths",
    "q_segment_ids",
    "kv_segment_ids",
    "mask",
    "bias",
    "sinks",
)
# Their masks, and so their specialisations: keys up to a diagonal, or between two.
KERNEL_MASKS = ("none", "causal", "band")


def forward_config(
    head_dim: int,
    head_dim_v: int,
    seqlen_kv: int,
    mask: str = "none",
    features: frozenset[str] = frozenset(),
) -> AttentionForwardConfig:
    """``mask`` is one of KERNEL_MASKS; the head dims are those of arrays."""
    tile = tile_head_dim(head_dim), tile_head_dim(head_dim_v)
    larger = max(tile)
    for needed, tiles in _FORWARD_FEATURES:
        for key in (tile, (larger, mask), larger):
            if needed <= features and key in tiles:
                return tiles[key]
    few_keys = mask == "causal" and seqlen_kv <= _FEW_CAUSAL_KEYS
    if few_keys and tile in _FORWARD_FEW_CAUSAL_KEYS:
        return _FORWARD_FEW_CAUSAL_KEYS[tile]
    if mask == "band" and tile in _FORWARD_BAND:
        return _FORWARD_BAND[tile]
    if mask != "none" and tile in _FORWARD_MASKED:
        return _FORWARD_MASKED[tile]
    if mask == "none" and seqlen_kv >= _MANY_KEYS and tile in _FORWARD_MANY_KEYS:
        return _FORWARD_MANY_KEYS[tile]
    if tile in _FORWARD:
        return _FORWARD[tile]
    return _FORWARD_MIXED if larger <= 128 else _FORWARD[larger, larger]


def forward_configs(
    head_dim: int, head_dim_v: int, mask: str
) -> tuple[AttentionForwardConfig, ...]:
    """All that forward_config can choose."""
    return tuple(
        dict.fromkeys(
            forward_config(head_dim, head_dim_v, keys, mask)
            for keys in (1, _FEW_CAUSAL_KEYS + 1, _MANY_KEYS)
        )
    )


def tile_head_dim(head_dim: int) -> int:
    return -(-head_dim // TILE_HEAD_DIM_STEP) * TILE_HEAD_DIM_STEP


def narrow_head_dim(head_dim: int, head_dim_v: int) -> int | None:
    """The head dim of the tiles, of q as of v; None where the wide kernels run."""
    larger = max(tile_head_dim(head_dim), tile_head_dim(head_dim_v))
    return larger if larger <= 128 else None


def backward_config(
    head_dim: int, head_dim_v: int, features: frozenset[str] = frozenset()
) -> AttentionBackwardConfig:
    """The head dims are those of arrays."""
    narrow = narrow_head_dim(head_dim, head_dim_v)
    if narrow is None:
        tile = tile_head_dim(head_dim), tile_head_dim(head_dim_v)
        return _wide_backward_config(*tile, features)
    for feature, tiles in _BACKWARD_FEATURES.items():
        if feature in features and narrow in tiles:
            return tiles[narrow]
    return _BACKWARD[narrow]


def _wide_backward_config(
    head_dim: int, head_dim_v: int, features: frozenset[str]
) -> AttentionBackwardConfig:
    """Rings as deep as fits, up to three stages."""
    row = 2 * (head_dim + head_dim_v)
    room = _SHARED_BYTES - _SHARED_SLACK
    block_q = 64
    resident = 64 * row + 2 * 64 * block_q  # k, v and p
    stages = min(3, (room - resident) // (block_q * (row + 8)))
    # 64 keys a step, unless two stages do not fit beside 128 rows of q and dout, or dq
    # and a feature leave too few registers.
    room -= WIDE_DQ_BLOCK_Q * row
    crowded = head_dim == MAX_HEAD_DIM and features & {"segments", "mask", "bias"}
    dq_block_kv = 48 if crowded or 2 * 64 * row > room else 64
    if features >= {"bias", "softcap"}:
        dq_block_kv -= 16
    return AttentionBackwardConfig(
        block_q=block_q,
        # With two stages, blocks of a cluster wait for each other more than they save.
        block_kv=128 if stages > 2 else 64,
        stages=stages,
        dq_block_kv=dq_block_kv,
        dq_stages=min(3, room // (dq_block_kv * row)),
    )


def padded_queries(seqlen_q: int) -> int:
    """Rows of the backward pass's workspaces."""
    return -(-seqlen_q // QUERY_PADDING) * QUERY_PADDING


def unsupported(options: AttentionOptions, q, k, v, extras: Extras) -> str | None:
    """What the kernels lack for a call, in words.

    ``q``, ``k`` and ``v`` are whatever has their shape and dtype. This is the one place
    that knows: what it lets through, the kernels compute, forward and backward.
    """
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {jnp.dtype(q.dtype).name} (it takes bfloat16 and float16)"
    if unknown := symbolic_size(*q.shape, *k.shape, *v.shape):
        return unknown
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    for dim, owner in ((head_dim, ""), (head_dim_v, " of v")):
        if dim % HEAD_DIM_STEP or dim > MAX_HEAD_DIM:
            known = f"multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
            return f"head dim {dim}{owner} (it takes {known})"
    for name, value in extras._asdict().items():
        if value is not None and name not in KERNEL_EXTRAS:
            return name
    return exceeded_limit(q.shape, k.shape)


def symbolic_size(*sizes) -> str | None:
    """A size that ``jax.export`` leaves open, in words; limits cannot be checked."""
    for size in sizes:
        if not isinstance(size, int | np.integer):
            return f"the symbolic size {size} (it takes sizes that are numbers)"
    return None


def exceeded_limit(q_shape, k_shape) -> str | None:
    """Which size is beyond the kernels, in words."""
    if unknown := symbolic_size(*q_shape, *k_shape):
        return unknown
    *leading, seqlen_q, num_heads, _ = q_shape
    seqlen_kv, num_kv_heads = k_shape[-3:-1]
    batch = math.prod(leading)
    for name, size, limit in (
        ("a batch", batch, MAX_GRID),
        ("a number of heads", num_heads, MAX_GRID),
        ("a B * H * T", batch * num_heads * padded_queries(seqlen_q), MAX_ROWS),
        ("a B * K * S", batch * num_kv_heads * seqlen_kv, MAX_ROWS),
    ):
        if size > limit:
            return f"{name} of {size} (it takes up to {limit})"
    return None
