"""Hedgehog attention in XLA operations against its definition in float64."""

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
from tk_jax.ops.hedgehog_attention import hedgehog_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

TIME_AXES = {"q": 1, "k": 1, "v": 1}


def _arrays(seqlen, *, packed=False, heads=(4, 2)):
    rng = np.random.default_rng(seqlen)
    num_heads, num_kv_heads = heads
    q = rng.standard_normal((2, seqlen, num_heads, 8))
    k, v = rng.standard_normal((2, 2, seqlen, num_kv_heads, 8))
    return {
        "q": q,
        "k": k,
        "v": v[..., :6],
        "q_map": rng.standard_normal((num_heads, 8, 5)),
        "k_map": rng.standard_normal((num_kv_heads, 8, 5)),
        "alpha": rng.random(num_heads),
        "beta": rng.random(num_heads),
        "segment_ids": segments(rng, 2, seqlen) if packed else None,
    }


def _ours(**settings):
    """With the part of the state that the definition has."""

    def run(**arrays):
        out, state = tk_jax.hedgehog_attention(
            **arrays, return_final_state=True, **settings
        )
        return out, (state.sums, state.normalizer)

    return run


@pytest.mark.parametrize(
    ("seqlen", "dtype", "window", "packed"),
    [
        pytest.param(65, "float32", 8, False, marks=pytest.mark.exhaustive),
        (50, "float64", 4, True),
        (1000, "bfloat16", 64, False),
    ],
)
def test_values_and_gradients(seqlen, dtype, window, packed):
    compare(
        _ours(window=window),
        functools.partial(
            hedgehog_attention_reference, window=window, dtype=jnp.float64
        ),
        _arrays(seqlen, packed=packed),
        dtype,
        exact=("q_map", "k_map", "alpha", "beta"),
    )


@pytest.mark.parametrize(("seqlen", "window"), [(1, 64), (64, 64), (21, 5)])
def test_every_window_and_length(seqlen, window):
    arrays = _arrays(seqlen, packed=True, heads=(2, 2))
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
        settings = {"window": window, "scale": 0.7}
        got = quick_jit(_ours(**settings))(**arrays)
        reference = functools.partial(
            hedgehog_attention_reference, **settings, dtype=jnp.float64
        )
        expected = quick_jit(reference)(**arrays)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


def test_split_sequence_is_the_whole_one():
    """In values and gradients, for pieces that end within a block."""

    def whole(**arrays):
        return tk_jax.hedgehog_attention(**arrays, window=5, return_final_state=True)

    def in_pieces(**arrays):
        outs, state = [], None
        for piece in split_at(arrays, TIME_AXES, [11]):
            out, state = whole(**piece, initial_state=state)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    def without_length(fn):
        def run(**arrays):
            out, state = fn(**arrays)
            return out, state._replace(length=jnp.zeros(()))

        return run

    with jax.enable_x64(True):
        arrays = {
            name: jnp.asarray(x) for name, x in _arrays(22).items() if x is not None
        }
        got, expected = (
            values_and_gradients(without_length(fn), arrays)
            for fn in (in_pieces, whole)
        )
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-13


def test_mixing_weights_that_are_python_numbers_keep_their_digits():
    arrays = _arrays(30) | {"window": 4}
    del arrays["segment_ids"]
    with jax.enable_x64(True):
        expected = tk_jax.hedgehog_attention(
            **arrays | {"alpha": np.full(4, 0.3), "beta": np.full(4, 0.7)}
        )
        for number in (float, np.float64):
            out = tk_jax.hedgehog_attention(
                **arrays | {"alpha": number(0.3), "beta": number(0.7)}
            )
            assert relative_rms(out, expected) < 1e-14


def test_steps_are_the_sequence_even_after_a_packed_row():
    arrays = _arrays(24, packed=True)
    ids = np.zeros((2, 24), np.int32)
    ids[0, 7:], ids[1, 2:10], ids[1, 10:] = 1, 2, 3
    settings = {"window": 3, "return_final_state": True}
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
        arrays["segment_ids"] = jnp.asarray(ids)
        whole = quick_jit(functools.partial(tk_jax.hedgehog_attention, **settings))
        expected = whole(**arrays)
        first, _ = split_at(arrays, TIME_AXES | {"segment_ids": 1}, [12])
        out, state = whole(**first)
        outs = [out]
        del arrays["segment_ids"]
        step = functools.partial(tk_jax.hedgehog_attention_step, window=3)
        step = quick_jit(step, donate_argnames="state")
        state = jax.tree.map(jnp.copy, state)
        for t in range(12, 24):
            given = state
            token = {k: x[:, t] if k in TIME_AXES else x for k, x in arrays.items()}
            out, state = step(**token, state=state)
            assert all(x.is_deleted() for x in jax.tree.leaves(given))
            outs.append(out[:, None])
        got = (jnp.concatenate(outs, 1), state)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-13


def test_a_short_sequence_is_softmax_attention():
    arrays = _arrays(100, heads=(4, 4))
    q, k, v = (jnp.asarray(arrays[name], jnp.float32) for name in "qkv")
    maps = [jnp.asarray(arrays[name], jnp.float32) for name in ("q_map", "k_map")]
    out = tk_jax.hedgehog_attention(q, k, v, *maps, alpha=1.0, beta=2, window=50)
    expected = tk_jax.attention(q, k, v, is_causal=True, implementation="xla")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
