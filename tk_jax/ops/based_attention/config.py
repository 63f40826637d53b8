"""Settings of Based attention: what it computes is in LinearAttentionOptions."""

from __future__ import annotations

# The feature dims that it takes: their states are what a kernel can keep on chip.
FEATURE_DIMS = (8, 16, 24, 32)


def unsupported() -> str:
    """What the kernels lack for a call, in words: this is the one place that knows."""
    return "this op yet (it has neither a forward nor a backward kernel)"
