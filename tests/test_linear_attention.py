"""Linear attention in XLA operations against its recurrence in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import (
    compare,
    decays,
    quick_jit,
    relative_rms,
    segments,
    split_at,
    values_and_gradients,
)

import tk_jax
from tk_jax.ops.linear_attention import linear_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

TIME_AXES = {"q": 1, "k": 1, "v": 1, "log_decay": 1}
EXHAUSTIVE = pytest.mark.exhaustive
EXACT = ("log_decay", "initial_state")


def _arrays(
    seqlen, *, decay="token", batch=2, normalize=False, state=True, packed=False
):
    rng = np.random.default_rng(seqlen)
    q, k = rng.standard_normal((2, batch, seqlen, 2, 8))
    v = rng.standard_normal((batch, seqlen, 4, 6))
    initial = rng.standard_normal((batch, 4, 8, 6))
    if normalize:
        q, k = np.abs(q) + 0.1, np.abs(k)
        initial = (initial, np.abs(initial[..., 0]))
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": {
            "token": decays(rng, (batch, seqlen, 4)),
            "head": -np.exp(rng.standard_normal(4) - 2),
            "none": None,
        }[decay],
        "initial_state": initial if state else None,
        "segment_ids": segments(rng, batch, seqlen) if packed else None,
    }


def _ours(**settings):
    return functools.partial(
        tk_jax.linear_attention, return_final_state=True, **settings
    )


def _reference(**settings):
    return functools.partial(linear_attention_reference, dtype=jnp.float64, **settings)


@pytest.mark.parametrize(
    ("seqlen", "dtype", "settings"),
    [
        (1, "float32", {}),
        (63, "float32", {"decay": "head"}),
        (64, "float32", {"decay": "none", "state": False}),
        (65, "float32", {"packed": True}),
        pytest.param(130, "float64", {"packed": True}, marks=EXHAUSTIVE),
        (130, "float64", {"decay": "head", "packed": True, "normalize": True}),
        pytest.param(
            130,
            "float64",
            {"decay": "none", "packed": True, "normalize": True},
            marks=EXHAUSTIVE,
        ),
        (1000, "bfloat16", {}),
        pytest.param(
            1000, "bfloat16", {"decay": "head", "normalize": True}, marks=EXHAUSTIVE
        ),
        pytest.param(
            200, "float16", {"decay": "token", "packed": True}, marks=EXHAUSTIVE
        ),
    ],
    ids=str,
)
def test_values_and_gradients(seqlen, dtype, settings):
    normalize = settings.get("normalize", False)
    compare(
        _ours(normalize=normalize),
        _reference(normalize=normalize),
        _arrays(seqlen, **settings),
        dtype,
        exact=EXACT,
        gates=("log_decay",),
    )


def test_decays_next_to_large_ones_keep_their_digits():
    """After many decays of -80, a small one is a difference of large sums."""
    arrays = _arrays(64, state=False)
    arrays["log_decay"][:, ::2] = -80
    arrays["log_decay"][:, 1::2] = -1e-3
    compare(_ours(), _reference(), arrays, "float32", EXACT, ("log_decay",))


def test_split_sequence_is_the_whole_one():
    arrays = _arrays(130)

    def in_pieces(**arrays):
        outs, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, TIME_AXES, [70]):
            out, state = _ours()(**piece, initial_state=state)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        got = values_and_gradients(in_pieces, arrays)
        expected = values_and_gradients(_ours(), arrays)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-13


def test_packed_segments_are_separate_sequences():
    """In values and gradients; one of the segments has one token."""
    arrays = _arrays(100, batch=1, state=False)
    lengths = (37, 1, 62)

    def packed(**arrays):
        ids = jnp.repeat(
            jnp.array([5, 2, 5], jnp.int32), jnp.array(lengths), total_repeat_length=100
        )
        return _ours()(**arrays | {"segment_ids": ids})

    def separate(**arrays):
        ends = np.cumsum((0, *lengths))
        outs = []
        for start, end in itertools.pairwise(ends):
            part = {
                name: x[:, start:end] for name, x in arrays.items() if x is not None
            }
            out, state = _ours()(**part)
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    with jax.enable_x64(True):
        arrays = {k: jnp.asarray(x) for k, x in arrays.items() if x is not None}
        got = values_and_gradients(packed, arrays)
        expected = values_and_gradients(separate, arrays)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-13


def test_a_decay_of_zero_forgets_and_none_is_a_decay_of_one():
    arrays = _arrays(70, decay="none", state=False)
    q, k, v = (jnp.asarray(arrays[name], jnp.float32) for name in "qkv")
    plain = tk_jax.linear_attention(q, k, v)
    ones = tk_jax.linear_attention(q, k, v, log_decay=jnp.zeros(4))
    np.testing.assert_allclose(plain, ones, rtol=1e-5, atol=1e-5)
    forgetful = tk_jax.linear_attention(q, k, v, log_decay=jnp.full(4, -jnp.inf))
    alone = jnp.einsum("btgk,btgk->btg", q, k)[..., None] * 8**-0.5
    expected = v.reshape(2, 70, 2, 2, 6) * alone[..., None]
    np.testing.assert_allclose(
        forgetful, expected.reshape(v.shape), rtol=1e-5, atol=1e-6
    )


def test_normalized_is_zero_where_all_weights_are():
    q = jnp.zeros((1, 3, 1, 4)).at[:, 1:].set(1.0)
    v = jnp.ones((1, 3, 2, 5))

    def loss(q):
        return tk_jax.linear_attention(q, q, v, normalize=True).sum()

    out = tk_jax.linear_attention(q, q, v, normalize=True)
    np.testing.assert_array_equal(out[0, :, 0, 0], [0, 1, 1])
    assert jnp.isfinite(jax.grad(loss)(q)).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_steps_are_the_sequence(normalize):
    arrays = _arrays(5, normalize=normalize)
    settings = {"normalize": normalize}
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        state = arrays["initial_state"]
        outs = []
        step = quick_jit(
            functools.partial(tk_jax.linear_attention_step, **settings),
            donate_argnames="state",
        )
        expected = quick_jit(_ours(**settings))(**arrays)
        state = jax.tree.map(jnp.copy, state)
        if normalize:
            state = tk_jax.NormalizedState(*state)
        for t in range(5):
            given = state
            out, state = step(
                *(arrays[name][:, t] for name in "qkv"),
                state=state,
                log_decay=arrays["log_decay"][:, t],
            )
            assert all(x.is_deleted() for x in jax.tree.leaves(given))
            outs.append(out)
        for x, y in zip(
            jax.tree.leaves((jnp.stack(outs, 1), state)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            assert relative_rms(x, y) < 1e-13


def test_no_batch_and_two_batch_axes_and_an_empty_one():
    arrays = _arrays(9, packed=True)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    arrays["segment_ids"] = arrays["segment_ids"].astype(jnp.int32)
    expected = _ours()(**arrays)
    alone = _ours()(**jax.tree.map(lambda x: x[0], arrays))
    two = _ours()(**jax.tree.map(lambda x: x[None], arrays))
    for x, y, z in zip(*map(jax.tree.leaves, (alone, two, expected)), strict=True):
        np.testing.assert_allclose(x, z[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y[0], z, rtol=1e-5, atol=1e-6)
    empty, state = _ours()(**jax.tree.map(lambda x: x[:0], arrays))
    assert empty.shape == (0, 9, 4, 6) and state.shape == (0, 4, 8, 6)
