"""What proves a built wheel on one version of jax: every layer once, in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax import _extension

pytestmark = pytest.mark.smoke


def test_this_runtime_accepts_every_handler():
    # Registration on CPU checks a handler's API version at once; on CUDA it would pass
    # and the first call would fail.
    jax.devices("cpu")
    registrations = _extension.registrations()
    assert sorted(registrations) == [
        "tk_attention_bwd_bias_v1",
        "tk_attention_bwd_v1",
        "tk_attention_fwd_v1",
        "tk_based_attention_chunk_outputs_v1",
        "tk_based_attention_gradients_v1",
        "tk_based_attention_outputs_v1",
        "tk_based_attention_states_v1",
        "tk_based_attention_walked_gradients_v1",
        "tk_hedgehog_attention_document_states_v1",
        "tk_hedgehog_attention_keys_v1",
        "tk_hedgehog_attention_outputs_v1",
        "tk_hedgehog_attention_queries_v1",
        "tk_hedgehog_attention_step_v1",
        "tk_hedgehog_attention_sums_v1",
        "tk_kernel_v1",
        "tk_linear_attention_chunk_sums_v1",
        "tk_linear_attention_gate_gradients_v1",
        "tk_linear_attention_gradients_v1",
        "tk_linear_attention_head_sums_v1",
        "tk_linear_attention_outputs_v1",
        "tk_linear_attention_segment_starts_v1",
        "tk_linear_attention_segment_sums_v1",
        "tk_linear_attention_spread_v1",
        "tk_linear_attention_states_v1",
        "tk_linear_attention_step_gates_v1",
        "tk_linear_attention_step_gradients_v1",
        "tk_matmul_v1",
        "tk_state_step_v1",
    ]
    for name, stages in registrations.items():
        jax.ffi.register_ffi_target(f"{name}_probe", stages, platform="cpu")


def test_attention_and_its_gradients(rng):
    q = jnp.asarray(rng.standard_normal((2, 33, 4, 64)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 2, 40, 2, 64)), jnp.float32)

    def ours(q, k, v):
        return tk_jax.attention(q, k, v, is_causal=True).sum(-1)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).sum(-1)

    np.testing.assert_allclose(jax.jit(ours)(q, k, v), theirs(q, k, v), atol=1e-4)
    grads, expected = (
        jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
        for f in (ours, theirs)
    )
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_matmul_and_its_gradients(rng):
    a, b = jnp.asarray(rng.standard_normal((2, 48, 48)), jnp.float32)
    got = jax.value_and_grad(lambda a, b: tk_jax.matmul(a, b).sum(), argnums=(0, 1))
    want = jax.value_and_grad(lambda a, b: jnp.matmul(a, b).sum(), argnums=(0, 1))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3),
        jax.jit(got)(a, b),
        want(a, b),
    )


def test_programs_for_a_gpu_call_the_kernels():
    q = jax.ShapeDtypeStruct((2, 128, 8, 64), jnp.bfloat16)

    def loss(q, k, v):
        out = tk_jax.attention(q, k, v)
        return tk_jax.matmul(out[..., 0], out[..., 1], transpose_b=True).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = step.trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    for target in ("tk_attention_fwd_v1", "tk_attention_bwd_v1", "tk_matmul_v1"):
        assert target in text
