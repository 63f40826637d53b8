"""Which tiles the kernels of attention have: how a call is computed.

Each config crosses to C++ as one attribute, decoded into the struct of the same fields
in ``cuda/kernels/attention/attention.h``. What is chosen was measured, and compiles
without spills: ``docs/kernels/attention.md``, ``tests/test_compile_gate.py``.
"""

from __future__ import annotations

import dataclasses

from tk_jax.ops.attention import config

# Queries of a tile of dq's own kernel (kWideDqBlockQ).
WIDE_DQ_BLOCK_Q = 128
# Queries and keys of a tile of a bias's gradient (kBiasBlockQ, kBiasBlockKv).
BIAS_BLOCK_Q, BIAS_BLOCK_KV = 128, 64

# Tiles have head dims that are multiples of this (kHeadDimStep in attention.h).
TILE_HEAD_DIM_STEP = 64
# Of q and k, and of v: those whose kernels are compiled ahead and gated, of all that
# there are.
KERNEL_HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256))


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


def _tile(block_q: int, block_kv: int, stages: int = 2) -> AttentionForwardConfig:
    return AttentionForwardConfig(block_q, block_kv, stages)


# Tiles by the head dims of q and k, and of v. Two stages of 80 keys at 256 are all the
# shared memory, and beside 128 registers of out all the registers.
_FORWARD = {
    (64, 64): _tile(192, 128),
    (128, 128): _tile(128, 128),
    (192, 192): _tile(128, 112),
    (256, 256): _tile(128, 80),
}
# Of other pairs, those of the larger of both, if that is more than 128.
_FORWARD_MIXED = _tile(128, 128)
_FORWARD |= {(192, 128): _FORWARD_MIXED, (128, 192): _FORWARD_MIXED}
# Wider blocks mean fewer barriers for the same work, but more of it beyond a diagonal
# and in the last block: they pay off over many keys that all queries see.
_FORWARD_MANY_KEYS = {(128, 128): _tile(128, 160)}
_MANY_KEYS = 8192
# A third of a tile of 192 queries has nothing to do where there are 128.
_FORWARD_FEW_CAUSAL_KEYS = {(64, 64): _tile(128, 128, stages=3)}
_FEW_CAUSAL_KEYS = 128
# Masks take registers too.
_FORWARD_MASKED = {(256, 256): _tile(128, 64)}
# Two diagonals take even more, of three consumers.
_FORWARD_BAND = {(64, 64): _FORWARD_MIXED}

# And so do features. A bias that the copy engine brings takes shared memory, but few
# registers, ...
_TILED_BIAS = {
    64: _tile(192, 128),
    128: _tile(128, 128),
    192: _tile(128, 96),
    256: _tile(128, 64),
}
# ... more of it in fp32, ...
_TILED_FLOAT_BIAS = {
    64: _tile(192, 96),
    128: _tile(128, 96),
    192: _tile(128, 64),
    256: _tile(128, 64),
}
# ... one in pairs half as many registers as scores, ...
_PAIRED_BIAS = {
    64: _tile(192, 96),
    128: _tile(128, 128),
    192: _tile(128, 96),
    (192, 128): _tile(128, 112),
    256: _tile(128, 64),
    (256, "none"): _tile(128, 80),
}
# ... and one that is read number by number as many.
_BIAS = {
    64: _tile(128, 96),
    128: _tile(128, 96),
    192: _tile(128, 64),
    256: _tile(128, 48),
}
# The first of these that a call has all of, and that has tiles for both head dims, for
# the larger one beside a mask (one of config.KERNEL_MASKS), from so many keys on or for
# any number, or for the larger one. The maps of segments and masks are those of
# documents' ends, too: they are finer in tiles of 128 queries than of 192.
_FORWARD_FEATURES = (
    ({"tiledbias", "segments"}, {64: _tile(128, 128)}),
    (
        {"tiledbias", "mask", "floatbias"},
        _TILED_FLOAT_BIAS | {64: _tile(128, 128), (192, 128): _tile(128, 96)},
    ),
    ({"tiledbias", "mask"}, _TILED_BIAS | {64: _tile(192, 96)}),
    ({"tiledbias", "softcap", "floatbias"}, {64: _tile(128, 96)}),
    ({"tiledbias", "softcap"}, {64: _tile(192, 96)}),
    ({"tiledbias", "lengths"}, {(64, "band"): _tile(192, 96)}),
    (
        {"tiledbias", "floatbias"},
        _TILED_FLOAT_BIAS | {(192, 128): _tile(128, 96)},
    ),
    ({"tiledbias"}, _TILED_BIAS),
    ({"pairedbias", "floatbias"}, _BIAS | {192: _tile(128, 80)}),
    (
        {"pairedbias", "mask"},
        _BIAS | {64: _tile(128, 128), 256: _tile(128, 64)},
    ),
    ({"pairedbias", "segments"}, {64: _tile(128, 128)}),
    (
        {"pairedbias", "softcap"},
        {64: _tile(192, 80), (256, "causal"): _tile(128, 48)},
    ),
    ({"pairedbias"}, _PAIRED_BIAS),
    ({"bias"}, _BIAS),
    ({"mask", "segments"}, {64: _tile(128, 128)}),
    (
        {"mask"},
        {
            (64, "band"): _tile(128, 128),
            64: _tile(192, 128),
            128: _tile(128, 128),
            192: _tile(128, 96),
            256: _tile(128, 80),
        },
    ),
    (
        {"segments"},
        {64: _tile(128, 128), 128: _tile(128, 128), 256: _tile(128, 64)},
    ),
    (
        {"softcap", "lengths"},
        {
            (64, "none"): _tile(192, 112),
            (64, "causal"): _tile(192, 128),
            128: _tile(128, 128),
            256: _tile(128, 64),
        },
    ),
    (
        {"softcap"},
        {
            (64, "none"): _tile(192, 96),
            (64, "causal"): _tile(192, 96),
            (128, "none", _MANY_KEYS): _tile(128, 160),
            128: _tile(128, 128),
            (256, "none"): _tile(128, 80),
            256: _tile(128, 64),
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


def forward_config(
    head_dim: int,
    head_dim_v: int,
    seqlen_kv: int,
    mask: str = "none",
    features: frozenset[str] = frozenset(),
) -> AttentionForwardConfig:
    """``mask`` is one of config.KERNEL_MASKS; the head dims are those of arrays."""
    tile = tile_head_dim(head_dim), tile_head_dim(head_dim_v)
    larger = max(tile)
    keys = [tile, (larger, mask), larger]
    if seqlen_kv >= _MANY_KEYS:
        keys.insert(1, (larger, mask, _MANY_KEYS))
    for needed, tiles in _FORWARD_FEATURES:
        for key in keys:
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
    takes_more = features & {"segments", "mask", "bias"}
    crowded = head_dim == config.MAX_HEAD_DIM and takes_more
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
