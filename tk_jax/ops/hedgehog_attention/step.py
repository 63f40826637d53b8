"""One token of Hedgehog attention: by two kernels, and in XLA operations.

The token that leaves the latest two windows is added to the sums, where the queries
find it and all that is older: to them it is far wherever blocks begin. That is the
kernel of steps (:mod:`tk_jax.ops._state_step`), which reads and writes the sums once,
for all the query heads that share them. A second kernel moves the windows on by the
token and lets the queries see them, where it takes them (``_takes_windows``); XLA does
it elsewhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tk_jax import _ffi
from tk_jax.ops import _chunks, _state_step
from tk_jax.ops.hedgehog_attention import xla
from tk_jax.ops.hedgehog_attention.config import (
    CHUNK,
    DIM_STEP,
    KERNEL_DTYPES,
    MAP,
    MAX_DIM,
    MAX_GRID,
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
    """As ``xla_step``, by the kernels.

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
        jnp.broadcast_to(x.astype(jnp.float32), num_heads)
        for x in (inputs.alpha, inputs.beta)
    )
    q = q.reshape(-1, *heads, q.shape[-1])
    phi_q = _features(product("bkrd,krdf->bkrf", q, q_map))
    phi_q = phi_q * alpha.reshape(*heads, 1)
    found = _sums(options, state, phi_q, k_map, product)
    if _takes_windows(options, k, v, k_map):
        seen = _kernel_windows(options, state, q, k, v, phi_q, k_map, beta, found)
    else:
        beta = beta.reshape(*heads, 1)
        seen = _xla_windows(options, state, q, k, v, phi_q, k_map, beta, found, product)
    out, keys, values = seen
    out = out.reshape(*batch, num_heads, v.shape[-1])
    state = HedgehogState(found.state, found.normalizer, keys, values, state.length + 1)
    return out, HedgehogState(*(_chunks.unfold(x, batch) for x in state))


# -- The latest two windows: out [B, H, V], and the windows with the token ------------


def _takes_windows(options, k, v, k_map) -> bool:
    """Whether the kernel has them."""
    dims = (k.shape[-1], v.shape[-1])
    return (
        k.dtype in KERNEL_DTYPES
        and options.window == CHUNK
        and k_map.shape[-1] == MAP
        and all(dim <= MAX_DIM and dim % DIM_STEP == 0 for dim in dims)
        and k.shape[0] <= MAX_GRID
    )


class Windows(NamedTuple):
    """The operands of the kernel; vectors are padded to whole tiles."""

    query: jax.Array  # float32 [B, H, D]: scaled
    features: jax.Array  # float32 [B, H, 2 F]: of the queries, times alpha
    token_key: jax.Array  # float32 [B, K, D]
    token_value: jax.Array  # float32 [B, K, V]
    keys: jax.Array  # [B, 2 window, K, D]
    values: jax.Array  # [B, 2 window, K, V]
    k_map: jax.Array  # [K, D, F]
    beta: jax.Array  # float32 [H]
    sums: jax.Array  # float32 [B, H, V]: what the queries find of what is older
    divisors: jax.Array  # float32 [B, H]
    length: jax.Array  # int32 [B]


def _kernel_windows(options, state, q, k, v, phi_q, k_map, beta, found):
    def vectors(x):
        x = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % CHUNK)))

    return _windows(
        Windows(
            query=vectors(q.astype(jnp.float32) * options.scale),
            features=vectors(phi_q),
            token_key=vectors(k),
            token_value=vectors(v),
            keys=state.keys,
            values=state.values,
            k_map=k_map,
            beta=beta,
            sums=found.out,
            divisors=found.sums,
            length=state.length,
        )
    )


@custom_vmap
def _windows(arrays: Windows):
    batch, num_heads = arrays.query.shape[:2]
    keys, values = arrays.keys, arrays.values
    out = (batch, num_heads, values.shape[-1])
    return _ffi.call(
        "tk_hedgehog_attention_step_v1",
        tuple(
            _ffi.result_type(keys, shape, keys.dtype)
            for shape in (out, keys.shape, values.shape)
        ),
        *arrays,
        in_place={4: 1, 5: 2},
    )


@_windows.def_vmap
def _more_windows(axis_size, in_batched, arrays: Windows):
    """As a larger batch, or one after another where parameters differ."""
    (batched,) = in_batched

    def whole(x, is_batched):
        return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

    if batched.k_map or batched.beta:
        results = lax.map(_windows, jax.tree.map(whole, arrays, batched))
    else:
        folded = {
            name: x
            if name in ("k_map", "beta")
            else whole(x, getattr(batched, name)).reshape(
                -1, *x.shape[1 + getattr(batched, name) :]
            )
            for name, x in arrays._asdict().items()
        }
        results = tuple(
            x.reshape(axis_size, -1, *x.shape[1:]) for x in _windows(Windows(**folded))
        )
    return results, (True, True, True)


def _xla_windows(options, state, q, k, v, phi_q, k_map, beta, found, product):
    def latest(window, token):
        """The latest tokens, [B, 2 window, K, ..], with the new one."""
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        steps_back = jnp.arange(2 * options.window - 1, -1, -1)
        own = steps_back <= state.length[:, None]
        return jnp.where(own[..., None, None], window, 0)

    keys, values = latest(state.keys, k), latest(state.values, v)
    near, far = _visible(options, state.length)
    s = product("bkrd,bjkd->bkrj", q, keys) * options.scale
    s = jnp.where(near, s, -jnp.inf)
    p = beta * jnp.exp(s - s.max(-1, keepdims=True))
    phi_k = _features(product("bjkd,kdf->bjkf", keys, k_map))
    p = p + jnp.where(far, product("bkrf,bjkf->bkrj", phi_q, phi_k), 0)
    numerators = product("bkrj,bjkv->bkrv", p, values)
    numerators += found.out.reshape(numerators.shape)
    out = divide(numerators, p.sum(-1) + found.sums.reshape(p.shape[:-1]))
    return out.astype(v.dtype), keys, values


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
