"""Based attention in XLA operations against its recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import compare, quick_jit, relative_rms, segments, split_at

import tk_jax
from tk_jax.ops.based_attention import based_attention_reference
from tk_jax.ops.based_attention.features import TAYLOR

pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")


def _arrays(seqlen, dim=8, *, normalize=True, packed=False):
    rng = np.random.default_rng(seqlen)
    q, k = rng.standard_normal((2, 2, seqlen, 2, dim))
    v, earlier = rng.standard_normal((2, 2, seqlen, 4, 6))
    # A state that keys have made: with another, the divisors may be zero.
    _, state = based_attention_reference(k, q, earlier, normalize=normalize)
    return {
        "q": q,
        "k": k,
        "v": v,
        "initial_state": jax.tree.map(np.asarray, state),
        "segment_ids": segments(rng, 2, seqlen) if packed else None,
    }


def _ours(**settings):
    return functools.partial(
        tk_jax.based_attention, return_final_state=True, **settings
    )


@pytest.mark.parametrize(
    ("seqlen", "dim", "dtype", "normalize", "packed"),
    [
        pytest.param(1, 24, "float32", True, False, marks=pytest.mark.exhaustive),
        (65, 8, "float32", False, True),
        pytest.param(130, 8, "float64", True, True, marks=pytest.mark.exhaustive),
        (1000, 8, "bfloat16", True, True),
    ],
)
def test_values_and_gradients(seqlen, dim, dtype, normalize, packed):
    compare(
        _ours(normalize=normalize),
        functools.partial(
            based_attention_reference, normalize=normalize, dtype=jnp.float64
        ),
        _arrays(seqlen, dim, normalize=normalize, packed=packed),
        dtype,
        exact=("initial_state",),
    )


@pytest.mark.parametrize(("dim", "normalize"), [(32, True), (8, False)])
def test_it_is_the_taylor_series(dim, normalize):
    arrays = _arrays(70, dim)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(arrays[name]) for name in "qkv")
        ours = quick_jit(_ours(normalize=normalize, scale=0.5))
        out, state = ours(q, k, v)
        q, k = (np.repeat(arrays[name], 2, 2) for name in "qk")
        s = 0.5 * np.einsum("bihd,bjhd->bhij", q, k)
        f = np.tril(1 + s + s * s / 2)
        if normalize:
            f = f / f.sum(-1, keepdims=True)
        expected = np.einsum("bhij,bjhv->bihv", f, arrays["v"])
        assert relative_rms(out, expected) < 1e-13
    assert jax.tree.leaves(state)[0].shape == (2, 4, TAYLOR.num_features(dim), 6)


def test_split_sequence_is_the_whole_one_and_steps_are_too():
    arrays = _arrays(70)
    axes = {"q": 1, "k": 1, "v": 1}
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.float64, arrays)
        whole = quick_jit(_ours())
        expected = whole(**arrays)
        outs, state = [], arrays.pop("initial_state")
        for piece in split_at(arrays, axes, [67]):
            if piece["q"].shape[1] > 3:
                out, state = whole(**piece, initial_state=state)
                outs.append(out)
        step = quick_jit(tk_jax.based_attention_step, donate_argnums=3)
        for t in range(67, 70):
            given = state
            out, state = step(*(arrays[name][:, t] for name in "qkv"), state)
            assert all(x.is_deleted() for x in jax.tree.leaves(given))
            outs.append(out[:, None])
        got = (jnp.concatenate(outs, 1), state)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(x, y) < 1e-12
