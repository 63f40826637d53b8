"""``jax.nn``'s attention on top of :func:`tk_jax.attention`: the same call.

>>> from tk_jax.nn import dot_product_attention  # instead of: from jax.nn import ...

:mod:`tk_jax.nn.flax` has an ``attention_fn`` for the attention layers of flax, and
:mod:`tk_jax.nn.equinox` an attention layer for Equinox.
"""

from tk_jax.nn.dot_product import dot_product_attention

__all__ = ["dot_product_attention"]
