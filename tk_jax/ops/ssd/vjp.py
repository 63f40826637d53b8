"""The state-space dual by the kernels of linear attention.

C are the queries, B the keys, x the values: their weights are the steps, the logarithms
of their decays the steps times A: kernels make them of dt. The gate z is XLA's, and JAX
differentiates it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tk_jax.ops import _chunks
from tk_jax.ops.linear_attention import config, scan
from tk_jax.ops.linear_attention.vjp import document_starts, pad_columns, pad_state
from tk_jax.ops.ssd import xla
from tk_jax.ops.ssd.config import SsdOptions


def kernel_ssd(
    options: SsdOptions,
    return_state: bool,
    inputs: xla.Inputs,
    *,
    tiles: config.ScanConfig | None = None,
):
    """As ``xla.ssd``, by kernels; ``inputs.state`` may be None for zeros.

    ``tiles`` is for tuning. The state that is returned is None unless ``return_state``.
    """
    x, state = inputs.x, inputs.state
    *batch, seqlen, num_heads, head_dim = x.shape
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    dt = inputs.dt
    if dt.dtype not in config.STEP_DTYPES:
        dt = dt.astype(jnp.float32)
    skip = inputs.D
    if skip is not None:
        skip = skip.astype(jnp.float32).reshape(num_heads, -1)
        if skip.shape[1] > 1:
            skip = pad_columns(skip)
    bias = inputs.dt_bias
    arrays = scan.Arrays(
        q=pad_columns(fold(inputs.C)),
        k=pad_columns(fold(inputs.B)),
        v=pad_columns(fold(x)),
        raw_steps=fold(dt),
        rates=inputs.A.astype(jnp.float32),
        biases=None if bias is None else bias.astype(jnp.float32),
        skip=skip,
        state=None if state is None else pad_state(fold(state)),
        starts=document_starts(inputs.segment_ids, (*batch, seqlen)),
    )
    steps = config.StepOptions(
        softplus=options.dt_softplus,
        least=options.dt_min,
        most=options.dt_max,
        least_log_decay=config.LEAST_LOG_DECAY,
    )
    settings = scan.Settings("ssd", 1.0, return_state, steps, tiles)
    y, state = scan.scan(settings, arrays)
    y = _chunks.unfold(y, batch)[..., :head_dim]
    if inputs.z is not None:
        y = y.astype(jnp.float32) * jax.nn.silu(inputs.z.astype(jnp.float32))
        y = y.astype(x.dtype)
    if state is not None:
        state = _chunks.unfold(state, batch)
        state = state[..., :head_dim, : inputs.B.shape[-1]]
    return y, state
