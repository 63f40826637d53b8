"""States in the order of features that the kernels have, and back.

The public order is a triangle's (``features.py``). The kernels', which
``cuda/include/tk/product_columns.h`` defines, has the products of values at the same
distance together: x[a], then x[a] x[(a + c) mod D] for c from 0 to D / 2.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from tk_jax.ops.based_attention import config


@functools.cache
def columns(dim: int) -> np.ndarray:
    """Which feature each of the kernels' columns has; -1 where it has none."""
    first, second = np.triu_indices(dim)
    place = np.zeros((dim, dim), np.int32)
    place[first, second] = place[second, first] = 1 + dim + np.arange(first.size)
    order = np.full(config.state_columns(dim), -1, np.int32)
    values = np.arange(dim)
    order[:dim] = 1 + values
    for distance in range(dim // 2 + 1):
        start = dim * (1 + distance)
        order[start : start + dim] = place[values, (values + distance) % dim]
    # The second half of the last products is that of the first again.
    half = dim // 2 * (dim + 3)
    order[half : half + dim // 2] = -1
    order[half] = 0
    return order


@functools.cache
def _places(dim: int) -> np.ndarray:
    """Where each feature is among the kernels' columns."""
    order = columns(dim)
    places = np.argsort(np.where(order < 0, order.size, order))
    return places[: (order >= 0).sum()].astype(np.int32)


def to_kernel(state, dim: int):
    """[.., F, V] -> [.., V, columns]"""
    state = jnp.swapaxes(state, -1, -2)
    state = jnp.pad(state, [(0, 0)] * (state.ndim - 1) + [(0, 1)])
    return jnp.take(state, columns(dim), axis=-1)  # -1 is the zero


def to_public(state, dim: int):
    """[.., V, columns] -> [.., F, V]"""
    return jnp.swapaxes(jnp.take(state, _places(dim), axis=-1), -1, -2)
