"""One small call of each recurrent op, as keyword arguments."""

import jax
import jax.numpy as jnp
import numpy as np

import tk_jax

SETTINGS = {
    "linear_attention": {},
    "ssd": {"dt_softplus": True},
    "based_attention": {},
    "hedgehog_attention": {"window": 5},
}
OPS = tuple(SETTINGS)
# At which there is a scan of chunks; the five tokens below are one.
SCANNED = {"hedgehog_attention": 10}
SCANNED_BY_MOST = 128
# What has a batch axis, and where heads are in it; the others have heads first.
PER_TOKEN = {
    "linear_attention": ("q", "k", "v", "log_decay"),
    "ssd": ("x", "dt", "B", "C", "z"),
    "based_attention": ("q", "k", "v"),
    "hedgehog_attention": ("q", "k", "v"),
}


def inputs(op: str, *, batch=(2,), seqlen=5, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(3)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    rows = (*batch, seqlen)
    if op == "ssd":
        return {
            "x": normal(*rows, 4, 6),
            "dt": normal(*rows, 4, dtype=jnp.float32),
            "A": -jnp.exp(normal(4, dtype=jnp.float32)),
            "B": normal(*rows, 2, 8),
            "C": normal(*rows, 2, 8),
            "D": normal(4, 6, dtype=jnp.float32),
            "z": normal(*rows, 4, 6),
            "dt_bias": normal(4, dtype=jnp.float32),
            "initial_state": normal(*batch, 4, 6, 8, dtype=jnp.float32),
        }
    arrays = {"q": normal(*rows, 2, 8), "k": normal(*rows, 2, 8)}
    if op == "hedgehog_attention":
        return {
            "q": normal(*rows, 4, 8),
            "k": arrays["k"],
            "v": normal(*rows, 2, 6),
            "q_map": normal(4, 8, 3, dtype=jnp.float32),
            "k_map": normal(2, 8, 3, dtype=jnp.float32),
            "alpha": jnp.linspace(0.1, 0.9, 4),
            "beta": jnp.linspace(0.9, 0.1, 4),
        }
    arrays["v"] = normal(*rows, 4, 6)
    if op == "based_attention":
        return arrays
    return arrays | {
        "log_decay": -jnp.exp(normal(*rows, 4, dtype=jnp.float32)),
        "initial_state": normal(*batch, 4, 8, 6, dtype=jnp.float32),
    }


def call(op: str, **arguments):
    return getattr(tk_jax, op)(**SETTINGS[op], **arguments)


def loss(op: str, **arguments):
    """Depends on all results, unevenly."""
    results = call(op, **arguments, return_final_state=True)
    return sum(
        jnp.sum(jnp.sin(x.astype(jnp.float32)) * jnp.cos(jnp.arange(x.shape[-1])))
        for x in jax.tree.leaves(results)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )
