"""The features whose products are the second-order Taylor series of exp.

With s = q k::

    1 + s + s^2 / 2 = 1 + sum_a q_a k_a + sum_{a <= b} c_ab (q_a q_b) (k_a k_b)

where c_ab is 1/2 for a = b and 1 for a < b: the matrix of products is symmetric, so
that d (d + 1) / 2 of them say all (136 instead of 256 for 16 features).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


class Taylor:
    """For ``linear_attention.chunk``: weights, and the features that make them."""

    def num_features(self, dim):
        return 1 + dim + dim * (dim + 1) // 2

    def weights(self, scores):
        return 1 + scores + 0.5 * scores * scores

    def queries(self, q):
        dim = q.shape[-1]
        halves = [np.append(0.5, np.ones(dim - a - 1)) for a in range(dim)]
        factors = np.concatenate([np.ones(1 + dim), *halves])
        return _features(q) * factors.astype(q.dtype)

    def keys(self, k):
        return _features(k)


TAYLOR = Taylor()


def _features(x):
    """[..., d] -> [..., F]: one, x, and the products of pairs a <= b, a by a."""
    pairs = [x[..., a : a + 1] * x[..., a:] for a in range(x.shape[-1])]
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, *pairs], axis=-1)
