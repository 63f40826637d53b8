"""The definition of Based attention, one token after another."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tk_jax.ops.linear_attention.reference import linear_attention_reference


def based_attention_reference(q, k, v, *, normalize=True, **settings):
    """Linear attention of the features; its other arguments and its results."""

    def features(q, k):
        first, second = np.triu_indices(q.shape[-1])

        def expand(x):
            pairs = x[..., first] * x[..., second]
            return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)

        q = expand(q)
        halves = np.where(first == second, 0.5, 1.0)
        ones = np.ones(q.shape[-1] - halves.size)
        return q * np.concatenate([ones, halves]), expand(k)

    return linear_attention_reference(
        q, k, v, normalize=normalize, features=features, **settings
    )
