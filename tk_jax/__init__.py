"""Hopper GPU kernels for JAX: attention, state-space models, linear attention, matmul.

Public names load on first use, so that ``import tk_jax`` costs little and
``python -m tk_jax.doctor`` can say what is wrong where the rest cannot load.
"""

import importlib
from typing import TYPE_CHECKING

from tk_jax._version import __version__

if TYPE_CHECKING:
    from tk_jax import checkpoint_policies, nn
    from tk_jax._dispatch import FallbackWarning, explain
    from tk_jax._ffi import export_checks
    from tk_jax.compile import compile_kernels
    from tk_jax.interpret import interpret_options
    from tk_jax.kernel import call_kernel
    from tk_jax.ops.attention import attention
    from tk_jax.ops.based_attention import based_attention, based_attention_step
    from tk_jax.ops.hedgehog_attention import (
        HedgehogState,
        hedgehog_attention,
        hedgehog_attention_step,
    )
    from tk_jax.ops.linear_attention import (
        NormalizedState,
        linear_attention,
        linear_attention_step,
    )
    from tk_jax.ops.matmul import matmul
    from tk_jax.ops.ssd import ssd, ssd_step

# Where each name comes from: an attribute of a module, or the module itself.
_HOMES = {
    "FallbackWarning": "tk_jax._dispatch",
    "HedgehogState": "tk_jax.ops.hedgehog_attention",
    "NormalizedState": "tk_jax.ops.linear_attention",
    "attention": "tk_jax.ops.attention",
    "based_attention": "tk_jax.ops.based_attention",
    "based_attention_step": "tk_jax.ops.based_attention",
    "call_kernel": "tk_jax.kernel",
    "checkpoint_policies": "tk_jax.checkpoint_policies",
    "compile_kernels": "tk_jax.compile",
    "explain": "tk_jax._dispatch",
    "export_checks": "tk_jax._ffi",
    "hedgehog_attention": "tk_jax.ops.hedgehog_attention",
    "hedgehog_attention_step": "tk_jax.ops.hedgehog_attention",
    "interpret_options": "tk_jax.interpret",
    "linear_attention": "tk_jax.ops.linear_attention",
    "linear_attention_step": "tk_jax.ops.linear_attention",
    "matmul": "tk_jax.ops.matmul",
    "nn": "tk_jax.nn",
    "ssd": "tk_jax.ops.ssd",
    "ssd_step": "tk_jax.ops.ssd",
}

__all__ = [
    "FallbackWarning",
    "HedgehogState",
    "NormalizedState",
    "__version__",
    "attention",
    "based_attention",
    "based_attention_step",
    "call_kernel",
    "checkpoint_policies",
    "compile_kernels",
    "explain",
    "export_checks",
    "hedgehog_attention",
    "hedgehog_attention_step",
    "interpret_options",
    "linear_attention",
    "linear_attention_step",
    "matmul",
    "nn",
    "ssd",
    "ssd_step",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tk_jax' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if _HOMES[name] == f"tk_jax.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
