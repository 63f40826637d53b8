"""The state that normalizes: sums of features of keys, by small products of keys.

In the public order of features it is [.., F]: the number of tokens, the sum of k, and
of k k^T the upper triangle. Kernels take it as float32 [.., 18, 16]: sixteen rows of
the sum of k k^T, one of k, and the count, with zeros around what has fewer features
(``cuda/kernels/based_attention/normalizer.cuh``).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from tk_jax.ops import _chunks
from tk_jax.ops.linear_attention.chunk import divide

_ROWS, _WIDTH = 18, 16


def added(k, starts, segment: int):
    """What segments of so many tokens add, [B, G, segments, F].

    Of each segment, what is in the state after it: ``k`` is [B, T, G, D] and ``starts``
    bool [B, T], where a document starts, or None.
    """
    batch, seqlen, groups, dim = k.shape
    missing = -seqlen % segment
    is_left = jnp.ones((batch, seqlen), bool)
    is_left = jnp.pad(is_left, [(0, 0), (0, missing)]).reshape(batch, -1, segment)
    if starts is not None:
        starts = jnp.pad(starts.astype(jnp.int32), [(0, 0), (0, missing)])
        starts = starts.reshape(batch, -1, segment)
        later = jnp.cumsum(starts[..., ::-1], axis=-1)[..., ::-1]
        is_left &= later - starts == 0
    is_left = is_left.astype(jnp.float32)
    k = jnp.pad(k, [(0, 0), (0, missing), (0, 0), (0, 0)])
    k = k.reshape(batch, -1, segment, groups, dim)
    left = jnp.where(is_left[..., None, None] > 0, k, 0)
    # Products of what has sixteen bits are exact in float32, and on a GPU in TF32.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    second = product("bsjgd,bsjge->bgsde", left, k)
    first = jnp.sum(left, axis=2, dtype=jnp.float32).swapaxes(1, 2)
    count = jnp.broadcast_to(is_left.sum(-1)[:, None, :, None], (*first.shape[:3], 1))
    rows, cols = np.triu_indices(dim)
    return jnp.concatenate([count, first, second[..., rows, cols]], axis=-1)


def changed(q, changes, starts, segment: int, scale: float):
    """What segments add to the gradient of the sums before them, [B, H, segments, F].

    A divisor is the product of the sums with phi(scale q): of each segment, those of
    the queries that see them, times ``changes`` float32 [B, H, T]. ``q`` and
    ``starts`` are as in ``added``.
    """
    batch, seqlen, groups, dim = q.shape
    heads = changes.shape[1]
    missing = -seqlen % segment
    changes = jnp.pad(changes, [(0, 0), (0, 0), (0, missing)])
    if starts is not None:
        starts = jnp.pad(starts.astype(jnp.int32), [(0, 0), (0, missing)])
        started = jnp.cumsum(starts.reshape(batch, -1, segment), axis=-1)
        sees = (started == 0).reshape(batch, 1, -1)
        changes = jnp.where(sees, changes, 0)
    changes = changes.reshape(batch, groups, heads // groups, -1, segment)
    q = jnp.pad(q.astype(jnp.float32), [(0, 0), (0, missing), (0, 0), (0, 0)])
    q = scale * q.reshape(batch, -1, segment, groups, dim).transpose(0, 3, 1, 2, 4)
    weighted = changes[..., None] * q[:, :, None]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    second = product("bgrsjd,bgsje->bgrsde", weighted, q)
    rows, cols = np.triu_indices(dim)
    second = second[..., rows, cols] * np.where(rows == cols, 0.5, 1).astype(np.float32)
    count = changes.sum(-1, keepdims=True)
    all_of = jnp.concatenate([count, weighted.sum(4), second], axis=-1)
    return all_of.reshape(batch, heads, *all_of.shape[3:])


def divided_gradients(gradients, out, divisors):
    """Gradients of what is divided, in the same dtype, and of what it is divided by.

    ``gradients`` and ``out`` are [B, T, H, V], ``divisors`` float32 [B, H, T padded]
    and their gradients [B, H, T]. As in linear attention's ``quotient.py``, a divisor's
    gradient is that of the numerators' gradients as they were rounded.
    """
    divisors = divisors[:, :, : out.shape[1]].swapaxes(1, 2)
    numerators = divide(gradients.astype(jnp.float32), divisors)
    numerators = _chunks.rounded(numerators, out.dtype)
    changes = -jnp.sum(numerators * out.astype(jnp.float32), axis=-1)
    return numerators.astype(out.dtype), changes.swapaxes(1, 2)


def chained(first, kept, added):
    """x[0] = first, x[s + 1] = (x[s] if kept[s], else 0) + added[s], on the third axis.

    ``first`` is [B, H, ...] or None for zeros, ``added`` [B, H, segments, ...],
    ``kept`` bool [B, segments], or None for always. Returns one more than segments.
    """
    first = jnp.zeros_like(added[:, :, :1]) if first is None else first[:, :, None]
    values = jnp.concatenate([first, added], axis=2)
    if kept is None:
        return jnp.cumsum(values, axis=2)
    kept = jnp.pad(kept, [(0, 0), (1, 0)])
    kept = kept.reshape(kept.shape[0], 1, -1, *[1] * (added.ndim - 3))

    def after(one, other):
        (is_kept, value), (other_kept, other_value) = one, other
        return is_kept & other_kept, jnp.where(other_kept, value, 0) + other_value

    return lax.associative_scan(after, (kept, values), axis=2)[1]


def gradient_to_kernel(gradients, dim: int):
    """The same for gradients of sums, whose row of k k^T is what a key is times."""
    rows, cols = np.triu_indices(dim)
    twice = np.append(np.ones(1 + dim), 1 + (rows == cols)).astype(np.float32)
    return to_kernel(gradients * twice, dim)


def to_kernel(sums, dim: int):
    """[.., F] -> [.., 18, 16]"""
    places = np.full((_ROWS, _WIDTH), -1, np.int32)
    rows, cols = np.triu_indices(dim)
    places[rows, cols] = places[cols, rows] = 1 + dim + np.arange(rows.size)
    places[_WIDTH, :dim] = 1 + np.arange(dim)
    places[_WIDTH + 1, 0] = 0
    sums = jnp.pad(sums, [(0, 0)] * (sums.ndim - 1) + [(0, 1)])
    return jnp.take(sums, places, axis=-1)  # -1 is the zero
