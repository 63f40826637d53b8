"""Settings of attention: what is computed (options) and how (configs).

Each dataclass crosses to C++ as one attribute, decoded into the struct of the same fields
in ``cuda/kernels/attention/attention.h``.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
# Workspace rows are padded to this (kQueryPadding in attention.h) ...
QUERY_PADDING = 128
# ... and dq is accumulated in fragments of this many rows (kFragmentRows).
FRAGMENT_ROWS = 64


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What is computed."""

    scale: float
    is_causal: bool
    bottom_right: bool
    deterministic: bool

    def causal_offset(self, seqlen_q: int, seqlen_kv: int) -> int:
        """Query i sees key j only if j <= i + this."""
        return seqlen_kv - seqlen_q if self.bottom_right else 0


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
    block_kv: int  # keys of a tile: 64 for each consumer warpgroup
    stages: int  # depth of the query/dout ring


# The head dims that the kernels support, with their tiles.
_FORWARD = {
    64: AttentionForwardConfig(block_q=192, block_kv=128, stages=2),
    128: AttentionForwardConfig(block_q=128, block_kv=128, stages=2),
}
_BACKWARD = {
    64: AttentionBackwardConfig(block_q=128, block_kv=128, stages=2),
    128: AttentionBackwardConfig(block_q=64, block_kv=128, stages=2),
}
KERNEL_HEAD_DIMS = tuple(_FORWARD)


def forward_config(head_dim: int) -> AttentionForwardConfig:
    return _FORWARD[head_dim]


def backward_config(head_dim: int) -> AttentionBackwardConfig:
    return _BACKWARD[head_dim]


def padded_queries(seqlen_q: int) -> int:
    """Rows of the backward pass's workspaces."""
    return -(-seqlen_q // QUERY_PADDING) * QUERY_PADDING
