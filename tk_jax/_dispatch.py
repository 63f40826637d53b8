"""Which implementation a call runs: the choice, its one warning, its explanation.

Every op offers ``implementation``:

* ``None``: the TK kernel on CUDA where it supports the call, otherwise XLA. Where a GPU
  would run XLA only because the kernel lacks something, a warning says so, once per
  reason and process.
* ``"tk"``: the TK kernel, or an error that says what it lacks.
* ``"xla"``: XLA on every platform.
* ``"interpret"``: the TK kernel's own source, run and checked on the CPU.

With ``None`` the platform is not known while tracing, so both forms are traced and the
one for the platform at hand is lowered (``jax.lax.platform_dependent``).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import (
    AxisType,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
)

from tk_jax import _check, _ffi

IMPLEMENTATIONS = (None, "tk", "xla", "interpret")

# Folders of code that a warning does not point at.
_NOT_THE_USERS = tuple(
    os.path.join(os.path.dirname(os.path.abspath(module.__file__)), "")
    for module in (_check, jax)
)

_explainers: dict[Callable, Callable] = {}
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """A GPU runs the XLA implementation because the TK kernel lacks something."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a call of ``op`` runs on CUDA and elsewhere, and why."""

    op: str
    requested: str | None
    cuda: str
    elsewhere: str
    reason: str

    def __str__(self) -> str:
        platform = jax.default_backend()
        here = self.cuda if platform == "gpu" else self.elsewhere
        return (
            f"{self.op} with implementation={self.requested!r} runs\n"
            f"  on an NVIDIA GPU  {_DESCRIPTIONS[self.cuda]}\n"
            f"  elsewhere         {_DESCRIPTIONS[self.elsewhere]}\n"
            f"  {f'here ({platform})':<16}  {_DESCRIPTIONS[here]}\n"
            f"because {self.reason}"
        )

    __repr__ = __str__


_DESCRIPTIONS = {
    "tk": "tk: the TK kernel",
    "xla": "xla: the XLA implementation",
    "error": "error: the TK kernel needs an NVIDIA GPU",
    "interpret": "interpret: the TK kernel, run and checked on the CPU",
    "no interpreter": "error: the interpreter runs on the CPU alone",
}
_EMPTY = "the TK kernel has nothing to do in a batch of 0"


def choose(
    op: str, implementation: str | None, unsupported: str | None, *, empty: bool = False
) -> Choice:
    """Chooses; ``unsupported`` names what the TK kernel lacks for this call, if any.

    Nothing is launched for an ``empty`` batch.
    """
    choice = _choose(op, implementation, unsupported)
    if not empty or choice.cuda == "xla":
        return choice
    return dataclasses.replace(choice, cuda="xla", elsewhere="xla", reason=_EMPTY)


def _choose(op: str, implementation: str | None, unsupported: str | None) -> Choice:
    _check.check_choice(op, "implementation", implementation, IMPLEMENTATIONS)
    if implementation == "xla":
        return Choice(op, "xla", "xla", "xla", "implementation='xla' asks for it")
    if implementation == "interpret":
        return _choose_interpreter(op, unsupported)
    if broken := _ffi.unavailable():
        if implementation == "tk":
            raise NotImplementedError(f"{op}: implementation='tk': {broken}")
        return Choice(op, None, "xla", "xla", broken)
    lacking = unsupported or _unsupported_gpu()
    if implementation == "tk":
        if lacking:
            raise NotImplementedError(
                f"{op}: implementation='tk' does not support {lacking}; "
                "use implementation=None or implementation='xla'"
            )
        return Choice(op, "tk", "tk", "error", "implementation='tk' asks for it")
    if lacking:
        return Choice(
            op, None, "xla", "xla", f"the TK kernel does not support {lacking}"
        )
    return Choice(op, None, "tk", "xla", "the TK kernel supports this call")


def _choose_interpreter(op: str, unsupported: str | None) -> Choice:
    problem = f"does not support {unsupported}" if unsupported else None
    if problem is None:
        try:
            _ffi.interpreter()
        except ImportError as error:
            problem = f"cannot run: {error}"
    if problem:
        raise NotImplementedError(f"{op}: implementation='interpret' {problem}")
    return Choice(
        op,
        "interpret",
        "no interpreter",
        "interpret",
        "implementation='interpret' asks for it",
    )


def warn_of_fallback(choice: Choice) -> None:
    """Warns, once per reason, where a GPU runs XLA although nobody asked for it."""
    fell_back = choice.requested is None and choice.cuda == "xla"
    if not fell_back or choice.reason == _EMPTY or jax.default_backend() != "gpu":
        return
    message = f"{choice.op} runs its XLA implementation: {choice.reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(
            f"{message}. implementation='xla' silences this warning; "
            "implementation='tk' makes it an error.",
            FallbackWarning,
            stacklevel=_stacklevel_of_user(),
        )


