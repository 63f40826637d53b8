"""A bias beside a mask or segment ids, whose kernels add it where they mask scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

import tk_jax

IMPLEMENTATIONS = ["interpret", pytest.param("tk", marks=pytest.mark.gpu)]
# T, S, head dims of q and k and of v, dtype, axes of the bias's own, its dtype, and
# settings.
CASES = {
    "wide-causal": (130, 150, 256, 256, "bfloat16", "HTS", None, {"is_causal": True}),
    "wide-fp16": (97, 113, 256, 256, "float16", "TS", None, {}),
    "wide-cap": (70, 90, 256, 256, "bfloat16", "HTS", None, {"logits_soft_cap": 4.0}),
    "wide-fp32-bias": (70, 132, 256, 248, "float16", "HTS", "float32", {}),
    "mixed": (130, 70, 192, 128, "float16", "HTS", None, {"is_causal": True}),
    "narrow": (150, 200, 128, 128, "bfloat16", "HS", None, {"local_window_size": 60}),
    "narrow-64": (97, 144, 64, 64, "bfloat16", "HTS", None, {"is_causal": True}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hides", ["mask", "segment_ids"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, hides, implementation):
    seqlen_q, seqlen_kv, dim, dim_v, dtype, axes, bias_dtype, settings = CASES[name]
    heads, kv_heads = 2, 1
    rng = np.random.default_rng(len(name))
    normal = rng.standard_normal
    sizes = {"B": 1, "H": heads, "T": seqlen_q, "S": seqlen_kv}
    bias_shape = tuple(size if axis in axes else 1 for axis, size in sizes.items())
    exact = {
        "q": normal((1, seqlen_q, heads, dim)),
        "k": normal((1, seqlen_kv, kv_heads, dim)),
        "v": normal((1, seqlen_kv, kv_heads, dim_v)),
        "bias": normal(bias_shape),
    }
    dout = normal((1, seqlen_q, heads, dim_v))
    types = {name: bias_dtype if name == "bias" else None for name in exact}
    given = {n: jnp.asarray(x, types[n] or dtype) for n, x in exact.items()}
    dout = jnp.asarray(dout, dtype)
    if hides == "mask":
        hidden = {"mask": rng.random((1, heads, seqlen_q, seqlen_kv)) < 0.8}
    else:
        ids = np.arange(max(seqlen_q, seqlen_kv))[None] // 40
        hidden = {
            "q_segment_ids": jnp.asarray(ids[:, :seqlen_q], jnp.int32),
            "kv_segment_ids": jnp.asarray(ids[:, :seqlen_kv], jnp.int32),
        }

    def run(arrays, dout, implementation):
        def attend(arrays):
            out, lse = tk_jax.attention(
                **arrays,
                **hidden,
                **settings,
                return_lse=True,
                implementation=implementation,
            )
            return jnp.vdot(out.astype(lse.dtype), dout.astype(lse.dtype)), (out, lse)

        gradients, results = jax.grad(attend, has_aux=True)(arrays)
        return {"out": results[0], "lse": results[1], **gradients}

    with jax.enable_x64(True):
        double = {name: x.astype(jnp.float64) for name, x in given.items()}
        expected = run(double, dout.astype(jnp.float64), "xla")
        expected = jax.tree.map(np.asarray, expected)
    low = run(given, dout, "xla")
    got = run(given, dout, implementation)
    for what, result in got.items():
        assert_close(result, expected[what], low[what], what=what)
