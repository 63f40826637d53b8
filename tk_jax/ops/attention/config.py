"""What a call of attention computes: options, extras, and what kernels take of them.

``KernelOptions`` cross to C++ as one attribute, decoded into the struct of the same
fields in ``cuda/kernels/attention/attention.h``. How it is computed: ``tiling.py``.
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


# Arrays' head dims are multiples of this, since the copy engine reads their rows.
HEAD_DIM_STEP = 8
MAX_HEAD_DIM = 256
# The extras that the kernels take.
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