def _stacklevel_of_user() -> int:
    """Of a warning of the caller: the line outside this package, and outside jax."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    return level


def run_chosen(choice: Choice, *args, tk: Callable, xla: Callable):
    """Runs ``tk`` or ``xla`` on ``args``, by platform where the choice depends on it.

    Both must return arrays of the same types.
    """
    if choice.cuda == choice.elsewhere:
        return xla(*args)
    if choice.elsewhere == "error":

        def refuse(first, *rest):
            return xla(_needs_cuda.bind(first, op=choice.op), *rest)

        return lax.platform_dependent(*args, cuda=tk, default=refuse)
    if choice.elsewhere == "interpret":
        return run_on_cpu(choice.op, tk, *args, other=xla)
    return lax.platform_dependent(*args, cuda=tk, default=xla)


def without_derivatives(op: str, run: Callable) -> Callable:
    """``run``, which is a kernel or its derivative, and has none itself.

    For what rules of first order call: a derivative of those is one of second order,
    of which XLA would say no more than that a call cannot be differentiated.
    """
    once = jax.custom_jvp(run)

    @once.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            f"{op}: the TK kernel has no derivatives of higher order; "
            "use implementation='xla'"
        )

    return once


def run_on_cpu(op: str, run: Callable, *args, other: Callable | None = None):
    """Runs ``run(*args)``, which only the CPU can; other platforms refuse ``op``.

    ``other`` has results of the same types and can be compiled anywhere.
    """
    if not args:
        return run()

    def refuse(first, *rest):
        return (other or run)(_needs_cpu.bind(first, op=op), *rest)

    return lax.platform_dependent(*args, cpu=run, default=refuse)


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside ``shard_map``, makes all vary over the mesh axes that any varies over.

    A kernel's result has the type of its first operand; and the transpose of this cast
    is what sums the gradient of an operand that devices share.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*varying)
    return tuple(
        lax.pcast(x, tuple(sorted(every - axes)), to="varying") if every - axes else x
        for x, axes in zip(arrays, varying, strict=True)
    )


def vary_together_in(tree):
    """:func:`vary_together` for all arrays of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(vary_together(*leaves))


def explicit_spec(x: jax.Array) -> tuple:
    """How the axes of ``x`` are split along explicit mesh axes, one entry for each."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def explicit_specs(tree):
    """:func:`explicit_spec` of each array of a tree, as results may be split by."""
    return jax.tree.map(lambda x: PartitionSpec(*explicit_spec(x)), tree)


def run_without_explicit_axes(run: Callable, specs, *args):
    """``run(*args)`` on a mesh with explicit axes too, of which ops know no rules.

    Inside, XLA splits arrays by these axes as it likes. ``specs`` is what results are
    split by outside.
    """
    # Inside set_mesh, what ops make is on its mesh although arguments may be on none.
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
    for mesh in (get_abstract_mesh(), *meshes):
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in types if kind == AxisType.Explicit)
        if explicit:
            split = jax.tree.map(
                lambda spec, mesh=mesh: NamedSharding(mesh, spec),
                specs,
                is_leaf=lambda x: isinstance(x, PartitionSpec),
            )
            return auto_axes(run, axes=explicit, out_sharding=split)(*args)
    return run(*args)


def explains(op: Callable) -> Callable:
    """Registers the decorated function as what answers ``explain(op, ...)``."""

    def register(explainer: Callable) -> Callable:
        _explainers[op] = explainer
        return explainer

    return register


def explain(op: Callable, *args, **kwargs) -> Choice:
    """Says which implementation a call runs on each platform, and why.

    Takes an op of this package, or ``tk_jax.nn.dot_product_attention``, and the
    arguments of the call, which is checked but not run: ``jax.ShapeDtypeStruct`` may
    stand for an array. Printing the result shows it in words.

    >>> import jax, jax.numpy as jnp, tk_jax
    >>> q = jax.ShapeDtypeStruct((2, 128, 8, 64), jnp.float32)
    >>> tk_jax.explain(tk_jax.attention, q, q, q).reason
    'the TK kernel does not support dtype float32 (it takes bfloat16 and float16)'
    """
    if op not in _explainers:
        known = ", ".join(sorted(known.__name__ for known in _explainers))
        raise ValueError(f"explain: op is {op!r}; expected one of {known}")
    return _explainers[op](*args, **kwargs)


def _unsupported_gpu() -> str | None:
    """What the default device is, if it is a GPU that no TK kernel runs on."""
    if jax.default_backend() != "gpu":
        return None  # Lowering for CUDA from elsewhere: nothing to inspect.
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] == "9":
        return None
    return (
        f"the GPU {device.device_kind} of compute capability {capability} "
        "(it needs Hopper, 9.0)"
    )


def _refuse(op: str, implementation: str, needs: str, platforms: str):
    raise NotImplementedError(
        f"{op}: implementation={implementation!r} needs {needs}, but this call is for "
        f"{platforms}; use implementation=None or implementation='xla'"
    )


def _make_refusal(name: str, implementation: str, needs: str) -> Primitive:
    """The identity, which no platform can run.

    It stands where a kernel is missing, so that the error comes when, and only when, a
    platform without one is compiled for.
    """
    refusal = Primitive(name)
    refusal.def_abstract_eval(lambda value, *, op: value)
    batching.defvectorized(refusal)
    refusal.def_impl(
        lambda value, *, op: _refuse(op, implementation, needs, jax.default_backend())
    )
    mlir.register_lowering(
        refusal,
        lambda context, value, *, op: _refuse(
            op, implementation, needs, ", ".join(context.module_context.platforms)
        ),
    )
    return refusal


_needs_cuda = _make_refusal("tk_needs_cuda", "tk", "an NVIDIA Hopper GPU")
_needs_cpu = _make_refusal("tk_needs_cpu", "interpret", "the CPU")
