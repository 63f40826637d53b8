"""Variants of our own kernels, for choosing their default tiles.

``--tk-configs 128x128x2 192x128x2`` times the forward kernel, and for attention
``--tk-bwd-configs`` the backward kernel, with these fields of their Config dataclass;
fields left out keep their defaults.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.cases import AttentionCase, Case, MatmulCase
from tk_jax.ops.attention import config as attention_config
from tk_jax.ops.attention import tiling as attention_tiling
from tk_jax.ops.attention import vjp as attention_vjp
from tk_jax.ops.matmul import config as matmul_config
from tk_jax.ops.matmul import vjp as matmul_vjp


@dataclasses.dataclass(frozen=True)
class Variant:
    """Our kernel with the tiles ``fields`` in ``direction``."""

    direction: str
    fields: tuple[int, ...]

    @classmethod
    def parse(cls, direction: str, text: str) -> Variant:
        if not re.fullmatch(r"\d+(x\d+)*", text):
            raise ValueError(
                f"{text!r} is not a config; expected numbers as in 128x128x2"
            )
        return cls(direction, tuple(map(int, text.split("x"))))

    def __str__(self) -> str:
        return f"tk[{'x'.join(map(str, self.fields))}]"

    def build(self, case: Case) -> Callable:
        """The function of the case's arrays that runs this variant."""
        if isinstance(case, MatmulCase):
            return self._build_matmul(case)
        return self._build_attention(case)

    def _apply(self, default):
        names = [field.name for field in dataclasses.fields(default)]
        if len(self.fields) > len(names):
            raise ValueError(f"{self} has more numbers than the fields {names}")
        return dataclasses.replace(
            default, **dict(zip(names, self.fields, strict=False))
        )

    def _build_matmul(self, case: MatmulCase) -> Callable:
        tiles = self._apply(matmul_config.MatmulConfig())
        options = matmul_config.MatmulOptions(
            case.transposes[0] == "t", case.transposes[1] == "t"
        )
        return lambda a, b: matmul_vjp.kernel_matmul(a, b, options, tiles)

    def _build_attention(self, case: AttentionCase) -> Callable:
        options = attention_config.AttentionOptions(
            scale=1 / math.sqrt(case.head_dim),
            is_causal=case.is_causal,
            bottom_right=False,
            deterministic=True,
        )
        if case.documents > 1:
            raise ValueError(f"{self}: tiles are tuned without documents")
        if case.window is not None:
            left, right = case.local_window_size
            options = dataclasses.replace(options, window_left=left, window_right=right)
        forward = attention_tiling.forward_config(
            case.head_dim, case.value_dim, case.seqlen_kv, options.mask
        )
        backward = attention_tiling.backward_config(case.head_dim, case.value_dim)
        if self.direction == "fwd":
            forward = self._apply(forward)
        else:
            backward = self._apply(backward)

        @jax.custom_vjp
        def attention(q, k, v):
            return attention_vjp.kernel_forward(options, q, k, v, tiles=forward)[0]

        def attention_fwd(q, k, v):
            out, lse, _ = attention_vjp.kernel_forward(options, q, k, v, tiles=forward)
            return out, (q, k, v, out, lse)

        def attention_bwd(residuals, dout):
            no_dlse = jnp.zeros((0,), jnp.float32)
            return attention_vjp.kernel_backward(
                options, *residuals, dout, no_dlse, tiles=backward
            )[:3]

        attention.defvjp(attention_fwd, attention_bwd)
        return attention
