"""One token of the state-space dual: by the kernel of steps, and in XLA operations.

In the kernel's words C is the query, B the key and x the values, weighted by the steps
(:mod:`tk_jax.ops._state_step`). Steps and the gate z, a number for each value, are
XLA's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tk_jax.ops import _chunks, _state_step
from tk_jax.ops.ssd import xla
from tk_jax.ops.ssd.config import SsdOptions

_STEP = _state_step.StateStepOptions(scale=1.0, values_last=False, normalize=False)


def xla_step(options: SsdOptions, inputs: xla.Inputs):
    """A sequence of one token; ``inputs`` have no axis T."""
    x, B, C = (a[..., None, :, :] for a in (inputs.x, inputs.B, inputs.C))
    z = None if inputs.z is None else inputs.z[..., None, :, :]
    inputs = inputs._replace(x=x, B=B, C=C, z=z, dt=inputs.dt[..., None, :])
    y, state = xla.ssd(options, inputs)
    return y[..., 0, :, :], state


def kernel_step(options: SsdOptions, inputs: xla.Inputs):
    """As ``xla_step``, by the kernel."""
    x, skip = inputs.x, inputs.D
    *batch, num_heads, _ = x.shape
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    unfold = functools.partial(_chunks.unfold, batch=batch)
    dt = xla.step_sizes(options, inputs.dt, inputs.dt_bias, jnp.float32)
    if skip is not None:
        skip = skip.astype(jnp.float32).reshape(1, num_heads, -1)
    found = _state_step.state_step(
        _STEP,
        _state_step.Arrays(
            q=fold(inputs.C),
            k=fold(inputs.B),
            v=fold(x),
            state=fold(inputs.state),
            decays=fold(jnp.exp(dt * inputs.A.astype(jnp.float32))),
            weights=fold(dt),
            skip=skip,
        ),
    )
    y = unfold(found.out)
    if inputs.z is not None:
        y = y.astype(jnp.float32) * jax.nn.silu(inputs.z.astype(jnp.float32))
        y = y.astype(x.dtype)
    return y, unfold(found.state)
