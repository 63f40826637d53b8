"""Attention for the layers of flax, both ``flax.linen`` and ``flax.nnx``.

Nothing here imports flax: its layers take any function with the arguments of its own
``dot_product_attention``::

    import flax.linen
    from tk_jax.nn.flax import attention_fn

    flax.linen.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn)

Settings of :func:`tk_jax.attention` are set beforehand::

    attention_fn = functools.partial(attention_fn, local_window_size=(1024, 0))
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tk_jax.nn.dot_product import floating
from tk_jax.ops.attention import attention


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: object | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: object | None = None,
    qk_attn_weights_einsum: object | None = None,
    attn_weights_value_einsum: object | None = None,
    is_causal: bool = False,
    promote_dtype: Callable | None = None,
    **settings,
) -> jax.Array:
    """``flax``'s ``dot_product_attention`` by :func:`tk_jax.attention`.

    The same as flax's, except that a query that sees no key has the result 0 (flax's is
    the mean of the values), and that the weights, which flax drops out and records,
    never exist.

    Args:
      query: ``[..., T, H, D]``, with any number of leading batch dimensions.
      key: ``[..., S, K, D]``, where K divides H.
      value: ``[..., S, K, Dv]``.
      bias: Of any dtype, added to the scores; broadcast to ``[..., H, T, S]``.
      mask: Not zero where a query may see a key; broadcast to ``[..., H, T, S]``.
      broadcast_dropout: Taken, as there is no dropout.
      dropout_rng: Taken, as there is no dropout.
      dropout_rate: Has to be 0 unless ``deterministic``.
      deterministic: flax's: no dropout. The sums of a gradient are ordered anyway.
      dtype: What query, key and value are cast to; their common dtype by default.
      precision: Has to be None: of products in bfloat16 and float16 there is one.
      module: Has to be None: there are no weights to record (``sow_weights``).
      force_fp32_for_softmax: Taken: it always is at least float32.
      einsum_dot_general: Has to be None: the products are the kernels'.
      qk_attn_weights_einsum: Has to be None, as ``attn_weights_value_einsum``.
      attn_weights_value_einsum: Has to be None.
      is_causal: Query i sees only the keys j <= i.
      promote_dtype: Called with ``(query, key, value)`` and ``dtype``, as nnx has it;
        what it returns has to be of one dtype.
      **settings: Other arguments of :func:`tk_jax.attention`.

    Raises:
      NotImplementedError: an argument asks for what this attention does not have.
      TypeError, ValueError: as :func:`tk_jax.attention`.

    >>> import jax.numpy as jnp
    >>> from tk_jax.nn.flax import attention_fn
    >>> x = jnp.ones((2, 16, 4, 8))
    >>> attention_fn(x, x, x, mask=jnp.ones((2, 1, 16, 16))).shape
    (2, 16, 4, 8)
    """
    if dropout_rate > 0 and not deterministic:
        raise NotImplementedError(
            f"attention_fn: dropout_rate is {dropout_rate!r}; expected 0, or a "
            "deterministic call: there are no weights to drop out"
        )
    for name, got in (
        ("precision", precision),
        ("module", module),
        ("einsum_dot_general", einsum_dot_general),
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if got is not None:
            raise NotImplementedError(
                f"attention_fn: {name} is of type {type(got).__name__}; expected None"
            )
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    else:
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    if bias is not None:
        bias = floating(jnp.asarray(bias))
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
    return attention(
        query, key, value, bias=bias, mask=mask, is_causal=is_causal, **settings
    )
