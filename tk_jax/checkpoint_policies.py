"""Policies for ``jax.checkpoint`` that know the residuals of this package's ops.

The policies of ``jax.checkpoint_policies`` that save matrix products do not see those
inside a kernel. With these, a rematerialised layer does not run its attention twice:

>>> import jax, jax.numpy as jnp, tk_jax
>>> from tk_jax import checkpoint_policies
>>> def layer(x):
...     return x + tk_jax.attention(x, x, x)
>>> x = jnp.ones((1, 16, 2, 64))
>>> remat = jax.checkpoint(layer, policy=checkpoint_policies.save_attention)
>>> jax.grad(lambda x: remat(x).sum())(x).shape
(1, 16, 2, 64)
"""

import jax

ATTENTION_NAMES = ("tk_attention_out", "tk_attention_lse")

# Saves what attention's backward pass needs beside q, k and v: out and lse.
save_attention = jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES)

# The same, and the products of matrices without a batch: those with weights.
save_attention_and_dots = jax.checkpoint_policies.save_from_both_policies(
    save_attention, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
)

RECURRENT_NAMES = tuple(
    f"tk_{op}_{result}"
    for op in ("based_attention", "hedgehog_attention", "linear_attention", "ssd")
    for result in ("out", "state")
)

# Saves the results of ssd, linear_attention and their kin. Their backward passes need
# the arguments alone; but a layer that is computed again needs what it did with them.
save_recurrent = jax.checkpoint_policies.save_only_these_names(*RECURRENT_NAMES)
