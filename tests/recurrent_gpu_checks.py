"""What the GPU tests of recurrent kernels share: bits, documents, long sequences."""

import functools
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from recurrent_cases import (
    BARS,
    assert_within_bars,
    rounded,
    split_at,
    values_and_gradients,
)

from tk_jax import _ffi

LENGTHS = (1, 63, 64, 65, 1000, 4097)
# Documents of a packed row, ids that do not occur between them: of one token, of a
# chunk and one token, that end within a chunk and with one.
DOCUMENT_ENDS = (1, 2, 67, 128, 300)
_POISON_SIZES = range(6, 28)  # powers of two; 1 GiB in all


def poison() -> None:
    """Fills free memory with NaN: what is allocated next holds it until written to."""
    blocks = [jnp.full(2**size, jnp.nan, jnp.float32) for size in _POISON_SIZES]
    jax.block_until_ready(blocks)


def compile_kernels(specs) -> None:
    """Fills the kernel cache in parallel: one after another takes minutes."""
    specs = {spec["function"]: spec for spec in specs}.values()
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(_ffi.extension().compile, specs))


def assert_same_bits(fn, arrays: dict, times: int = 100) -> None:
    """Of ``fn(**arrays)`` and all gradients, whatever the memory holds that they take.

    What is None or of integers in ``arrays`` has no gradient.
    """
    floating = {
        name: x
        for name, x in arrays.items()
        if x is not None and jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating)
    }
    others = {name: x for name, x in arrays.items() if name not in floating}

    @jax.jit
    def run(floating):
        results, pull_back = jax.vjp(lambda x: fn(**x, **others), floating)
        return results, pull_back(jax.tree.map(jnp.ones_like, results))

    @jax.jit
    def differing(first, again):
        return sum(
            jnp.sum(_bits(x) != _bits(y))
            for x, y in zip(*map(jax.tree.leaves, (first, again)), strict=True)
        )

    first = run(floating)
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(first)]
    assert all(map(bool, finite)), finite
    counts = []
    for index in range(1, times):
        if index % 10 == 1:
            poison()
        counts.append(differing(first, run(floating)))
    assert not any(map(int, counts)), [int(x) for x in counts]


def _bits(x):
    kinds = {2: jnp.uint16, 4: jnp.uint32}
    return jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize])


def in_pieces(fn, time_axes: dict, at: list[int]):
    """``fn`` of a sequence in pieces, each from the state that the last one left."""

    def run(**arrays):
        outs, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, time_axes, at):
            out, state = fn(**piece, initial_state=state)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    return run


def check_documents(fn, arrays: dict, time_axes: dict, dtype, exact, gates=()) -> None:
    """A packed row against its documents apart: results, states and gradients.

    ``arrays`` are of as many tokens as DOCUMENT_ENDS has.
    """
    arrays = rounded(arrays, dtype, exact)
    bounds = [0, *DOCUMENT_ENDS]
    ids = np.repeat(3 * np.arange(len(DOCUMENT_ENDS)), np.diff(bounds))
    packed = functools.partial(fn, segment_ids=jnp.asarray(ids, jnp.int32))

    def apart(**arrays):
        outs, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, time_axes, bounds[1:-1]):
            out, last = fn(**piece, initial_state=state)
            outs.append(out)
            state = None  # the others begin from zeros
        return jnp.concatenate(outs, 1), last

    arrays.pop("segment_ids", None)
    got, expected = (values_and_gradients(run, arrays) for run in (packed, apart))
    assert_within_bars(got, expected, dtype, gates)


def check_many_heads(
    fn, exact_fn, arrays: dict, head_axes: dict, copies: int, gradients: bool
) -> None:
    """``copies`` of the heads at once, each against ``exact_fn`` in float32.

    Both return out alone, heads along axis 2. ``head_axes`` says of which arrays there
    are copies, and where their heads are: their gradients are compared.
    """

    def results(fn, arrays):
        def of_heads(mine):
            return fn(**(arrays | mine))

        mine = {name: arrays[name] for name in head_axes}
        if not gradients:
            return of_heads(mine), {}
        out, pull_back = jax.vjp(of_heads, mine)
        dout = jnp.broadcast_to(jnp.cos(jnp.arange(out.shape[-1])), out.shape)
        return out, pull_back(dout.astype(out.dtype))[0]

    def copied(x, axis):
        return jnp.tile(x, [copies if i == axis else 1 for i in range(x.ndim)])

    @jax.jit
    def whole(arrays):
        more = {name: copied(arrays[name], axis) for name, axis in head_axes.items()}
        return results(fn, arrays | more)

    @jax.jit
    def once(arrays):
        return results(exact_fn, jax.tree.map(jnp.float32, arrays))

    @functools.partial(jax.jit, static_argnums=2)
    def worst(got, exact, axis):
        """The largest relative RMS error of a copy."""
        got = got.reshape(*got.shape[:axis], copies, -1, *got.shape[axis + 1 :])
        error = jnp.square(got.astype(jnp.float32) - jnp.expand_dims(exact, axis))
        errors = error.sum([i for i in range(error.ndim) if i != axis])
        return jnp.sqrt(errors.max() / jnp.square(exact).sum())

    with jax.default_matmul_precision("highest"):
        exact_out, exact_gradients = jax.block_until_ready(once(arrays))
    out, found = whole(arrays)
    value_bar, _, gate_bar = BARS[jnp.dtype(out.dtype).name]
    error = float(worst(out, exact_out, 2))
    assert error <= value_bar, f"out: {error:.1e}"
    for name, gradient in found.items():
        error = float(worst(gradient, exact_gradients[name], head_axes[name]))
        assert error <= gate_bar, f"gradient of {name}: {error:.1e}"
