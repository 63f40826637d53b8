"""Checks of user input: one error format for every op.

``<op>: <argument> has <what it has>; expected <what must hold>``

A wrong type is a ``TypeError``, a wrong value a ``ValueError``. What is right but
not supported is a ``NotImplementedError``, raised where the implementation is chosen
(:mod:`tk_jax._dispatch`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Kernels and the copy engine address each dimension with a signed 32-bit integer.
INT32_MAX = 2**31 - 1
_LARGEST = float(jnp.finfo(jnp.float32).max)


def check_array(op: str, name: str, value) -> jax.Array:
    """``value`` as a jax array; lists, scalars and other objects are refused."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__jax_array__"):
        return jnp.asarray(value)
    raise TypeError(
        f"{op}: {name} is of type {type(value).__name__}; expected a jax or numpy array"
    )


def check_shaped(op: str, name: str, value) -> jax.Array | jax.ShapeDtypeStruct:
    """What has the shape and dtype of ``check_array``'s, or such a shape itself."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    if isinstance(value, np.ndarray):
        return jax.eval_shape(jnp.asarray, value)
    return check_array(op, name, value)


def check_shape(
    op: str, name: str, shape: Sequence[int], expected: Sequence[int | str], to_match=""
) -> None:
    """Compares ``shape`` with ``expected``, in which a string stands for any size.

    ``to_match`` says where the expected sizes come from, as in ``"q (2, 64)"``.
    """
    same_rank = len(shape) == len(expected)
    if same_rank and all(
        isinstance(want, str) or got == want
        for got, want in zip(shape, expected, strict=True)
    ):
        return
    reason = f" to match {to_match}" if to_match else ""
    raise ValueError(
        f"{op}: {name} has shape {shape_text(shape)}; "
        f"expected {shape_text(expected)}{reason}"
    )


def check_min_rank(op: str, name: str, shape: Sequence[int], axes: str) -> None:
    """Demands at least the axes in ``axes``, as in ``"T, H, D"``."""
    rank = len(axes.split(","))
    if len(shape) < rank:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(shape)}; "
            f"expected [..., {axes}], at least {rank} dimensions"
        )


def check_broadcasts(
    op: str, name: str, shape: Sequence[int], target: Sequence[int], num_exact: int = 0
) -> None:
    """Demands that ``shape`` broadcasts to ``target``, whose last axes may be exact."""
    first = len(target) - len(shape)
    fits = num_exact <= len(shape) <= len(target) and all(
        got == want or (got == 1 and axis < len(target) - num_exact)
        for axis, (got, want) in enumerate(
            zip(shape, target[first:], strict=True), first
        )
    )
    if not fits:
        exact = (
            f", with {', '.join(str(n) for n in target[-num_exact:])} last"
            if num_exact
            else ""
        )
        raise ValueError(
            f"{op}: {name} has shape {shape_text(shape)}; "
            f"expected one that broadcasts to {shape_text(target)}{exact}"
        )


def check_floating(op: str, name: str, dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{op}: {name} has dtype {jnp.dtype(dtype).name}; "
            "expected a floating-point dtype"
        )


def check_dtype(op: str, name: str, dtype, expected) -> None:
    if dtype != expected:
        raise ValueError(
            f"{op}: {name} has dtype {jnp.dtype(dtype).name}; "
            f"expected {jnp.dtype(expected).name}"
        )


def check_same_dtype(op: str, name: str, dtype, reference: str, expected) -> None:
    if dtype != expected:
        raise ValueError(
            f"{op}: {name} has dtype {jnp.dtype(dtype).name}; expected "
            f"{jnp.dtype(expected).name} to match {reference}"
        )


def check_choice(op: str, name: str, value, choices: Sequence) -> None:
    # `in` would compare arrays elementwise and accept True for 1.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {listed}")


def check_flag(op: str, name: str, value) -> bool:
    """A static bool: a traced one cannot choose a kernel."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{op}: {name} is of type {type(value).__name__}; expected a Python bool"
        )
    return bool(value)


def check_finite_number(op: str, name: str, value) -> float:
    """A static, finite number: a traced one cannot be a kernel's setting."""
    hint = ""
    if isinstance(value, jax.core.Tracer):
        hint = " (a traced value)"
        if name == "scale":
            hint = " (a traced value: multiply the input by it instead)"
    if np.ndim(value) and hasattr(value, "shape"):
        raise ValueError(
            f"{op}: {name} has shape {shape_text(value.shape)}; expected a number"
        )
    if hint or not _is_real(value):
        raise TypeError(
            f"{op}: {name} is of type {type(value).__name__}; "
            f"expected a Python number{hint}"
        )
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{op}: {name} is {value!r}; expected a finite number")
    return number


def check_number_in_sums(
    op: str, name: str, value, dtype, *, or_infinity: float | None = None
) -> float:
    """A static number, finite in float32, or in float64 beside inputs of that.

    ``or_infinity`` is one that may stand for no limit.
    """
    static = _is_real(value) and not isinstance(value, jax.core.Tracer)
    if or_infinity and static and np.ndim(value) == 0 and value == or_infinity:
        return or_infinity
    number = check_finite_number(op, name, value)
    if abs(number) > _LARGEST and jnp.dtype(dtype).name != "float64":
        raise ValueError(
            f"{op}: {name} is {number!r}; expected a finite number of float32"
        )
    return number


def _is_real(value) -> bool:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        dtype = value.dtype
        return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))
    return isinstance(value, int | float) and not isinstance(value, bool)


def shape_text(shape: Sequence[int | str]) -> str:
    """``(2, S, K, 64)``: a shape in which names stand for any size."""
    inner = ", ".join(str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"
