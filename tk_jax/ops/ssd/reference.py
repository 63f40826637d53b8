"""The definition of the state-space dual, one token after another."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from tk_jax.ops import _chunks


def ssd_reference(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    initial_state=None,
    segment_ids=None,
    dtype=jnp.float32,
):
    """Returns y [..., T, H, P] and the state [..., H, P, N], in ``dtype``.

    ``dtype`` is float32 or, where x64 is enabled, float64.
    """
    *batch, seqlen, num_heads, head_dim = x.shape
    gate = z
    x, dt, A = (a.astype(dtype) for a in (x, dt, A))
    repeats = num_heads // B.shape[-2]
    B, C = (jnp.repeat(a.astype(dtype), repeats, axis=-2) for a in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    low, high = dt_limit
    dt = jnp.where(dt < low, low, jnp.where(dt > high, high, dt))
    if initial_state is None:
        initial_state = jnp.zeros((*batch, num_heads, head_dim, B.shape[-1]))
    if segment_ids is None:
        segment_ids = jnp.zeros(seqlen, jnp.int32)
    segment_ids = jnp.broadcast_to(segment_ids, (*batch, seqlen))

    def step(carry, token):
        state, previous = carry
        x, dt, B, C, segment = token
        kept = (segment == previous)[..., None] * jnp.exp(dt * A)  # [..., H]
        added = dt[..., None, None] * x[..., None] * B[..., None, :]
        state = kept[..., None, None] * state + added
        y = jnp.einsum("...pn,...n->...p", state, C, precision="highest")
        return (state, segment), y

    tokens = (
        jnp.moveaxis(x, -3, 0),
        jnp.moveaxis(dt, -2, 0),
        jnp.moveaxis(B, -3, 0),
        jnp.moveaxis(C, -3, 0),
        jnp.moveaxis(segment_ids, -1, 0),
    )
    start = (initial_state.astype(dtype), segment_ids[..., 0])
    (state, _), y = _chunks.scan_tokens(step, start, tokens)
    y = jnp.moveaxis(y, 0, -3)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).astype(dtype) * x
    if gate is not None:
        y = y * jax.nn.silu(gate.astype(dtype))
    return y, state
