"""One token's step of states by a kernel, which reads and writes them once, in place.

For each head, with a state S that is [V, K], or [K, V] with ``values_last``::

    S   <- decay S + weight v k^T
    out  = scale S q + skip * v

The kernel (``cuda/kernels/state_step``) is bound by memory: everything but the state is
small. Derivatives are those of the same step in XLA operations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from tk_jax import _dispatch, _ffi

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# As in state_step.h: queries of one state.
MAX_QUERIES = 8
# Blocks are counted in 32 bits; none has fewer than so many columns of values.
_MAX_BLOCKS = 2**31 - 1
_LEAST_COLUMNS = 16
_MAX_DIM = 2**31 - 65


@dataclasses.dataclass(frozen=True)
class StateStepOptions:
    """What a step computes."""

    scale: float
    values_last: bool  # states are [K, V] instead of [V, K]
    normalize: bool  # there are sums of keys as well, and out is divided by theirs
    # q and k are values, of which the kernel makes K features: those of Based attention
    # in their public order. `scale` is that of the queries' values.
    taylor: bool = False


@dataclasses.dataclass(frozen=True)
class StateStepConfig:
    """How the kernel runs."""

    columns: int  # of a tile of the state


class Arrays(NamedTuple):
    """The arrays of a step; those that may be None are.

    Gates may have axes of size 1. G divides H; with several queries of a state, R of
    each, their heads are R H. out has the dtype of v.
    """

    q: jax.Array  # [B, G or R H, K]; with taylor [B, G, d]
    k: jax.Array  # [B, G, K] or [B, G, d], of the dtype of q
    v: jax.Array  # [B, H, V]
    state: jax.Array  # float32 [B, H, V, K] or [B, H, K, V]
    normalizer: jax.Array | None = None  # float32 [B, H, K]: of keys
    decays: jax.Array | None = None  # float32 [B, H]: factors, not logarithms
    weights: jax.Array | None = None  # float32 [B, H]
    skip: jax.Array | None = None  # float32 [B, H, V]
    # With normalize, what is added to out and to what it is divided by, before that.
    numerators: jax.Array | None = None  # float32 [B, H or R H, V]
    divisors: jax.Array | None = None  # float32 [B, H or R H]


class Results(NamedTuple):
    """What a step returns."""

    out: jax.Array  # [B, H or R H, V]
    state: jax.Array
    normalizer: jax.Array | None


# Which tile, by the queries that have accumulators in registers beside it.
_COLUMNS_BY_QUERIES = ((2, 64), (4, 32), (MAX_QUERIES, 16))


def config(columns: int, queries: int = 1) -> StateStepConfig:
    """For states of so many columns, and queries of each."""
    largest = next(tile for most, tile in _COLUMNS_BY_QUERIES if queries <= most)
    return StateStepConfig(
        columns=next(tile for tile in (16, 32, 64) if tile >= min(columns, largest))
    )


def kernels(dtype: str):
    """Those that are compiled ahead and gated, of all that there are.

    Dtypes of keys and of values, and keyword arguments of ``state_step_specs``: ssd,
    linear attention, Based, and Hedgehog with one and four heads of queries to a head
    of keys.
    """
    one = {"whole": True, "queries": 1, "taylor": False}
    one |= {"config": StateStepConfig(columns=64)}
    rows = one | {"values_last": False, "normalize": False}
    columns = one | {"values_last": True}
    yield dtype, dtype, rows
    yield dtype, dtype, rows | {"config": StateStepConfig(columns=16)}
    for normalize in (False, True):
        yield dtype, dtype, columns | {"normalize": normalize}
        yield dtype, dtype, columns | {"normalize": normalize, "taylor": True}
    for queries in (1, 4):
        tile = config(64, queries)
        several = columns | {"normalize": True, "queries": queries, "config": tile}
        yield "float32", dtype, several


def unsupported(
    shape, key_dim: int, dtype, *, queries: int = 1, steps: str = "steps"
) -> str | None:
    """What the kernel lacks for a call, in words: this is the one place that knows.

    ``shape`` is that of v, [..., H, V].
    """
    if dtype not in KERNEL_DTYPES:
        return (
            f"{steps} in dtype {jnp.dtype(dtype).name} "
            "(it takes bfloat16, float16 and float32)"
        )
    if queries > MAX_QUERIES:
        return (
            f"{queries} heads of queries to one of keys (it takes up to {MAX_QUERIES})"
        )
    blocks = math.prod(shape[:-1]) * -(-shape[-1] // _LEAST_COLUMNS)
    for name, size, limit in (
        ("keys of a dimension", key_dim, _MAX_DIM),
        ("values of a dimension", shape[-1], _MAX_DIM),
        ("a B * H times slices of 16 values", blocks, _MAX_BLOCKS),
    ):
        if size > limit:
            return f"{name} of {size} (it takes up to {limit})"
    return None


def run_chosen(choice: _dispatch.Choice, tk: Callable, xla: Callable, arrays):
    """``tk(arrays)`` or ``xla(arrays)``, as ``choice`` says, for a tree of arrays.

    Both have results of the same types, and derivatives are always those of ``xla``, of
    any order and in either mode.
    """
    if choice.cuda == "xla":
        return xla(arrays)

    @jax.custom_jvp
    def run(arrays):
        leaves, structure = jax.tree.flatten(arrays)

        def unflattened(function):
            return lambda *leaves: function(structure.unflatten(leaves))

        return _dispatch.run_chosen(
            choice, *leaves, tk=unflattened(tk), xla=unflattened(xla)
        )

    @run.defjvp
    def derive(primals, tangents):
        _, results = jax.jvp(xla, primals, tangents)
        return run(*primals), results

    return run(arrays)


def state_step(options: StateStepOptions, arrays: Arrays) -> Results:
    """The step by the kernel, under vmap as one of a larger batch."""
    run = custom_vmap(functools.partial(_call, options))

    @run.def_vmap
    def add_axis(axis_size, in_batched, arrays):
        (batched,) = in_batched
        batch = arrays.q.shape[0 + batched.q]

        def fold(name, x):
            is_batched = getattr(batched, name)
            if name in ("decays", "weights", "skip") and x.shape[0 + is_batched] == 1:
                if not is_batched:
                    return x  # for all
                x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            elif not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * batch, *x.shape[2:])

        folded = (
            None if x is None else fold(name, x) for name, x in arrays._asdict().items()
        )
        results = jax.tree.map(
            lambda x: x.reshape(axis_size, batch, *x.shape[1:]), run(Arrays(*folded))
        )
        return results, jax.tree.map(lambda _: True, results)

    return run(arrays)


def _call(options, arrays) -> Results:
    q, v, state = arrays.q, arrays.v, arrays.state
    batch, num_heads, value_dim = v.shape
    # Again, because vmap may have made the batch larger than the caller's.
    if lacking := unsupported(v.shape, q.shape[-1], v.dtype):
        raise NotImplementedError(
            f"the TK kernel does not support {lacking}; "
            "map over fewer elements at a time or use implementation='xla'"
        )
    out_heads = max(q.shape[1], num_heads)
    normalizer = arrays.normalizer
    in_place = {8: 1} if normalizer is None else {8: 1, 9: 2}
    out, next_state, next_normalizer = _ffi.call(
        "tk_state_step_v1",
        (
            _ffi.result_type(v, (batch, out_heads, value_dim), v.dtype),
            _ffi.result_type(v, state.shape),
            _ffi.result_type(v, None if normalizer is None else normalizer.shape),
        ),
        q,
        arrays.k,
        v,
        *map(_ffi.optional, (arrays.decays, arrays.weights, arrays.skip)),
        *map(_ffi.optional, (arrays.numerators, arrays.divisors)),
        state,
        _ffi.optional(normalizer),
        in_place=in_place,
        options=options,
        config=config(state.shape[-1], out_heads // num_heads),
    )
    return Results(
        out,
        next_state,
        None if normalizer is None else next_normalizer,
    )
