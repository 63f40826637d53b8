"""Checks that the recurrent ops share; messages as :mod:`tk_jax._check` has them.

The ops of whole sequences and their steps for one token have the same axes, but for T.
``time`` is ``(T,)`` in the former and ``()`` in the latter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp

from tk_jax import _check, _dispatch
from tk_jax.ops import _chunks

DTYPES = ("bfloat16", "float16", "float32", "float64")


# Arguments that may be None, those that may be a tuple of arrays, and those that may be
# a Python number.
_OPTIONAL = ("D", "z", "dt_bias", "log_decay", "initial_state", "segment_ids")
_STATES = ("state", "initial_state")
_WEIGHTS = ("alpha", "beta")


def as_arrays(op: str, *, check: Callable = _check.check_array, **values):
    """Arrays, None where there is none; those in a tuple of a state, too.

    With ``check_shaped``, shapes may stand for them.
    """

    def as_array(name, value):
        if value is None and name in _OPTIONAL:
            return None
        if name in _STATES:
            return as_state(name, value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _WEIGHTS and is_number:
            # In float64 where that is enabled: inputs may be, and NumPy's is a number
            # of Python.
            return jnp.asarray(value, float)
        return check(op, name, value)

    def as_state(name, value):
        if isinstance(value, tuple):
            names = getattr(value, "_fields", [None] * len(value))
            items = [
                x if x is None else check(op, f"{name}.{field}" if field else name, x)
                for field, x in zip(names, value, strict=True)
            ]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if hasattr(value, "shape") or hasattr(value, "__jax_array__"):
            return check(op, name, value)
        return value  # The check of the state says what is expected.

    return [as_array(name, value) for name, value in values.items()]


def explain_by_plan(op: Callable, plan: Callable) -> None:
    """Answers ``explain(op, ...)`` with ``plan(...).choice``.

    ``plan`` takes the arguments of ``op`` and checks them but for being arrays: that is
    seen to here as the op does it, and shapes may stand for them.
    """
    signature = inspect.signature(op)
    arrays = {
        name
        for name, parameter in signature.parameters.items()
        if "jax.Array" in parameter.annotation or name in _STATES
    }

    @_dispatch.explains(op)
    def explainer(*args, **kwargs) -> _dispatch.Choice:
        bound = signature.bind(*args, **kwargs)
        given = {name: x for name, x in bound.arguments.items() if name in arrays}
        shaped = as_arrays(op.__name__, check=_check.check_shaped, **given)
        bound.arguments.update(zip(given, shaped, strict=True))
        return plan(*bound.args, **bound.kwargs).choice


def text(name: str, x) -> str:
    """``q (2, 128, 8, 64)``"""
    return f"{name} {_check.shape_text(x.shape)}"


def check_first(op: str, name: str, x, axes: str) -> None:
    """The array that the others are measured by: its rank, sizes and dtype."""
    _check.check_min_rank(op, name, x.shape, axes)
    sizes = x.shape[len(x.shape) - len(axes.split(",")) :]
    check_not_empty(op, name, x, axes)
    if sizes[0] > _check.INT32_MAX:
        raise ValueError(
            f"{op}: {text_of_shape(name, x)}; expected fewer than 2**31 tokens"
        )
    if jnp.dtype(x.dtype).name not in DTYPES:
        raise ValueError(
            f"{op}: {name} has dtype {jnp.dtype(x.dtype).name}; "
            f"expected one of {', '.join(DTYPES)}"
        )


def check_not_empty(op: str, name: str, x, axes: str) -> None:
    """Demands that the last axes, those named, are not of size 0."""
    names = axes.split(", ")
    for axis, size in zip(names, x.shape[len(x.shape) - len(names) :], strict=True):
        if size == 0:
            raise ValueError(
                f"{op}: {text_of_shape(name, x)}; expected {axis} to be at least 1"
            )


def text_of_shape(name: str, x) -> str:
    """``q has shape (2, 128, 8, 64)``"""
    return f"{name} has shape {_check.shape_text(x.shape)}"


def check_divides(op: str, name: str, count: int, what: str, of: str, total: int):
    """Demands that ``name`` has a number of heads or groups that divides another."""
    if total % count:
        raise ValueError(
            f"{op}: {name} has {count} {what}; expected a divisor of the {total} {of}"
        )


def check_gate(op: str, name: str, x, shapes, to_match: str) -> None:
    """A floating array of one of ``shapes``."""
    _check.check_floating(op, name, x.dtype)
    if tuple(x.shape) not in [tuple(shape) for shape in shapes]:
        listed = " or ".join(_check.shape_text(shape) for shape in shapes)
        raise ValueError(
            f"{op}: {text_of_shape(name, x)}; expected {listed} to match {to_match}"
        )


def check_state(op: str, name: str, x, shape, dtype, to_match: str) -> None:
    """One array of a state: its shape, and the dtype that sums have."""
    _check.check_shape(op, name, x.shape, shape, to_match)
    _check.check_dtype(op, name, x.dtype, _chunks.sum_dtype(dtype))


def check_state_tuple(op: str, name: str, state, kind: type) -> None:
    """Demands a state of several arrays: a tuple of as many as ``kind`` has fields."""
    fields = ", ".join(kind._fields)
    if not isinstance(state, tuple):
        raise TypeError(
            f"{op}: {name} is of type {type(state).__name__}; "
            f"expected a tuple of {fields}"
        )
    if len(state) != len(kind._fields) or any(x is None for x in state):
        raise ValueError(
            f"{op}: {name} has {sum(x is not None for x in state)} arrays; "
            f"expected {fields}"
        )


def check_segment_ids(op: str, segment_ids, shape) -> None:
    """int32 ids that broadcast to ``shape`` [*batch, T]."""
    if segment_ids is None:
        return
    _check.check_broadcasts(op, "segment_ids", segment_ids.shape, shape, 1)
    _check.check_dtype(op, "segment_ids", segment_ids.dtype, jnp.int32)


def check_keys_and_values(op: str, q, k, v) -> None:
    """q, k [..., G, K] and v [..., H, V] of one dtype, G dividing H; q is checked."""
    _check.check_shape(op, "k", k.shape, q.shape, text("q", q))
    expected = (*q.shape[:-2], "H", "V")
    _check.check_shape(op, "v", v.shape, expected, text("q", q))
    check_not_empty(op, "v", v, "H, V")
    check_divides(op, "q", q.shape[-2], "heads (G)", "heads (H) of v", v.shape[-2])
    _check.check_same_dtype(op, "k", k.dtype, "q", q.dtype)
    _check.check_same_dtype(op, "v", v.dtype, "q", q.dtype)


def check_sums(op: str, name: str, state, shape, normalize, dtype, to_match) -> None:
    """Sums of keys times values, alone or in a pair with the sums of keys."""
    if not normalize:
        check_is_array(op, name, state)
        check_state(op, name, state, shape, dtype, to_match)
        return
    check_state_tuple(op, name, state, _chunks.NormalizedState)
    check_state(op, f"{name}.sums", state[0], shape, dtype, to_match)
    check_state(op, f"{name}.normalizer", state[1], shape[:-1], dtype, to_match)


def check_is_array(op: str, name: str, x) -> None:
    """Refuses a tuple where one array is expected."""
    if not hasattr(x, "shape"):
        raise TypeError(
            f"{op}: {name} is of type {type(x).__name__}; expected one array"
        )
