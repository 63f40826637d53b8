"""The implementations of each op: ours and every rival that is installed."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

import tk_jax
from benchmarks.cases import AttentionCase, MatmulCase

# Beyond this, XLA's own attention would not fit beside its gradients.
_MAX_XLA_SCORES_BYTES = 10 * 2**30


class UnsupportedCaseError(Exception):
    """An implementation does not compute a case; says why."""


def _attention_tk(case: AttentionCase) -> Callable:
    return functools.partial(
        tk_jax.attention, is_causal=case.is_causal, implementation="tk"
    )


def _attention_cudnn(case: AttentionCase) -> Callable:
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=case.is_causal, implementation="cudnn"
    )


def _attention_xla(case: AttentionCase) -> Callable:
    scores = 4 * case.batch * case.num_heads * case.seqlen_q * case.seqlen_kv
    if scores > _MAX_XLA_SCORES_BYTES:
        raise UnsupportedCaseError(f"its scores take {scores / 2**30:.0f} GiB")
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=case.is_causal, implementation="xla"
    )


def _attention_tokamax(case: AttentionCase) -> Callable:
    # It imports a profiling tool that running a kernel does not need.
    tool = "xprof.cli.tools.get_kernel_stats_tool"
    if "xprof" not in sys.modules and importlib.util.find_spec("xprof") is None:
        parts = tool.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            sys.modules.setdefault(name, types.ModuleType(name))
    import tokamax

    return functools.partial(
        tokamax.dot_product_attention,
        is_causal=case.is_causal,
        implementation="mosaic",
    )


def _attention_fa3(case: AttentionCase) -> Callable:
    if case.head_dim != 128:
        raise UnsupportedCaseError("its wheel has head dim 128 only")
    from flash_attn3_jax import flash_mha

    return functools.partial(flash_mha, is_causal=case.is_causal)


def _attention_jla(case: AttentionCase) -> Callable:
    if not case.is_causal:
        raise UnsupportedCaseError("it is causal only")
    if case.head_dim not in (64, 128):
        raise UnsupportedCaseError("it has head dims 64 and 128 only")
    from jla.ops.mosaic_gpu.attention import flash_attention

    return flash_attention


def _matmul_tk(case: MatmulCase) -> Callable:
    return functools.partial(
        tk_jax.matmul,
        transpose_a=case.transposes[0] == "t",
        transpose_b=case.transposes[1] == "t",
        implementation="tk",
    )


def _matmul_cublas(case: MatmulCase) -> Callable:
    # XLA hands the transposition to cuBLAS as a flag.
    def run(a, b):
        a = jnp.swapaxes(a, -1, -2) if case.transposes[0] == "t" else a
        b = jnp.swapaxes(b, -1, -2) if case.transposes[1] == "t" else b
        return jnp.matmul(a, b)

    return run


# Name: (what it needs installed, how it is built for a case).
IMPLEMENTATIONS = {
    "attention": {
        "tk": (None, _attention_tk),
        "cudnn": (None, _attention_cudnn),
        "tokamax": ("tokamax", _attention_tokamax),
        "flash-attn3-jax": ("flash_attn3_jax", _attention_fa3),
        "jla": ("jla", _attention_jla),
        "xla": (None, _attention_xla),
    },
    "matmul": {
        "tk": (None, _matmul_tk),
        "cublas": (None, _matmul_cublas),
    },
}
# Slow, and compared with once: runs when it is asked for.
_NOT_BY_DEFAULT = ("xla",)
# These compile and first run one by one, after the others. XLA times candidates for
# its matrix products while it compiles them: beside other work on the GPU it would
# choose a worse one. flash-attn3-jax, first called while other threads work, has
# returned wrong gradients, broken cuDNN's graph captures and crashed.
COMPILED_ALONE = ("cublas", "xla", "flash-attn3-jax")


def installed(op: str) -> list[str]:
    """The implementations that can run here, and run by default."""
    return [
        name
        for name, (package, _) in IMPLEMENTATIONS[op].items()
        if name not in _NOT_BY_DEFAULT
        and (package is None or importlib.util.find_spec(package) is not None)
    ]


def build(op: str, name: str, case) -> Callable:
    """The function of the case's arrays, or :class:`UnsupportedCaseError`."""
    package, builder = IMPLEMENTATIONS[op][name]
    if package is not None and importlib.util.find_spec(package) is None:
        raise UnsupportedCaseError(f"the package {package} is not installed")
    return builder(case)


def is_ours(name: str) -> bool:
    return name == "tk" or name.startswith("tk[")
