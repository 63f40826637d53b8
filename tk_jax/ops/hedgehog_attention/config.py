"""Settings of Hedgehog attention: what is computed and how; its state."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax


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


def unsupported() -> str:
    """What the kernels lack for a call, in words: this is the one place that knows."""
    return "this op yet (it has neither a forward nor a backward kernel)"
