"""Settings of Based attention: what it computes is in LinearAttentionOptions."""

from __future__ import annotations

# The feature dims that it takes: kernels keep a state of num_features rows on chip.
FEATURE_DIMS = (8, 16, 24, 32)


def num_features(dim: int) -> int:
    """Rows of the state: one, ``dim`` linear ones, one for each pair of features."""
    return 1 + dim + dim * (dim + 1) // 2


def unsupported() -> str:
    """What the kernels lack for a call, in words: this is the one place that knows."""
    return "this op yet (it has neither a forward nor a backward kernel)"
