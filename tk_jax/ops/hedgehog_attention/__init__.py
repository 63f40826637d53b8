"""Hedgehog attention: learned features for far tokens, a softmax for near ones."""

from tk_jax.ops.hedgehog_attention.api import (
    hedgehog_attention,
    hedgehog_attention_step,
)
from tk_jax.ops.hedgehog_attention.config import HedgehogState
from tk_jax.ops.hedgehog_attention.reference import hedgehog_attention_reference

__all__ = [
    "HedgehogState",
    "hedgehog_attention",
    "hedgehog_attention_reference",
    "hedgehog_attention_step",
]
