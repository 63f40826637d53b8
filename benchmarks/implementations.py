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
from benchmarks import packages, recurrent, recurrent_rivals, torch_rivals
from benchmarks.cases import AttentionCase, MatmulCase
from benchmarks.programs import Programs
from benchmarks.recurrent import UnsupportedCaseError
from benchmarks.torch_programs import TorchPrograms, TorchRival

# Beyond this, XLA's own attention would not fit beside its gradients.
_MAX_XLA_SCORES_BYTES = 10 * 2**30


def documents_of(case: AttentionCase) -> dict:
    """The arguments of tk_jax.attention that pack a case's documents."""
    if case.documents == 1:
        return {}
    ids = jnp.arange(case.seqlen_q, dtype=jnp.int32)
    ids //= case.seqlen_q // case.documents
    # As data: what is computed from them is part of every call.
    return {"q_segment_ids": jax.lax.optimization_barrier(ids)}


def _attention_tk(case: AttentionCase, **options) -> Callable:
    def run(q, k, v):
        return tk_jax.attention(
            q,
            k,
            v,
            is_causal=case.is_causal,
            local_window_size=case.local_window_size,
            **documents_of(case),
            implementation="tk",
            **options,
        )

    return run


def _jax_attention(case: AttentionCase, implementation: str) -> Callable:
    if case.documents > 1:
        raise UnsupportedCaseError("jax.nn has no packed documents")
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=case.is_causal,
        local_window_size=case.local_window_size,
        implementation=implementation,
    )


def _attention_cudnn(case: AttentionCase) -> Callable:
    return _jax_attention(case, "cudnn")


def _attention_xla(case: AttentionCase) -> Callable:
    scores = 4 * case.batch * case.num_heads * case.seqlen_q * case.seqlen_kv
    if scores > _MAX_XLA_SCORES_BYTES:
        raise UnsupportedCaseError(f"its scores take {scores / 2**30:.0f} GiB")
    return _jax_attention(case, "xla")


def _refuse_masks(case: AttentionCase) -> None:
    if case.documents > 1 or case.window is not None:
        raise UnsupportedCaseError("measured here without windows and documents")


def _attention_tokamax(case: AttentionCase) -> Callable:
    _refuse_masks(case)
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
    _refuse_masks(case)
    if (case.head_dim, case.value_dim) != (128, 128):
        raise UnsupportedCaseError("its wheel has head dim 128 only")
    from flash_attn3_jax import flash_mha

    return functools.partial(flash_mha, is_causal=case.is_causal)


def _attention_jla(case: AttentionCase) -> Callable:
    _refuse_masks(case)
    if not case.is_causal:
        raise UnsupportedCaseError("it is causal only")
    if case.head_dim not in (64, 128) or case.value_dim != case.head_dim:
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


# Ours with gradients summed in any order; forward it is "tk".
ANY_ORDER = "tk[any-order]"
# Name: (what it needs, as the name of a package or one of benchmarks.packages; how it
# is built for a case).
IMPLEMENTATIONS = {
    "attention": {
        "tk": (None, _attention_tk),
        ANY_ORDER: (None, functools.partial(_attention_tk, deterministic=False)),
        "cudnn": (None, _attention_cudnn),
        "tokamax": ("tokamax", _attention_tokamax),
        "flash-attn3-jax": ("flash_attn3_jax", _attention_fa3),
        "jla": ("jla", _attention_jla),
        "flash-attn-4": ("flash_attn.cute", torch_rivals.flash_attn_4),
        "xla": (None, _attention_xla),
    },
    "matmul": {
        "tk": (None, _matmul_tk),
        "cublas": (None, _matmul_cublas),
    },
    **{
        op: known | recurrent_rivals.RIVALS[op]
        for op, known in recurrent.IMPLEMENTATIONS.items()
    },
}
# Slow, and compared with once: runs when it is asked for.
_NOT_BY_DEFAULT = ("xla",)
_RECURRENT_TORCH = sorted(
    {name for op in recurrent_rivals.RIVALS.values() for name in op}
)
# These are functions of torch's tensors.
_TORCH = ("flash-attn-4", *_RECURRENT_TORCH)
# These compile and first run one by one, after the others. XLA times candidates for
# its matrix products while it compiles them: beside other work on the GPU it would
# choose a worse one. flash-attn3-jax, first called while other threads work, has
# returned wrong gradients, broken cuDNN's graph captures and crashed. Triton too times
# candidates.
COMPILED_ALONE = ("cublas", "xla", "flash-attn3-jax", *_RECURRENT_TORCH)


def installed(op: str) -> list[str]:
    """The implementations that can run here, and run by default."""
    return [
        name
        for name, (package, _) in IMPLEMENTATIONS[op].items()
        if name not in _NOT_BY_DEFAULT and _lacking(package) is None
    ]


def absent(op: str) -> dict[str, str]:
    """The others that would run by default, and what they lack."""
    lacking = {
        name: _lacking(package)
        for name, (package, _) in IMPLEMENTATIONS[op].items()
        if name not in _NOT_BY_DEFAULT
    }
    return {name: reason for name, reason in lacking.items() if reason is not None}


def options(op: str) -> set[str]:
    """Of those that say where a package is, what concerns an op."""
    needed = (package for package, _ in IMPLEMENTATIONS[op].values())
    return {x.option for x in needed if isinstance(x, packages.Package)}


def _lacking(package: str | packages.Package | None) -> str | None:
    if isinstance(package, packages.Package):
        return package.lacking()
    if package is None or packages.is_importable(package):
        return None
    return f"the package {package} is not installed"


def programs(op: str, name: str, case, directions, backward: str):
    """What runs a case, or :class:`UnsupportedCaseError`."""
    package, builder = IMPLEMENTATIONS[op][name]
    if lacking := _lacking(package):
        raise UnsupportedCaseError(lacking)
    if name == ANY_ORDER:
        directions = [direction for direction in directions if direction == "bwd"]
        if not directions:
            raise UnsupportedCaseError("forward it is tk")
        backward = "direct"
    if name in _TORCH:
        rival = builder(case)
        if not isinstance(rival, TorchRival):
            rival = TorchRival(rival, clock="wall")
        if not rival.has_backward:
            directions = [direction for direction in directions if direction == "fwd"]
        if not directions:
            raise UnsupportedCaseError("it has no backward pass")
        return TorchPrograms(rival, directions)
    try:
        return Programs(builder(case), case, directions, backward)
    except NotImplementedError as reason:
        raise UnsupportedCaseError(str(reason)) from reason


def functions(op: str, names) -> dict[str, Callable]:
    """The builders of those that are functions of jax's arrays."""
    return {
        name: IMPLEMENTATIONS[op][name][1]
        for name in names
        if name not in (*_TORCH, ANY_ORDER)
    }


def uses_torch(names) -> bool:
    return any(name in _TORCH for name in names)


def is_ours(name: str) -> bool:
    return name == "tk" or name.startswith("tk[")
