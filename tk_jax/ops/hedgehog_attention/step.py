"""One token of Hedgehog attention: by the kernel of steps, and in XLA operations.

The token that leaves the latest two windows is added to the sums, where the queries
find it and all that is older: to them it is far wherever blocks begin. That is the
kernel's part (:mod:`tk_jax.ops._state_step`), which reads and writes the sums once, for
all the query heads that share them. The windows, which move on by a token, and what
queries see in them are XLA's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tk_jax.ops import _chunks, _state_step
from tk_jax.ops.hedgehog_attention import xla
from tk_jax.ops.hedgehog_attention.config import (
    HedgehogOptions,
    HedgehogState,
    xla_config,
)
from tk_jax.ops.linear_attention.chunk import divide

_STEP = _state_step.StateStepOptions(
    scale=1.0, values_last=True, normalize=True, divide=False
)


def xla_step(options: HedgehogOptions, inputs: xla.Inputs):
    """A sequence of one token; ``inputs`` have no axis T."""
    q, k, v = (x[..., None, :, :] for x in inputs[:3])
    inputs = inputs._replace(q=q, k=k, v=v)
    out, state = xla.hedgehog_attention(options, xla_config(options), inputs)
    return out[..., 0, :, :], state


def kernel_step(options: HedgehogOptions, inputs: xla.Inputs):
    """As ``xla_step``, with the sums by the kernel.

    As other kernels do, it rounds the maps to the dtype of the tokens.
    """
    batch = inputs.q.shape[:-2]
    num_heads, num_kv_heads = inputs.q.shape[-2], inputs.k.shape[-2]
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    q, k, v = (fold(x) for x in inputs[:3])
    state = HedgehogState(*(fold(x) for x in inputs.state))
    # [K heads, R queries of each]
    heads = (num_kv_heads, num_heads // num_kv_heads)
    k_map = inputs.k_map.astype(k.dtype)
    q_map = inputs.q_map.astype(q.dtype).reshape(*heads, *inputs.q_map.shape[1:])
    precision = _chunks.precision(q.dtype)

    def product(equation, *operands):
        operands = (x.astype(jnp.float32) for x in operands)
        return jnp.einsum(equation, *operands, precision=precision)

    alpha, beta = (
        jnp.broadcast_to(x.astype(jnp.float32), num_heads).reshape(*heads, 1)
        for x in (inputs.alpha, inputs.beta)
    )

    def latest(window, token):
        """The latest tokens, [B, 2 window, K, ..], with the new one."""
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        steps_back = jnp.arange(2 * options.window - 1, -1, -1)
        own = steps_back <= state.length[:, None]
        return jnp.where(own[..., None, None], window, 0)

    keys, values = latest(state.keys, k), latest(state.values, v)
    q = q.reshape(-1, *heads, q.shape[-1])
    phi_q = _features(product("bkrd,krdf->bkrf", q, q_map)) * alpha
    found = _sums(options, state, phi_q, k_map, product)

    near, far = _visible(options, state.length)
    s = product("bkrd,bjkd->bkrj", q, keys) * options.scale
    s = jnp.where(near, s, -jnp.inf)
    p = beta * jnp.exp(s - s.max(-1, keepdims=True))
    phi_k = _features(product("bjkd,kdf->bjkf", keys, k_map))
    p = p + jnp.where(far, product("bkrf,bjkf->bkrj", phi_q, phi_k), 0)
    numerators = product("bkrj,bjkv->bkrv", p, values)
    numerators += found.out.reshape(numerators.shape)
    out = divide(numerators, p.sum(-1) + found.sums.reshape(p.shape[:-1]))
    out = out.reshape(*batch, num_heads, v.shape[-1]).astype(v.dtype)
    state = HedgehogState(found.state, found.normalizer, keys, values, state.length + 1)
    return out, HedgehogState(*(_chunks.unfold(x, batch) for x in state))


def _features(y):
    return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)


def _visible(options, position):
    """Which of the latest tokens are near and which far, bool [B, 1, 1, 2 window]."""
    position = position[:, None]
    steps_back = jnp.arange(2 * options.window - 1, -1, -1)
    seen = steps_back <= position
    window = options.window
    near = seen & (position // window - (position - steps_back) // window <= 1)
    return near[:, None, None], (seen & ~near)[:, None, None]


def _sums(options, state, phi_q, k_map, product):
    """The sums with the token that leaves, and what the queries find in them."""
    # Whether there is one, and whether there is anything before it.
    leaves = (state.length >= 2 * options.window)[:, None, None]
    older = (state.length > 2 * options.window)[:, None]
    key, value = state.keys[:, 0], state.values[:, 0].astype(jnp.float32)
    phi_k = _features(product("bkd,kdf->bkf", key, k_map))
    arrays = _state_step.Arrays(
        q=phi_q.reshape(phi_q.shape[0], -1, phi_q.shape[-1]),
        k=jnp.where(leaves, phi_k, 0),
        v=jnp.where(leaves, value, 0),
        state=state.sums,
        normalizer=state.normalizer,
        decays=older.astype(jnp.float32),
    )
    return _state_step.state_step(_STEP, arrays)
