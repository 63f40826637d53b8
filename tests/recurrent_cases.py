"""What the tests of recurrent ops share: inputs, losses, and the measure of errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Compiling is most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Relative RMS errors: of outputs and states, of gradients, of gradients of gates.
BARS = {
    "bfloat16": (5e-3, 1e-2, 2e-2),
    "float16": (2e-3, 5e-3, 5e-3),
    "float32": (3e-6, 1e-5, 3e-5),
    "float64": (1e-13, 1e-12, 1e-12),
}


# For what stands for low precision: where a rounding to a narrow type is followed by a
# widening, XLA may leave out both, and on GPUs it does.
AS_WRITTEN = {"xla_allow_excess_precision": False}


def quick_jit(fn, *, as_written=False, **settings):
    options = QUICK | AS_WRITTEN if as_written else QUICK
    return jax.jit(fn, compiler_options=options, **settings)


def relative_rms(got, exact) -> float:
    got, exact = (np.asarray(x, np.float64) for x in (got, exact))
    assert got.shape == exact.shape
    error, size = (np.sqrt(np.mean(np.square(x))) for x in (got - exact, exact))
    return 0.0 if error == 0 else float(error / size)


def decays(rng, shape) -> np.ndarray:
    """Logarithms from 0 to -80, with some exactly 0, some -80 and some -inf."""
    log_decay = -np.exp(2 * rng.standard_normal(shape) - 2)
    kind = rng.random(shape)
    log_decay[kind < 0.15] = 0
    log_decay[kind > 0.92] = -80
    log_decay[kind > 0.98] = -np.inf
    return log_decay


def rounded(tree, dtype, exact=()):
    """Arrays of a dict in ``dtype``; states and gates, in ``exact``, in float32."""

    def cast(name, x):
        wide = jnp.promote_types(dtype, jnp.float32)
        if x is None or not jnp.issubdtype(np.asarray(x).dtype, jnp.floating):
            return x
        return jnp.asarray(x, wide if name in exact else dtype)

    return {
        name: jax.tree.map(functools.partial(cast, name), value)
        for name, value in tree.items()
    }


def weights_like(tree, seed=7):
    """Cotangents: unrelated numbers for each array of a result, exact in every dtype.

    Rounded for results of low precision and not for float64, they would be other
    cotangents: a sum that cancels differs by more than what its computation adds.
    """
    rng = np.random.default_rng(seed)

    def weights(x):
        units = np.round(64 * rng.standard_normal(x.shape))  # bfloat16 has eight bits
        return np.clip(units, -255, 255) / 64

    return jax.tree.map(weights, tree)


def values_and_gradients(fn, arrays: dict, cotangents=None, *, as_written=False):
    """fn(**arrays), and the gradients of its floating arrays by name.

    ``as_written`` keeps every rounding: for what stands for low precision.
    """
    return next(samples(fn, [arrays], cotangents, as_written=as_written))


def samples(fn, many: list[dict], cotangents=None, *, as_written=False):
    """Yields ``values_and_gradients`` of each: one program, integers of the first.

    Where ``cotangents`` are not given, each has its own.
    """
    names = [name for name, value in many[0].items() if _floats(value)]
    others = {name: many[0][name] for name in many[0] if name not in names}

    def values(floating):
        return fn(**floating, **others)

    def run(floating, given):
        results, pull_back = jax.vjp(values, floating)
        given = jax.tree.map(lambda w, x: w.astype(x.dtype), given, results)
        return results, pull_back(given)[0]

    run = quick_jit(run, as_written=as_written)
    for index, arrays in enumerate(many):
        floating = {name: arrays[name] for name in names}
        given = cotangents
        if given is None:
            given = weights_like(jax.eval_shape(values, floating), seed=7 + index)
        yield run(floating, jax.tree.map(np.asarray, given))


def _floats(value) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and jnp.issubdtype(leaves[0].dtype, jnp.floating)


# Of fewer values, the largest error and the RMS error are a matter of luck.
ENOUGH = 16
# Where a seed takes no time. Of twelve samples of 16 gradients of A, whose RMS error is
# 0.72 times that of plain XLA, one had a largest error 2.17 times as large, the others
# 0.4 to 1.1.
PLENTY = 32


def seeds_for(arrays: dict, work: float, enough: int = ENOUGH) -> range:
    """For ``enough`` values of each gradient; fewer where that takes too long.

    ``work`` is that of one seed, as a part of what all may take.
    """
    leaves = jax.tree.leaves([value for value in arrays.values() if _floats(value)])
    wanted = -(-enough // min(x.size for x in leaves))
    return range(max(1, min(wanted, int(1 / work))))


def pooled(trees, enough=ENOUGH):
    """Of the same results of several samples, small arrays as one; of others the first.

    Small are those of fewer than ``enough`` values. No sample is kept for longer than
    it takes.
    """
    found = []
    for tree in trees:
        leaves, structure = jax.tree.flatten(tree)
        found = found or [[] for _ in leaves]
        for kept, x in zip(found, leaves, strict=True):
            if not kept or x.size < enough:
                kept.append(x)
    joined = [kept[0] if len(kept) == 1 else np.stack(kept) for kept in found]
    return structure.unflatten(joined)


def compare(fn, reference, arrays: dict, dtype, exact=(), gates=()) -> None:
    """``fn`` against ``reference`` in float64, from the same rounded inputs.

    Both return (out, state). Names in ``gates`` have the wider bar. Gradients of few
    values are those for several cotangents.
    """
    times = len(seeds_for(arrays, work=1 / 8))
    with jax.enable_x64(True):
        given = rounded(arrays, dtype, exact)
        got, gradients = pooled(samples(fn, [given] * times))
        wide = jax.tree.map(
            lambda x: (
                jnp.asarray(x, jnp.float64)
                if jnp.issubdtype(x.dtype, jnp.floating)
                else x
            ),
            given,
        )
        expected, exact_gradients = pooled(samples(reference, [wide] * times))
        for name, gradient in gradients.items():
            leaves = map(jax.tree.leaves, (gradient, given[name]))
            for x, y in zip(*leaves, strict=True):
                assert x.dtype == y.dtype
        assert_within_bars((got, gradients), (expected, exact_gradients), dtype, gates)


def assert_within_bars(got, exact, dtype, gates=()) -> None:
    """Of pairs of results and, by name, gradients; those of ``gates`` have a wider bar.

    What is zero in ``exact`` has to be.
    """
    value_bar, gradient_bar, gate_bar = BARS[jnp.dtype(dtype).name]
    for index, (x, y) in enumerate(
        zip(*map(jax.tree.leaves, (got[0], exact[0])), strict=True)
    ):
        error = relative_rms(x, y)
        assert error <= value_bar, f"result {index}: {error:.1e}"
    for name, expected in exact[1].items():
        bar = gate_bar if name in gates else gradient_bar
        for x, y in zip(*map(jax.tree.leaves, (got[1][name], expected)), strict=True):
            error = relative_rms(x, y)
            assert error <= bar, f"gradient of {name}: {error:.1e}"


def segments(rng, batch: int, seqlen: int) -> np.ndarray:
    """Ids of segments of one token and more; some ids do not occur, some come twice."""
    starts = rng.random((batch, seqlen)) < 0.1
    starts[:, seqlen // 3 : seqlen // 3 + 2] = True  # a segment of one token
    return np.asarray((starts.cumsum(1) * 3) % 21, np.int32)


def split_at(arrays: dict, time_axes: dict, at: list[int]) -> list[dict]:
    """The arrays of each piece of a sequence."""
    pieces = [dict(arrays) for _ in range(len(at) + 1)]
    for name, axis in time_axes.items():
        if arrays.get(name) is not None:
            for piece, x in zip(pieces, jnp.split(arrays[name], at, axis), strict=True):
                piece[name] = x
    return pieces
