"""Settings of linear attention: what is computed and how."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LinearAttentionOptions:
    """What is computed."""

    scale: float
    normalize: bool


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """How it is computed."""

    chunk: int = 64  # tokens of one step


def unsupported() -> str:
    """What the kernels lack for a call, in words: this is the one place that knows."""
    return "this op yet (it has neither a forward nor a backward kernel)"
