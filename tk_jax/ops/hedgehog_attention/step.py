"""One token of Hedgehog attention: by two kernels, and in XLA operations.

The latest two windows move on by the token, and its queries see them: a kernel does
that, where it takes them (``_takes_windows``), and XLA elsewhere. The token that leaves
them is added to the sums, where the queries find it and all that is older: to them it
is far wherever blocks begin. That is :mod:`tk_jax.ops._state_step`, the kernel that all
steps have, which reads and writes the sums once, for all the query heads that share
them, and divides.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    HedgehogStepOptions,
    xla_config,
)

_STEP = _state_step.StateStepOptions(scale=1.0, values_last=True, normalize=True)


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
    num_heads = inputs.q.shape[-2]
    fold = functools.partial(_chunks.fold, num_batch_axes=len(batch))
    q, k, v = (fold(x) for x in inputs[:3])
    state = HedgehogState(*(fold(x) for x in inputs.state))
    tokens = Tokens(
        query=q,
        token_key=k,
        token_value=v,
        keys=state.keys,
        values=state.values,
        q_map=inputs.q_map.astype(q.dtype),
        k_map=inputs.k_map.astype(k.dtype),
        alpha=jnp.broadcast_to(inputs.alpha.astype(jnp.float32), num_heads),
        beta=jnp.broadcast_to(inputs.beta.astype(jnp.float32), num_heads),
        length=state.length,
    )
    takes_windows = _takes_windows(options, k, v, tokens.k_map)
    seen = (_kernel_windows if takes_windows else _xla_windows)(options, tokens)
    found = _state_step.state_step(
        _STEP,
        _state_step.Arrays(
            q=seen.features,
            k=seen.key_features,
            v=seen.value,
            state=state.sums,
            normalizer=state.normalizer,
            decays=seen.decays,
            numerators=seen.numerators,
            divisors=seen.divisors,
        ),
    )
    out = found.out.reshape(*batch, num_heads, v.shape[-1])
    state = HedgehogState(
        found.state, found.normalizer, seen.keys, seen.values, state.length + 1
    )
    return out, HedgehogState(*(_chunks.unfold(x, batch) for x in state))


# -- The latest two windows -----------------------------------------------------------


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


class Tokens(NamedTuple):
    """What is known before: the kernel's operands."""

    query: jax.Array  # [B, H, D]
    token_key: jax.Array  # [B, K, D]
    token_value: jax.Array  # [B, K, V]
    keys: jax.Array  # [B, 2 window, K, D]
    values: jax.Array  # [B, 2 window, K, V]
    q_map: jax.Array  # [H, D, F]
    k_map: jax.Array  # [K, D, F]
    alpha: jax.Array  # float32 [H]
    beta: jax.Array  # float32 [H]
    length: jax.Array  # int32 [B]


# Those that elements of a batch share.
_PARAMETERS = ("q_map", "k_map", "alpha", "beta")


class Seen(NamedTuple):
    """What the sums' step takes, the windows with the token: the kernel's results."""

    features: jax.Array  # float32 [B, H, 2 F]: alpha phi(q)
    key_features: jax.Array  # float32 [B, K, 2 F]: of what leaves the windows, or 0
    value: jax.Array  # [B, K, V]: its value, or 0
    decays: jax.Array  # float32 [B, K or 1]: 0 where nothing has left them before
    numerators: jax.Array  # float32 [B, H, V]: sums of weights times values
    divisors: jax.Array  # float32 [B, H]: sums of weights
    keys: jax.Array  # [B, 2 window, K, D]
    values: jax.Array  # [B, 2 window, K, V]


def _kernel_windows(options: HedgehogOptions, tokens: Tokens) -> Seen:
    run = custom_vmap(functools.partial(_call_windows, options))

    @run.def_vmap
    def add_axis(axis_size, in_batched, tokens):
        """As a larger batch, or one after another where parameters differ."""
        (batched,) = in_batched
        whole = Tokens(
            *(
                x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                for x, is_batched in zip(tokens, batched, strict=True)
            )
        )
        if any(getattr(batched, name) for name in _PARAMETERS):
            results = jax.lax.map(run, whole)
        else:
            folded = {
                name: x.reshape(-1, *x.shape[2:])
                for name, x in whole._asdict().items()
                if name not in _PARAMETERS
            }
            seen = run(tokens._replace(**folded))
            results = Seen(*(x.reshape(axis_size, -1, *x.shape[1:]) for x in seen))
        return results, Seen(*(True for _ in Seen._fields))

    return run(tokens)


