"""What based_attention lowers to for CUDA: kernels, and what is around them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax.ops.based_attention import config

BF16 = jnp.bfloat16
# 68 heads of 4 sequences fill a GPU without cutting sequences.
TOKENS = (4, 300)


def struct(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_for_cuda(function, *arguments) -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def targets(text) -> list[str]:
    return re.findall(r"custom_call @tk_based_attention_(\w+)_v1", text)


def based_attention(normalize, q, v, **settings):
    return tk_jax.based_attention(
        q, q, v, normalize=normalize, implementation="tk", **settings
    )


def gradients(normalize, q, v):
    def total(q, v):
        return jnp.sum(based_attention(normalize, q, v).astype(jnp.float32))

    return jax.grad(total, (0, 1))(q, v)


@pytest.mark.parametrize("normalize", [False, True])
def test_forward_is_one_kernel_that_copies_nothing(normalize):
    q, v = struct(*TOKENS, 68, 16), struct(*TOKENS, 68, 64)
    text = lowered_for_cuda(functools.partial(based_attention, normalize), q, v)
    assert targets(text) == ["outputs"]
    assert f"normalize = {str(normalize).lower()}" in text
    for copy in ("transpose ", "stablehlo.pad", "stablehlo.slice", "concatenate"):
        assert copy not in text


def test_features_and_chunk_states_are_nowhere_in_the_forward_pass():
    q, v = struct(*TOKENS, 68, 16), struct(*TOKENS, 68, 64)
    text = lowered_for_cuda(functools.partial(based_attention, True), q, v)
    assert not re.search(r"x(153|160)x?\w*>", text)


@pytest.mark.parametrize(
    ("normalize", "dim", "expected"),
    [
        (False, 16, ["walked_gradients", "walked_gradients"]),
        (False, 32, ["states", "states", "gradients"]),
        # The denominators, which gradients need, come with the outputs.
        (True, 16, ["outputs", "walked_gradients", "walked_gradients"]),
        (True, 24, ["states", "chunk_outputs", "states", "states", "gradients"]),
    ],
)
def test_backward(normalize, dim, expected):
    q, v = struct(*TOKENS, 68, dim), struct(*TOKENS, 68, 64)
    text = lowered_for_cuda(functools.partial(gradients, normalize), q, v)
    assert targets(text) == expected


def test_few_heads_are_cut_into_segments():
    q, v = struct(4, 4096, 16, 16), struct(4, 4096, 16, 64)
    run = functools.partial(based_attention, False)
    text = lowered_for_cuda(run, q, v)
    assert targets(text) == ["states", "outputs"]
    # What the first three of four segments add, from one kernel to the other as it is.
    assert "tensor<4x16x1x1x3x64x160xf32>" in text
    for between in ("stablehlo.add", "stablehlo.slice", "stablehlo.concatenate"):
        assert between not in text
    assert targets(lowered_for_cuda(functools.partial(gradients, False), q, v)) == [
        "states",
        "states",
        "walked_gradients",
        "walked_gradients",
    ]


def test_states_of_chunks_are_nowhere_in_the_backward_pass():
    q, v = struct(*TOKENS, 68, 16), struct(*TOKENS, 68, 64)
    text = lowered_for_cuda(functools.partial(gradients, False), q, v)
    assert not re.search(r"x(153|160)x?\w*>", text)
    # Where every head has its own q and k, dq and dk are written as they are, ...
    for copy in ("stablehlo.add", "stablehlo.reduce", "stablehlo.convert"):
        assert copy not in text.split("walked_gradients", 1)[1]
    # ... else in parts, of two slices of each of four heads here.
    text = lowered_for_cuda(
        functools.partial(gradients, False),
        struct(*TOKENS, 17, 16),
        struct(*TOKENS, 68, 128),
    )
    assert text.count("tensor<4x300x68x2x16xf32>") >= 2


@pytest.mark.parametrize(
    ("sizes", "chunks_of_segment"),
    [
        # B, T, H, D, V
        ((4, 4096, 16, 16, 64), 16),
        ((16, 3072, 16, 16, 64), 48),
        ((1, 4096, 1, 16, 64), 4),
        # More segments are more states to sum for each.
        ((1, 65536, 1, 16, 64), 16),
        ((4, 4096, 16, 32, 64), 64),
        ((1, 1, 1, 8, 64), 1),
    ],
    ids=str,
)
def test_configs(sizes, chunks_of_segment):
    assert config.scan_config(*sizes).chunks_of_segment == chunks_of_segment


def test_other_platforms_run_xla():
    q, v = np.ones((1, 5, 1, 8), BF16), np.ones((1, 5, 1, 8), BF16)
    out = tk_jax.based_attention(q, q, v)
    np.testing.assert_allclose(np.float32(out), 1)
