"""What linear_attention and ssd lower to for CUDA: kernels, and what is around them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax.ops.linear_attention import config

BF16 = jnp.bfloat16


def struct(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_for_cuda(function, *arguments) -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def targets(text) -> list[str]:
    return re.findall(r"custom_call @tk_linear_attention_(\w+)_v1", text)


def total(results):
    leaves = jax.tree.leaves(results)
    return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)


def ssd(x, dt, B, C, **settings):
    A = -jnp.arange(1.0, 1.0 + x.shape[-2])
    return tk_jax.ssd(x, dt, A, B, C, implementation="tk", **settings)


# 40 heads of 4 sequences fill a GPU without cutting sequences.
TOKENS = (4, 300)
X = struct(*TOKENS, 40, 64)
DT = struct(*TOKENS, 40, dtype=jnp.float32)
B = struct(*TOKENS, 1, 128)


def test_forward_calls_two_kernels_and_copies_nothing():
    text = lowered_for_cuda(ssd, X, DT, B, B)
    assert targets(text) == ["step_gates", "outputs"]
    for copy in ("transpose ", "stablehlo.pad", "stablehlo.slice", "concatenate"):
        assert copy not in text
    # Without an initial state and a final one, none is there.
    assert "4x40x1x64x128" not in text


def test_backward_calls_each_kernel_once_but_for_the_states():
    def gradients(*arrays):
        return jax.grad(lambda arrays: total(ssd(*arrays)))(arrays)

    text = lowered_for_cuda(gradients, X, DT, B, B)
    found = targets(text)
    # The gradients of what heads have are not asked for: nothing adds them up.
    assert found == ["step_gates", "states", "states", "gradients", "step_gradients"]
    # What is as large as an operand goes to and from the kernels as it is.
    for shape in ("4x300x40x64", "4x300x1x128"):
        assert not re.search(rf"stablehlo.(transpose|pad|slice).*{shape}xbf16", text)


def test_steps_are_the_kernels_alone():
    """What XLA does to dt, dt_bias, A and D is nothing, but for their types."""
    per_head = struct(40, dtype=jnp.float32)

    def run(x, dt, A, B, D, bias):
        settings = {"D": D, "dt_bias": bias, "dt_softplus": True}
        return tk_jax.ssd(x, dt, A, B, B, implementation="tk", **settings)

    def gradients(*arrays):
        loss = lambda *arrays: total(run(*arrays))  # noqa: E731
        return jax.grad(loss, range(1, 6))(*arrays)

    for dtype in (jnp.float32, BF16):
        arrays = (X, struct(*TOKENS, 40, dtype=dtype), per_head, B, per_head, per_head)
        assert targets(lowered_for_cuda(run, *arrays)) == ["step_gates", "outputs"]
        found = targets(lowered_for_cuda(gradients, *arrays))
        assert found[-2:] == ["step_gradients", "head_sums"]
        for function in (run, gradients):
            text = lowered_for_cuda(function, *arrays)
            # The loss's cotangents; the gradients of the keys and the queries, summed.
            done = set(re.findall(r"= stablehlo.(\w+)", text))
            assert done <= {
                "constant",
                "broadcast_in_dim",
                "convert",
                "reshape",
                "add",
            } | {"custom_call"}, done


def test_gradient_of_a_decay_is_only_computed_where_there_is_one():
    q, v = struct(4, 300, 1, 128), struct(4, 300, 40, 64)

    def gradients(q, v):
        run = functools.partial(tk_jax.linear_attention, implementation="tk")
        return jax.grad(lambda q, v: total(run(q, q, v)), (0, 1))(q, v)

    found = targets(lowered_for_cuda(gradients, q, v))
    assert found == ["states", "states", "gradients"]


def test_few_heads_are_cut_into_segments():
    x, dt, b = struct(1, 4096, 2, 64), struct(1, 4096, 2, dtype=jnp.float32), None
    b = struct(1, 4096, 1, 128)
    run = functools.partial(ssd, return_final_state=True)
    text = lowered_for_cuda(run, x, dt, b, b)
    joined = ["segment_sums", "segment_starts", "outputs", "spread"]
    assert targets(text) == ["step_gates", *joined]
    assert "tensor<1x2x16x64x128xf32>" in text

    def gradients(*arrays):
        return jax.grad(lambda arrays: total(run(*arrays)))(arrays)

    found = targets(lowered_for_cuda(gradients, x, dt, b, b))
    for name in ("states", "segment_sums", "segment_starts", "spread"):
        assert found.count(name) == 2


@pytest.mark.parametrize(
    ("sizes", "chunks_of_segment", "consumers"),
    [
        # B, T, G, H, K, V
        ((8, 4096, 1, 32, 128, 64), 64, 2),
        ((1, 4096, 1, 32, 128, 64), 8, 2),
        ((1, 4096, 32, 32, 128, 64), 22, 1),
        ((1, 1 << 20, 1, 1, 64, 64), 137, 1),
        ((1, 1 << 20, 1, 2, 64, 64), 149, 2),
        ((1, 1 << 20, 1, 2, 256, 64), 249, 1),
        ((1, 1000, 1, 1, 64, 64), 4, 1),
        ((1, 511, 1, 1, 64, 64), 8, 1),
        ((1, 448, 1, 1, 64, 64), 7, 1),
        ((1, 1, 1, 1, 16, 16), 1, 1),
        ((65535, 64, 1, 1, 64, 128), 1, 2),
    ],
    ids=str,
)
def test_configs(sizes, chunks_of_segment, consumers):
    chosen = config.scan_config(*sizes)
    assert chosen.chunks_of_segment == chunks_of_segment
    assert chosen.states.consumers == chosen.outputs.consumers == consumers


@pytest.mark.parametrize(("tile", "stages"), [(64, 2), (128, 2), (192, 1), (256, 1)])
def test_stages_of_gradients_fit(tile, stages):
    chosen = config.scan_config(1, 64, 1, 1, tile, 64)
    assert chosen.gradients.stages == stages


def test_rows_that_the_copy_engine_cannot_read_are_padded():
    q, v = struct(4, 300, 2, 12), struct(4, 300, 40, 18)
    run = functools.partial(tk_jax.linear_attention, implementation="tk")
    text = lowered_for_cuda(lambda q, v: run(q, q, v), q, v)
    (call,) = re.findall(r"@tk_linear_attention_outputs_v1.*", text)
    for shape in ("4x300x2x16xbf16", "4x300x40x24xbf16"):
        assert f"tensor<{shape}>" in call


def test_normalize_has_a_column_of_ones():
    q, v = struct(4, 300, 2, 64), struct(4, 300, 40, 56)
    run = functools.partial(
        tk_jax.linear_attention, normalize=True, implementation="tk"
    )
    text = lowered_for_cuda(lambda q, v: run(q, q, v), q, v)
    (call,) = re.findall(r"@tk_linear_attention_outputs_v1.*", text)
    assert "tensor<4x300x40x64xbf16>" in call


def test_float32_is_lowered_to_xla():
    arrays = [jax.tree.map(lambda x: struct(*x.shape, dtype=jnp.float32), X)]
    arrays += [DT, *[struct(*B.shape, dtype=jnp.float32)] * 2]
    text = lowered_for_cuda(
        lambda x, dt, B, C: tk_jax.ssd(x, dt, -jnp.ones(40), B, C), *arrays
    )
    assert targets(text) == []


def test_without_an_implementation_each_platform_has_its_own():
    def run(*arrays):
        return tk_jax.ssd(arrays[0], arrays[1], -jnp.ones(40), *arrays[2:])

    assert targets(lowered_for_cuda(run, X, DT, B, B)) == ["step_gates", "outputs"]
    traced = jax.jit(run).trace(X, DT, B, B)
    assert targets(traced.lower(lowering_platforms=("cpu",)).as_text()) == []
    assert tk_jax.explain(tk_jax.ssd, X, DT, DT.update(shape=(40,)), B, B).cuda == "tk"


def test_export_keeps_the_targets():
    x = jnp.ones((1, 3, 2, 8), BF16)
    b = jnp.ones((1, 3, 1, 8), BF16)
    dt = jnp.ones((1, 3, 2))

    def run(x, dt, b):
        return tk_jax.ssd(x, dt, jnp.zeros(2), b, b)

    exported = jax.export.export(
        jax.jit(run),
        platforms=["cuda", "cpu"],
        disabled_checks=tk_jax.export_checks(),
    )(x, dt, b)
    restored = jax.export.deserialize(exported.serialize())
    assert "tk_linear_attention_outputs_v1" in restored.mlir_module()
    y = restored.call(x, dt, b)
    np.testing.assert_array_equal(np.float32(y[0, :, 0, 0]), [8, 16, 24])


def test_cpu_refuses_the_kernels():
    x = jnp.ones((1, 3, 2, 8), BF16)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        jax.block_until_ready(tk_jax.linear_attention(x, x, x, implementation="tk"))
