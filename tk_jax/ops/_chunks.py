"""Sequences in chunks: the loop that the recurrent ops share, in XLA operations.

A step sees one chunk of tokens and a carry of constant size. It is computed again in
the backward pass, so that what a sequence keeps is one carry for each chunk; and with
:func:`recomputed` around the loop it keeps those only while the backward pass runs, and
nothing but the op's own arguments between the two passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class NormalizedState(NamedTuple):
    """The state of normalized linear attention: sums over the tokens so far."""

    sums: jax.Array  # [..., H, K, V]: of keys times values
    normalizer: jax.Array  # [..., H, K]: of keys


# So that steps, which take and return it, can be exported.
jax.export.register_namedtuple_serialization(
    NormalizedState, serialized_name="tk_jax.NormalizedState"
)


def rounded(x: jax.Array, dtype) -> jax.Array:
    """``x`` as ``dtype`` has it, in its own dtype.

    A conversion there and back, XLA may leave out.
    """
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def recomputed(fn: Callable) -> Callable:
    """``fn``, of which differentiation keeps nothing but the arguments."""
    return jax.checkpoint(fn)


def scan_chunks(step: Callable, carry, arrays, chunk: int):
    """Runs ``step(carry, chunk of arrays) -> (carry, out)`` over a sequence.

    ``arrays`` is a tree of [B, T, ...], ``out`` is [B, chunk, ...]. Returns the last
    carry and the outs as [B, T, ...]. The last chunk is what is left: where T is not a
    multiple, ``step`` is traced a second time instead of padding the arrays.
    """
    seqlen = jax.tree.leaves(arrays)[0].shape[1]
    num_chunks = seqlen // chunk
    scanned, outs = 0, []
    if num_chunks > 1:
        scanned = num_chunks * chunk
        chunks = jax.tree.map(
            functools.partial(_split, num_chunks=num_chunks, chunk=chunk), arrays
        )
        # In a scan, nothing is left that common subexpressions could be found in.
        remat = jax.checkpoint(step, prevent_cse=False)
        carry, out = lax.scan(remat, carry, chunks)
        out = jnp.moveaxis(out, 0, 1)
        outs.append(out.reshape(out.shape[0], scanned, *out.shape[3:]))
    for start in range(scanned, seqlen, chunk):
        end = start + chunk
        piece = jax.tree.map(lambda x, s=start, e=end: x[:, s:e], arrays)
        carry, out = jax.checkpoint(step)(carry, piece)
        outs.append(out)
    return carry, outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def scan_tokens(step: Callable, carry, tokens, *, run: int = 64):
    """``lax.scan(step, carry, tokens)``, differentiated in little memory.

    Kept for the backward pass are the carries of every ``run``-th token, and those of
    one run of tokens at a time, computed again. Without that a recurrence in float64
    keeps a state for each token.
    """
    runs, rest = divmod(jax.tree.leaves(tokens)[0].shape[0], run)
    if runs <= 1:
        return lax.scan(step, carry, tokens)
    first = jax.tree.map(
        lambda x: x[: runs * run].reshape(runs, run, *x.shape[1:]), tokens
    )
    whole = jax.checkpoint(functools.partial(lax.scan, step), prevent_cse=False)
    carry, out = lax.scan(whole, carry, first)
    out = jax.tree.map(lambda x: x.reshape(runs * run, *x.shape[2:]), out)
    if rest:
        last = jax.tree.map(lambda x: x[runs * run :], tokens)
        carry, more = lax.scan(step, carry, last)
        out = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), out, more)
    return carry, out


def _split(x, *, num_chunks, chunk):
    """[B, T, ...] -> [chunks, B, chunk, ...]"""
    x = x[:, : num_chunks * chunk]
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)


def segment_starts(segment_ids, shape):
    """bool ``shape`` [..., T]: a token whose id differs from that of the one before."""
    ids = jnp.broadcast_to(segment_ids, shape)
    first = jnp.zeros_like(ids[..., :1], bool)
    return jnp.concatenate([first, ids[..., 1:] != ids[..., :-1]], axis=-1)


def fold(x, num_batch_axes: int):
    """[*batch, ...] -> [B, ...]"""
    batch, rest = x.shape[:num_batch_axes], x.shape[num_batch_axes:]
    return x.reshape(math.prod(batch), *rest)


def unfold(x, batch):
    """[B, ...] -> [*batch, ...]"""
    return x.reshape(*batch, *x.shape[1:])


def sum_dtype(dtype):
    """Of gates, states and sums beside inputs of ``dtype``."""
    # Not jnp.promote_types, which jax.numpy_dtype_promotion("strict") forbids.
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def precision(dtype):
    """Of products of what was rounded to ``dtype`` once.

    For 16-bit inputs, whatever the platform is quickest with, which is TF32 on NVIDIA
    GPUs; for others, the exact products of their dtype.
    """
    return None if jnp.dtype(dtype).itemsize == 2 else lax.Precision.HIGHEST


def zero_state(shape, dtype):
    """Of the dtype that the sums beside inputs of ``dtype`` have."""
    return jnp.zeros(shape, sum_dtype(dtype))
