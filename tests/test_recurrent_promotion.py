"""The recurrent ops where jax refuses to promote dtypes, in kernels and in XLA."""

import functools

import jax
import jax.numpy as jnp
import pytest
from recurrent_ops import OPS, PER_TOKEN, SETTINGS, inputs

import tk_jax

# So many tokens that kernels walk segments side by side.
SEQLEN = 1300
NORMALIZED = ("linear_attention", "based_attention")


def _of(op, dtype, normalize):
    arrays = inputs(op, seqlen=SEQLEN, dtype=dtype)
    settings = dict(SETTINGS[op])
    if op in NORMALIZED:
        settings["normalize"] = normalize
    if op == "hedgehog_attention":
        settings = {}
        arrays |= {"q_map": jnp.ones((4, 8, 64)), "k_map": jnp.ones((2, 8, 64))}
    arrays.pop("initial_state", None)
    return arrays, functools.partial(getattr(tk_jax, op), **settings), settings


def _gradients(run):
    """Of arrays and states: the length of a state is an int."""

    def total(*given):
        leaves = jax.tree.leaves(run(*given))
        floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in floating)

    return jax.value_and_grad(total, (0, 1), allow_int=True)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("op", "normalize"),
    [(op, False) for op in OPS] + [(op, True) for op in NORMALIZED],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_values_gradients_and_steps(op, normalize, dtype, packed, x64):
    """Traced alone: for a GPU too, since it is not known what will run."""
    arrays, function, settings = _of(op, dtype, normalize)
    ids = jnp.zeros((2, SEQLEN), jnp.int32) if packed else None
    if dtype == jnp.bfloat16:
        assert tk_jax.explain(getattr(tk_jax, op), **arrays, **settings).cuda == "tk"

    def run(arrays, state):
        return function(
            **arrays, initial_state=state, segment_ids=ids, return_final_state=True
        )

    step = functools.partial(getattr(tk_jax, f"{op}_step"), **settings)
    per_token = PER_TOKEN[op]
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        _, state = jax.eval_shape(run, arrays, None)
        derive = _gradients(run)
        jax.eval_shape(derive, arrays, None)
        jax.eval_shape(derive, arrays, state)
        jax.eval_shape(jax.vmap(run), *jax.tree.map(_twice, (arrays, state)))
        token = {n: x[:, 0] if n in per_token else x for n, x in arrays.items()}

        def run_step(token, state):
            return step(**token, state=state)

        jax.eval_shape(run_step, token, state)
        jax.eval_shape(_gradients(run_step), token, state)


def _twice(x):
    return jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
