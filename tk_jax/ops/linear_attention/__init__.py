"""Linear attention: a decaying sum of keys times values, read by queries."""

from tk_jax.ops._chunks import NormalizedState
from tk_jax.ops.linear_attention.api import linear_attention, linear_attention_step
from tk_jax.ops.linear_attention.reference import linear_attention_reference

__all__ = [
    "NormalizedState",
    "linear_attention",
    "linear_attention_reference",
    "linear_attention_step",
]
