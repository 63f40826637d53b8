"""Based attention: linear attention whose weights are a Taylor series of exp."""

from tk_jax.ops.based_attention.api import based_attention, based_attention_step
from tk_jax.ops.based_attention.reference import based_attention_reference

__all__ = ["based_attention", "based_attention_reference", "based_attention_step"]
