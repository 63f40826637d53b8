"""Gradients of decays of which every one is strong: each is far below one.

What makes them must not pass through numbers of the size of one. Heads are measured by
themselves: where one forgets less, its gradients would hide those of the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrent_cases import (
    BARS,
    assert_within_bars,
    pooled,
    relative_rms,
    rounded,
    samples,
    segments,
)

import tk_jax
from tk_jax.ops.linear_attention import linear_attention_reference
from tk_jax.ops.ssd import ssd_reference

pytestmark = pytest.mark.filterwarnings("ignore::tk_jax.FallbackWarning")

DECAYS = np.array([-1.0, -5.0, -12.0, -20.0, -40.0, -80.0])  # one for each head
HEADS = len(DECAYS)
EXACT = ("log_decay", "dt", "A", "state", "initial_state")
SEQLEN = 70  # two chunks
# So many cotangents, so that what all tokens share has some gradients too.
SAMPLES = 4


def _linear_attention(seqlen, decay):
    """None for the length of a step."""
    rng = np.random.default_rng(5)
    rows = (2,) if seqlen is None else (2, seqlen)
    shape = (HEADS,) if decay == "head" else (*rows, HEADS)
    q, k = rng.standard_normal((2, *rows, 2, 8))
    return {
        "q": q,
        "k": k,
        "v": rng.standard_normal((*rows, HEADS, 6)),
        "log_decay": np.broadcast_to(DECAYS, shape),
        "initial_state": rng.standard_normal((2, HEADS, 8, 6)),
    }


def _ssd(seqlen):
    rng = np.random.default_rng(6)
    rows = (2,) if seqlen is None else (2, seqlen)
    B, C = rng.standard_normal((2, *rows, 2, 8))
    return {
        "x": rng.standard_normal((*rows, HEADS, 6)),
        "dt": np.ones((*rows, HEADS)),
        "A": DECAYS,
        "B": B,
        "C": C,
        "initial_state": rng.standard_normal((2, HEADS, 6, 8)),
    }


def _check(fn, reference, arrays, dtype, gates):
    with jax.enable_x64(True):
        given = rounded(arrays, dtype, EXACT)
        wide = rounded(arrays | given, jnp.float64, EXACT)
        got, gradients = pooled(samples(fn, [given] * SAMPLES))
        exact, expected = pooled(samples(reference, [wide] * SAMPLES))
    others = {name: x for name, x in expected.items() if name not in gates}
    assert_within_bars((got, gradients), (exact, others), dtype)
    bar = BARS[dtype][2]
    for name in gates:
        for head, decay in enumerate(DECAYS):
            error = relative_rms(gradients[name][..., head], expected[name][..., head])
            assert error <= bar, f"gradient of {name} at {decay}: {error:.1e}"


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("dtype", "decay"),
    [("float32", "token"), ("float32", "head"), ("float64", "token")],
)
def test_linear_attention(dtype, decay, packed):
    arrays = _linear_attention(SEQLEN, decay)
    if packed:
        arrays["segment_ids"] = segments(np.random.default_rng(7), 2, SEQLEN)
    ours = functools.partial(tk_jax.linear_attention, return_final_state=True)
    reference = functools.partial(linear_attention_reference, dtype=jnp.float64)
    _check(ours, reference, arrays, dtype, ("log_decay",))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ssd(dtype, packed):
    arrays = _ssd(SEQLEN)
    if packed:
        arrays["segment_ids"] = segments(np.random.default_rng(7), 2, SEQLEN)
    ours = functools.partial(tk_jax.ssd, return_final_state=True)
    reference = functools.partial(ssd_reference, dtype=jnp.float64)
    _check(ours, reference, arrays, dtype, ("A", "dt"))


def _with_time(reference, per_token):
    """The definition's sequence of one token, as a step."""

    def step(**arrays):
        given = {
            name: x[:, None] if name in per_token else x for name, x in arrays.items()
        }
        out, state = reference(**given, dtype=jnp.float64)
        return out[:, 0], state

    return step


def _as_step(step):
    def run(*, initial_state, **arrays):
        return step(**arrays, state=initial_state)

    return run


@pytest.mark.parametrize("decay", ["token", "head"])
def test_linear_attention_step(decay):
    per_token = ("q", "k", "v") + (("log_decay",) if decay == "token" else ())
    ours = _as_step(tk_jax.linear_attention_step)
    reference = _with_time(linear_attention_reference, per_token)
    arrays = _linear_attention(None, decay)
    _check(ours, reference, arrays, "float32", ("log_decay",))


def test_ssd_step():
    reference = _with_time(ssd_reference, ("x", "dt", "B", "C"))
    _check(_as_step(tk_jax.ssd_step), reference, _ssd(None), "float32", ("A", "dt"))
