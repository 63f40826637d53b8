"""What matmul lowers to for CUDA: which kernel calls, and which copies around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import BF16, TRANSPOSES, operands, product, transposes_id

import tk_jax


def lowered_for_cuda(function, *shapes, dtype=BF16) -> str:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    traced = jax.jit(function).trace(*structs)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("transposes", TRANSPOSES, ids=transposes_id)
def test_lowering_has_no_copy(transposes):
    """Aligned operands reach the kernel as they are, forward and backward."""
    a, b = operands(np.random.default_rng(0), transposes, ((4,), (4,)), (128, 256, 64))
    run = product(transposes, "tk")
    text = lowered_for_cuda(run, a.shape, b.shape)
    assert text.count("@tk_matmul_v1") == 1

    def step(a, b, dc):
        return jax.vjp(run, a, b)[1](dc)

    both = lowered_for_cuda(step, a.shape, b.shape, (4, 128, 256))
    assert both.count("@tk_matmul_v1") == 2
    for copy in ("transpose ", "pad", "slice", "broadcast_in_dim", "concatenate"):
        assert f"stablehlo.{copy}" not in text + both


def test_lowering_shares_an_operand_without_batch():
    text = lowered_for_cuda(product((False, False), "tk"), (4, 3, 32, 64), (64, 128))
    assert "(tensor<1x384x64xbf16>, tensor<1x64x128xbf16>)" in text
    text = lowered_for_cuda(product((True, False), "tk"), (4, 3, 64, 32), (64, 128))
    assert "(tensor<12x64x32xbf16>, tensor<1x64x128xbf16>)" in text
    text = lowered_for_cuda(product((False, False), "tk"), (32, 64), (12, 64, 128))
    assert "(tensor<1x32x64xbf16>, tensor<12x64x128xbf16>)" in text
    mapped = jax.vmap(product((False, False), "tk"), (None, 0))
    text = lowered_for_cuda(mapped, (32, 64), (12, 64, 128))
    assert "(tensor<1x32x64xbf16>, tensor<12x64x128xbf16>)" in text
    assert "broadcast_in_dim" not in text


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_is_one_call(in_axes):
    mapped = jax.vmap(jax.vmap(product((False, False), "tk"), in_axes), in_axes)
    shapes = [
        matrix if axis is None else (2, 3, *matrix)
        for axis, matrix in zip(in_axes, ((32, 64), (64, 128)), strict=True)
    ]
    text = lowered_for_cuda(mapped, *shapes)
    assert text.count("@tk_matmul_v1") == 1
    assert "stablehlo.while" not in text


def test_gradient_of_a_shared_operand_is_one_product():
    """No [batch, K, N] array of gradients is made and then summed."""

    def db(a, b, dc):
        return jax.vjp(product((False, True), "tk"), a, b)[1](dc)[1]

    text = lowered_for_cuda(db, (8, 128, 64), (256, 64), (8, 128, 256))
    assert "(tensor<1x1024x256xbf16>, tensor<1x1024x64xbf16>)" in text
    assert "tensor<8x256x64" not in text


@pytest.mark.parametrize(
    ("transposes", "a_shape", "b_shape", "padded"),
    [
        ((False, False), (5, 7), (7, 9), ("1x5x8", "1x8x16", "1x5x16")),
        ((True, False), (7, 5), (7, 9), ("1x7x8", "1x7x16", "1x8x16")),
        ((False, True), (5, 7), (9, 7), ("1x5x8", "1x16x8", "1x5x16")),
        ((True, True), (7, 5), (9, 7), ("1x8x8", "1x16x8", "1x8x16")),
        ((False, False), (1, 8), (8, 8), ("1x1x8", "1x8x8", "1x1x8")),
    ],
)
def test_lowering_pads_rows_to_16_bytes_and_nothing_else(
    transposes, a_shape, b_shape, padded
):
    text = lowered_for_cuda(product(transposes, "tk"), a_shape, b_shape)
    a, b, c = (f"tensor<{shape}xbf16>" for shape in padded)
    assert f"({a}, {b}) -> {c}" in text


def test_float32_is_lowered_to_xla_for_cuda():
    text = lowered_for_cuda(
        product((False, False)), (16, 16), (16, 16), dtype=jnp.float32
    )
    assert "tk_matmul" not in text
    assert "dot_general" in text


def test_export_keeps_the_target():
    export = jax.export
    exported = export.export(
        jax.jit(product((False, False))),
        platforms=["cuda", "cpu"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call("tk_matmul_v1")],
    )(*[jax.ShapeDtypeStruct((16, 16), BF16)] * 2)
    restored = export.deserialize(exported.serialize())
    assert "tk_matmul_v1" in restored.mlir_module()
    ones = jnp.ones((16, 16), BF16)
    np.testing.assert_array_equal(np.float32(restored.call(ones, ones)), 16)


def test_explain():
    struct = jax.ShapeDtypeStruct((16, 16), BF16)
    assert tk_jax.explain(tk_jax.matmul, struct, struct).cuda == "tk"
    struct = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    choice = tk_jax.explain(tk_jax.matmul, struct, struct)
    assert choice.cuda == "xla"
    assert "float32" in choice.reason
