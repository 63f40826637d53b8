"""Matrix multiplication of bfloat16 and float16 arrays, accumulated in float32."""

from tk_jax.ops.matmul.api import matmul

__all__ = ["matmul"]
