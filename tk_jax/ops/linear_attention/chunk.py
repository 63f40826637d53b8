"""One chunk of decayed linear attention: the products, the decays, the next state.

In here, of C tokens in B sequences, G heads of queries and keys with R heads of values
each::

    q, k  [B, C, G, K]        v       [B, C, G, R, V]
    state [B, G, R, F, V]     decays  [B or 1, G or 1, R or 1, C]

where F is K, or what a feature map makes of K. This is the chunkwise form of Yang et
al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023),
section 3, with the scalar decay of Dao and Gu, "Transformers are SSMs" (2024), section
6. Its derivative is JAX's own: every exponent is a difference that is masked before the
exponential, so that the gradient of a decay is a sum of rows minus one of columns. What
no decay lies between is masked too: the gradient of its exponent would be in both sums,
and where decays are strong, all that is left of one without it is far smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

# Sums of multiples of this are exact in float32 up to 65536 ...
_GRID = 1 / 256
# ... and the decay of a token below this is zero, in float32 and in float64.
_SMALLEST = {"float32": -128.0, "float64": -1024.0}


class State(NamedTuple):
    """What a sequence carries from chunk to chunk."""

    sums: jnp.ndarray  # [B, G, R, F, V]: of keys times values
    normalizer: jnp.ndarray | None = None  # [B, G, R, F]: of keys


class Decays(NamedTuple):
    """How much of one token is left at another; all from 0 to 1 for decays <= 0."""

    within: jnp.ndarray  # [..., C, C]: of token j at token i
    before: jnp.ndarray | None  # [..., C]: of the state before the chunk at token i
    after: jnp.ndarray | None  # [..., C]: of token j after the chunk
    total: jnp.ndarray | None  # [...]: of the state before the chunk after it


class Dot:
    """Features of dot-product attention: queries and keys as they are."""

    def num_features(self, dim):
        return dim

    def weights(self, scores):
        return scores

    def queries(self, q):
        return q

    def keys(self, k):
        return k


DOT = Dot()


def decays(log_decay, starts, seqlen: int) -> Decays:
    """Of a chunk of ``seqlen`` tokens.

    Args:
      log_decay: [B or 1, C, G, R], or None for no decay.
      starts: bool [B, C], true where a segment starts; or None.
    """
    order = jnp.arange(seqlen)
    visible = order[:, None] >= order
    itself, is_last = order[:, None] == order, order == seqlen - 1
    if starts is not None:
        segment = jnp.cumsum(starts.astype(jnp.int32), axis=1)[:, None, None]
        visible = visible & (segment[..., :, None] == segment[..., None, :])
        last = segment[..., -1:]
    if log_decay is None:
        if starts is None:
            return Decays(visible, None, None, None)
        return Decays(visible, segment == 0, segment == last, last[..., 0] == 0)
    sums = _Sums(log_decay)
    within = sums.difference(sums.at[..., :, None], sums.at[..., None, :])
    within = jnp.where(itself, 0, within)
    before = sums.difference(sums.at, None)
    after = jnp.where(is_last, 0, sums.difference(sums.at[..., -1:], sums.at))
    total = before[..., -1]
    if starts is not None:
        before = _masked(segment == 0, before)
        after = _masked(segment == last, after)
        total = _masked(last[..., 0] == 0, total)
    within = _masked(visible, within)
    return Decays(*(jnp.exp(x) for x in (within, before, after, total)))


class _Sums:
    """Running sums of log decays, of which small differences are exact.

    After a few decays of -80 the sum is so large that a difference of neighbours has
    lost all but a few digits. So each decay is split into a multiple of 1/256, of which
    sums are exact, and the small rest.
    """

    def __init__(self, log_decay):
        smallest = _SMALLEST[log_decay.dtype.name]
        log_decay = jnp.where(log_decay < smallest, smallest, log_decay)
        log_decay = jnp.moveaxis(log_decay, 1, -1)  # [B, G, R, C]
        coarse = lax.stop_gradient(jnp.round(log_decay / _GRID) * _GRID)
        parts = jnp.stack([coarse, log_decay - coarse])
        self.at = jnp.cumsum(parts, axis=-1)

    @staticmethod
    def difference(end, start):
        coarse, fine = end if start is None else end - start
        return coarse + fine


def _masked(visible, exponent):
    return jnp.where(visible, exponent, -jnp.inf)


def attend(features, state: State, q, k, v, decay: Decays, precision=None):
    """Returns the next state, numerators [B, C, G, R, V], denominators [B, C, G, R].

    The denominators are None if the state has no normalizer.
    """

    def product(equation, *operands):
        return jnp.einsum(equation, *operands, precision=precision)

    scores = features.weights(product("bigk,bjgk->bgij", q, k))
    # Without decays, what is visible is all that these say.
    within, before, after, total = (
        None if x is None else x.astype(v.dtype) for x in decay
    )
    p = scores[:, :, None] * within
    queries, keys = features.queries(q), features.keys(k)

    old = product("bigf,bgrfv->bigrv", queries, state.sums)
    if before is not None:
        before, after = (_tokens_first(x) for x in (before, after))
        old = old * before[..., None]
    numerators = product("bgrij,bjgrv->bigrv", p, v) + old
    left = v if after is None else v * after[..., None]
    sums = product("bjgf,bjgrv->bgrfv", keys, left)
    if total is not None:
        sums = sums + total[..., None, None] * state.sums
    else:
        sums = sums + state.sums
    if state.normalizer is None:
        return State(sums), numerators, None

    old = product("bigf,bgrf->bigr", queries, state.normalizer)
    if before is not None:
        old = old * before
    denominators = jnp.moveaxis(p.sum(-1), -1, 1) + old
    if after is None:
        normalizer = keys.sum(1)[:, :, None] + state.normalizer
    else:
        after = jnp.broadcast_to(after, v.shape[:-1])
        normalizer = product("bjgf,bjgr->bgrf", keys, after)
        normalizer = normalizer + total[..., None] * state.normalizer
    return State(sums, normalizer), numerators, denominators


def _tokens_first(x):
    """[B, G, R, C] -> [B, C, G, R]"""
    return jnp.moveaxis(x, -1, 1)


def divide(numerators, denominators):
    """The quotient, and 0 with zero gradients where the denominator is 0."""
    empty = denominators == 0
    safe = jnp.where(empty, 1, denominators)[..., None]
    return jnp.where(empty[..., None], 0, numerators / safe)
