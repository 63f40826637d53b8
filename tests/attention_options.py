"""Attention's arguments, all of which can be there or not."""

import jax
import jax.numpy as jnp
import numpy as np

import tk_jax

BATCH, T, S, HEADS, KV_HEADS, D, DV = 2, 9, 8, 4, 2, 5, 3

# Each may be there or not. None hides all keys from all queries, but some from some.
OPTIONS = {
    "is_causal": ("is_causal",),
    "bottom_right": ("causal_align",),
    "window": ("local_window_size",),
    "query_seq_lengths": ("query_seq_lengths",),
    "key_value_seq_lengths": ("key_value_seq_lengths",),
    "segment_ids": ("q_segment_ids", "kv_segment_ids"),
    "mask": ("mask",),
    "bias": ("bias",),
    "soft_cap": ("logits_soft_cap",),
    "sinks": ("sinks",),
    "scale": ("scale",),
}
DIFFERENTIABLE = ("bias", "sinks")


def _arguments():
    rng = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def ids(length):
        return jnp.asarray(rng.integers(0, 2, (BATCH, length)), jnp.int32)

    inputs = (
        normal(BATCH, T, HEADS, D),
        normal(BATCH, S, KV_HEADS, D),
        normal(BATCH, S, KV_HEADS, DV),
    )
    return inputs, {
        "is_causal": True,
        "causal_align": "bottom_right",
        "local_window_size": (2, 1),
        "query_seq_lengths": jnp.array([T, 5], jnp.int32),
        "key_value_seq_lengths": jnp.array([6, S + 3], jnp.int32),
        "q_segment_ids": ids(T),
        "kv_segment_ids": ids(S),
        "mask": jnp.asarray(rng.random((BATCH, 1, T, S)) < 0.8),
        "bias": normal(1, HEADS, T, 1),
        "logits_soft_cap": 1.5,
        "sinks": normal(HEADS),
        "scale": 0.7,
    }


INPUTS, ARGUMENTS = _arguments()


def settings_of(options):
    return {name: ARGUMENTS[name] for option in options for name in OPTIONS[option]}


def ours(*inputs, **settings):
    return tk_jax.attention(*inputs, return_lse=True, **settings)


def assert_close(got, expected, message, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, atol=tolerance, rtol=tolerance, err_msg=str(message)
        ),
        got,
        expected,
    )
