"""The state-space dual in XLA operations: chunks of linear attention.

``C`` are the queries, ``B`` the keys, ``dt * x`` the values and ``dt * A`` the
logarithms of the decays (Dao and Gu, "Transformers are SSMs", 2024, section 6). The
products of C and B are made once for all heads of a group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tk_jax.ops import _chunks
from tk_jax.ops.linear_attention import chunk as chunks
from tk_jax.ops.ssd.config import SsdConfig, SsdOptions


class Inputs(NamedTuple):
    """The arrays of a call; the last six may be None."""

    x: jax.Array  # [*batch, T, H, P]
    dt: jax.Array  # [*batch, T, H]
    A: jax.Array  # [H]
    B: jax.Array  # [*batch, T, G, N]
    C: jax.Array  # [*batch, T, G, N]
    state: jax.Array  # [*batch, H, P, N]
    D: jax.Array | None  # [H] or [H, P]
    z: jax.Array | None  # [*batch, T, H, P]
    dt_bias: jax.Array | None  # [H]
    segment_ids: jax.Array | None  # int32, broadcast to [*batch, T]


def ssd(
    options: SsdOptions,
    inputs: Inputs,
    config: SsdConfig = SsdConfig(),  # noqa: B008 (frozen)
):
    """Returns y [*batch, T, H, P] and the final state; differentiable to any order.

    Between the passes nothing is kept but the arguments: the backward pass computes the
    states at the starts of chunks again, and keeps them while it runs.
    """
    return _chunks.recomputed(functools.partial(_folded, options, config))(inputs)


def step_sizes(options: SsdOptions, dt, dt_bias, dtype):
    """The steps that the recurrence takes, from ``dt`` as the caller has it."""
    dt = dt.astype(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)
    if options.dt_softplus:
        dt = jax.nn.softplus(dt)
    # Not jnp.clip, which halves the gradient of a dt at a limit, such as dt = 0.
    dt = jnp.where(dt < options.dt_min, options.dt_min, dt)
    return jnp.where(dt > options.dt_max, options.dt_max, dt)


def _folded(options, config, inputs):
    x, B = inputs.x, inputs.B
    *batch, seqlen, num_heads, _ = x.shape
    groups = B.shape[-2]
    heads = (groups, num_heads // groups)
    dtype = _chunks.sum_dtype(x.dtype)

    def split_heads(x, num_last=1):
        """[*batch, ..., H, ...] -> [B, ..., G, R, ...], with ``num_last`` axes last"""
        axis = x.ndim - 1 - num_last
        x = x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])
        return _chunks.fold(x, len(batch))

    dt = step_sizes(options, inputs.dt, inputs.dt_bias, dtype)
    arrays = {
        "x": split_heads(x),
        "dt": split_heads(dt, 0),
        "B": _chunks.fold(B, len(batch)),
        "C": _chunks.fold(inputs.C, len(batch)),
    }
    if inputs.z is not None:
        arrays["z"] = split_heads(inputs.z)
    if inputs.segment_ids is not None:
        starts = _chunks.segment_starts(inputs.segment_ids, (*batch, seqlen))
        arrays["starts"] = _chunks.fold(starts, len(batch))
    A = inputs.A.astype(dtype).reshape(heads)
    D = None
    if inputs.D is not None:
        D = inputs.D.astype(dtype).reshape(*heads, -1)
    carry = chunks.State(jnp.swapaxes(split_heads(inputs.state, 2), -1, -2))

    def step(carry, piece):
        x, B, C = (piece[name].astype(dtype) for name in ("x", "B", "C"))
        dt = piece["dt"]
        decay = chunks.decays(dt * A, piece.get("starts"), dt.shape[1])
        values = dt[..., None] * x
        precision = _chunks.precision(piece["x"].dtype)
        carry, y, _ = chunks.attend(chunks.DOT, carry, C, B, values, decay, precision)
        if D is not None:
            y = y + D * x
        if "z" in piece:
            y = y * jax.nn.silu(piece["z"].astype(dtype))
        return carry, y.astype(piece["x"].dtype)

    carry, y = _chunks.scan_chunks(step, carry, arrays, config.chunk)
    state = jnp.swapaxes(carry.sums, -1, -2).reshape(inputs.state.shape)
    return y.reshape(x.shape), state