def _call_windows(options: HedgehogOptions, tokens: Tokens) -> Seen:
    batch, num_heads = tokens.query.shape[:2]
    keys, values = tokens.keys, tokens.values
    num_kv_heads, value_dim = values.shape[2:]
    exact = [
        (batch, num_heads, 2 * MAP),
        (batch, num_kv_heads, 2 * MAP),
        (batch, num_kv_heads),
        (batch, num_heads, value_dim),
        (batch, num_heads),
    ]
    features, key_features, decays, numerators, divisors = (
        _ffi.result_type(keys, shape) for shape in exact
    )
    return Seen(
        *_ffi.call(
            "tk_hedgehog_attention_step_v1",
            Seen(
                features=features,
                key_features=key_features,
                value=_ffi.result_type(
                    keys, (batch, num_kv_heads, value_dim), keys.dtype
                ),
                decays=decays,
                numerators=numerators,
                divisors=divisors,
                keys=_ffi.result_type(keys, keys.shape, keys.dtype),
                values=_ffi.result_type(values, values.shape, values.dtype),
            ),
            *tokens,
            in_place={3: 6, 4: 7},
            options=HedgehogStepOptions(scale=options.scale),
        )
    )


def _xla_windows(options: HedgehogOptions, tokens: Tokens) -> Seen:
    # [K heads, R queries of each]
    batch, num_heads = tokens.query.shape[:2]
    heads = (tokens.k_map.shape[0], num_heads // tokens.k_map.shape[0])
    q = tokens.query.reshape(batch, *heads, -1)
    q_map = tokens.q_map.reshape(*heads, *tokens.q_map.shape[1:])
    alpha, beta = (x.reshape(*heads, 1) for x in (tokens.alpha, tokens.beta))
    precision = _chunks.precision(q.dtype)

    def product(equation, *operands):
        operands = (x.astype(jnp.float32) for x in operands)
        return jnp.einsum(equation, *operands, precision=precision)

    def latest(window, token):
        """The latest tokens, [B, 2 window, K, ..], with the new one."""
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        steps_back = jnp.arange(2 * options.window - 1, -1, -1, dtype=jnp.int32)
        own = steps_back <= tokens.length[:, None]
        return jnp.where(own[..., None, None], window, 0)

    keys = latest(tokens.keys, tokens.token_key)
    values = latest(tokens.values, tokens.token_value)
    phi_q = alpha * _features(product("bkrd,krdf->bkrf", q, q_map))
    near, far = _visible(options, tokens.length)
    s = product("bkrd,bjkd->bkrj", q, keys) * options.scale
    s = jnp.where(near, s, -jnp.inf)
    p = beta * jnp.exp(s - s.max(-1, keepdims=True))
    phi_k = _features(product("bjkd,kdf->bjkf", keys, tokens.k_map))
    p = p + jnp.where(far, product("bkrf,bjkf->bkrj", phi_q, phi_k), 0)
    numerators = product("bkrj,bjkv->bkrv", p, values)
    # The token that leaves, if one does; and whether anything has before it.
    leaves = (tokens.length >= 2 * options.window)[:, None, None]
    older = (tokens.length > 2 * options.window)[:, None]
    key, value = tokens.keys[:, 0], tokens.values[:, 0]
    phi_key = _features(product("bkd,kdf->bkf", key, tokens.k_map))
    return Seen(
        features=phi_q.reshape(batch, num_heads, -1),
        key_features=jnp.where(leaves, phi_key, 0),
        value=jnp.where(leaves, value, 0),
        decays=older.astype(jnp.float32),
        numerators=numerators.reshape(batch, num_heads, -1),
        divisors=p.sum(-1).reshape(batch, num_heads),
        keys=keys,
        values=values,
    )


def _features(y):
    return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)


def _visible(options, position):
    """Which of the latest tokens are near and which far, bool [B, 1, 1, 2 window]."""
    position = position[:, None]
    steps_back = jnp.arange(2 * options.window - 1, -1, -1, dtype=jnp.int32)
    seen = steps_back <= position
    window = options.window
    near = seen & (position // window - (position - steps_back) // window <= 1)
    return near[:, None, None], (seen & ~near)[:, None, None]
