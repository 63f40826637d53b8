"""Attention: softmax(q k^T) v in linear memory, with gradients."""

from tk_jax.ops.attention.api import attention
from tk_jax.ops.attention.reference import attention_reference

__all__ = ["attention", "attention_reference"]
