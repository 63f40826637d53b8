"""The state-space dual in XLA operations against its recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import (
    compare,
    quick_jit,
    relative_rms,
    segments,
    split_at,
    values_and_gradients,
)

import tk_jax
from tk_jax.ops.ssd import ssd_reference

pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

GATES = ("dt", "A", "dt_bias")
EXACT = (*GATES, "D", "initial_state")
TIME_AXES = {"x": 1, "dt": 1, "B": 1, "C": 1, "z": 1, "segment_ids": 1}


def _arrays(seqlen, *, groups=2, skip="P", packed=False, plain=False):
    rng = np.random.default_rng(seqlen)
    x, z = rng.standard_normal((2, 2, seqlen, 4, 6))
    B, C = rng.standard_normal((2, 2, seqlen, groups, 8))
    dt = rng.standard_normal((2, seqlen, 4))
    dt[rng.random(dt.shape) < 0.1] = -40  # a step of zero
    dt[rng.random(dt.shape) < 0.05] = 10
    optional = {
        "D": rng.standard_normal((4, 6) if skip == "P" else 4),
        "z": z,
        "dt_bias": rng.standard_normal(4),
        "initial_state": rng.standard_normal((2, 4, 6, 8)),
        "segment_ids": segments(rng, 2, seqlen) if packed else None,
    }
    arrays = {"x": x, "dt": dt, "A": -np.exp(rng.standard_normal(4)), "B": B, "C": C}
    return arrays if plain else arrays | optional


def _pair(**settings):
    settings = {"dt_softplus": True} | settings
    return (
        functools.partial(tk_jax.ssd, return_final_state=True, **settings),
        functools.partial(ssd_reference, dtype=jnp.float64, **settings),
    )


@pytest.mark.parametrize(
    ("seqlen", "dtype", "arrays", "settings"),
    [
        pytest.param(1, "float32", {}, {}, marks=pytest.mark.exhaustive),
        (63, "float32", {"groups": 1}, {"dt_limit": (0.1, 2.0)}),
        (65, "float32", {"groups": 4, "packed": True, "skip": "H"}, {}),
        (130, "float64", {"packed": True}, {}),
        (64, "float64", {"plain": True}, {"dt_softplus": False}),
        (1000, "bfloat16", {"packed": True}, {}),
        pytest.param(200, "float16", {"groups": 1}, {}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_values_and_gradients(seqlen, dtype, arrays, settings):
    compare(*_pair(**settings), _arrays(seqlen, **arrays), dtype, EXACT, GATES)


def test_steps_in_bfloat16_are_computed_in_float32():
    """dt, A, D and dt_bias may come in any dtype; their gradients go back in it."""
    arrays = _arrays(40)
    compare(*_pair(), arrays, jnp.bfloat16, exact=("initial_state",), gates=GATES)


def test_decays_of_eighty_a_token():
    arrays = _arrays(65, plain=True)
    arrays["A"] = -np.array([80.0, 8.0, 1.0, 0.0])
    arrays["dt"] = np.abs(arrays["dt"]) % 2
    arrays["dt"][:, ::3] = 0
    compare(*_pair(dt_softplus=False), arrays, "float32", EXACT, GATES)


def test_gradient_of_dt_passes_at_a_limit_and_not_beyond():
    x = B = C = jnp.ones((1, 1, 1))
    dts = jnp.array([-0.5, 0.0, 0.5, 1.0, 1.5])

    def y(dt):
        settings = {"dt_limit": (0.0, 1.0)}
        return tk_jax.ssd(x, dt[None, None], -jnp.ones(1), B, C, **settings).sum()

    np.testing.assert_array_equal(jax.vmap(y)(dts), [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(jax.vmap(jax.grad(y))(dts), [0, 1, 1, 1, 0])


def test_split_sequence_is_the_whole_one():
    ours, _ = _pair()
    arrays = _arrays(100)

    def in_pieces(**arrays):
        ys, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, TIME_AXES, [66]):
            y, state = ours(**piece, initial_state=state)
            ys.append(y)
        return jnp.concatenate(ys, 1), state

    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        got = values_and_gradients(in_pieces, arrays)
        expected = values_and_gradients(ours, arrays)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-13


def test_packed_segments_are_separate_sequences():
    ours, _ = _pair()
    arrays = _arrays(70)
    del arrays["initial_state"], arrays["segment_ids"]
    ids = jnp.repeat(
        jnp.array([0, 3, 1, 2], jnp.int32),
        jnp.array([5, 1, 0, 64]),
        total_repeat_length=70,
    )

    def packed(**arrays):
        return ours(**arrays, segment_ids=ids)

    def separate(**arrays):
        ys = []
        for start, end in ((0, 5), (5, 6), (6, 70)):
            part = {
                name: x[:, start:end] if name in TIME_AXES else x
                for name, x in arrays.items()
            }
            y, state = ours(**part)
            ys.append(y)
        return jnp.concatenate(ys, 1), state

    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        got = values_and_gradients(packed, arrays)
        expected = values_and_gradients(separate, arrays)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-13


def test_steps_are_the_sequence():
    ours, _ = _pair(dt_limit=(0.01, 3.0))
    arrays = _arrays(5)
    per_token = ("x", "dt", "B", "C", "z")
    with jax.enable_x64(True):
        arrays = {k: jnp.asarray(x) for k, x in arrays.items() if x is not None}
        expected = quick_jit(ours)(**arrays)
        state = jnp.copy(arrays.pop("initial_state"))
        step = functools.partial(
            tk_jax.ssd_step, dt_softplus=True, dt_limit=(0.01, 3.0)
        )
        step = quick_jit(step, donate_argnames="state")
        ys = []
        for t in range(5):
            given = state
            token = {k: x[:, t] if k in per_token else x for k, x in arrays.items()}
            y, state = step(**token, state=state)
            assert given.is_deleted()
            ys.append(y)
        got = (jnp.stack(ys, 1), state)
        for x, y in zip(got, expected, strict=True):
            assert relative_rms(x, y) < 1e-13


def test_memory_is_linear_in_the_length():
    """What the gradient needs beside its arguments and results."""

    def temporaries(seqlen):
        arrays = {
            name: jax.ShapeDtypeStruct(np.shape(x), jnp.float32)
            for name, x in _arrays(64).items()
            if x is not None
        }
        for name in TIME_AXES.keys() & arrays.keys():
            shape = arrays[name].shape
            arrays[name] = jax.ShapeDtypeStruct(
                (shape[0], seqlen, *shape[2:]), jnp.float32
            )

        def loss(arrays):
            return tk_jax.ssd(**arrays, dt_softplus=True).sum()

        compiled = quick_jit(jax.grad(loss)).lower(arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 4.5 * short
    # Chunks of the arguments, of the cotangents and the states at the chunks' starts,
    # but no scores of all chunks.
    token = 4 * 2 * (3 * 4 * 6 + 4 + 2 * 2 * 8)
    states = 4 * 2 * 4 * 6 * 8 / 64
    assert long < 4096 * (5 * token + 4 * states)
