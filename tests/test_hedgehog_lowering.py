"""What hedgehog_attention lowers to for CUDA: kernels, and what is around them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tk_jax
from tk_jax.ops.hedgehog_attention import config


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def arrays(batch=4, seqlen=300, heads=40, kv_heads=40, dim=128):
    return (
        struct(batch, seqlen, heads, dim),
        struct(batch, seqlen, kv_heads, dim),
        struct(batch, seqlen, kv_heads, dim),
        struct(heads, dim, 64, dtype=jnp.float32),
        struct(kv_heads, dim, 64, dtype=jnp.float32),
    )


def lowered(function, *arguments, platform="cuda") -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def targets(text) -> list[str]:
    return re.findall(r"custom_call @tk_(?:hedgehog|linear)_attention_(\w+)_v1", text)


# The last two are gradients of maps.
BACKWARD = [
    "document_states",
    "queries",
    "document_states",
    "keys",
    *["segment_sums"] * 2,
]

run = functools.partial(
    tk_jax.hedgehog_attention, alpha=0.5, beta=0.5, implementation="tk"
)


def gradients(*arrays):
    def total(arrays):
        return jnp.sum(run(*arrays).astype(jnp.float32))

    return jax.grad(total)(arrays)


def test_forward_is_one_kernel_and_copies_no_tokens():
    text = lowered(run, *arrays())
    assert targets(text) == ["outputs"]
    for copy in ("transpose", "pad", "slice", "concatenate"):
        assert not re.search(rf"stablehlo.{copy}.*4x300x40x128xbf16", text)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)], ids=str)
def test_any_batch_with_a_state(batch, packed):
    q, k = struct(*batch, 70, 4, 64), struct(*batch, 70, 2, 64)
    maps = (struct(heads, 64, 64, dtype=jnp.float32) for heads in (4, 2))
    floats = ((*batch, 2, 128, 64), (*batch, 2, 128))
    state = (
        *(struct(*shape, dtype=jnp.float32) for shape in floats),
        *[struct(*batch, 128, 2, 64)] * 2,
        struct(*batch, dtype=jnp.int32),
    )

    def total(floating, length, ids):
        *tokens, state = floating
        out, final = run(
            *tokens,
            initial_state=(*state, length),
            return_final_state=True,
            segment_ids=ids,
        )
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(final.sums)

    found = jax.grad(total)
    ids = struct(70, dtype=jnp.int32) if packed else None
    text = lowered(found, (q, k, k, *maps, state[:4]), state[4], ids)
    # In a batch of 0 there is nothing to launch a kernel for.
    assert targets(text) == ([] if 0 in batch else BACKWARD)


def test_packed_documents():
    q, k, v, *maps = arrays()
    ids = struct(4, 300, dtype=jnp.int32)

    def total(floating, ids):
        out = run(*floating, segment_ids=ids)
        return jnp.sum(out.astype(jnp.float32))

    text = lowered(jax.grad(total), (q, k, v, *maps), ids)
    assert targets(text) == BACKWARD
    # Windows of at most 2 * (300 // 65) + 1 tiles, and no copies of tokens.
    assert "tensor<4x576xf32>" in text
    for copy in ("transpose", "pad", "slice", "concatenate"):
        assert not re.search(rf"stablehlo.{copy}.*4x300x40x128xbf16", text)


def test_packed_documents_of_few_heads_are_cut_into_segments():
    ids = struct(4, 4096, dtype=jnp.int32)
    text = lowered(
        lambda ids, *arrays: run(*arrays, segment_ids=ids),
        ids,
        *arrays(4, 4096, 16, 16),
    )
    assert targets(text) == ["document_states", "outputs"]
    # The first of two segments, in halves.
    assert "tensor<4x16x2x128x128xf32>" in text


def test_few_heads_are_cut_into_segments():
    text = lowered(run, *arrays(4, 4096, 16, 16))
    assert targets(text) == ["sums", "outputs"]
    # The first of two segments, in halves.
    assert "tensor<4x16x2x128x128xf32>" in text


def test_backward_calls_each_kernel_once_but_for_the_states():
    assert targets(lowered(gradients, *arrays())) == BACKWARD


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        # B, T, H
        ((4, 4096, 16), 32),
        ((16, 3072, 16), 48),
        ((1, 65536, 1), 8),
        ((1, 511, 1), 8),
        ((1, 1, 1), 1),
        ((1, 2048, 1), 8),
    ],
    ids=str,
)
def test_segments(sizes, chunks):
    assert config.chunks_of_segment(*sizes) == chunks


def test_without_an_implementation_each_platform_has_its_own():
    chosen = functools.partial(tk_jax.hedgehog_attention, alpha=0.5, beta=0.5)
    assert targets(lowered(chosen, *arrays())) == ["outputs"]
    assert targets(lowered(chosen, *arrays(), platform="cpu")) == []


@pytest.mark.parametrize("packed", [False, True])
def test_over_a_mesh(packed):
    """The kernels are called for the heads of each device."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 4), ("batch", "heads"), axis_types=auto)
    P = jax.sharding.PartitionSpec
    tokens, maps = P("batch", None, "heads"), P("heads")
    specs = (tokens, tokens, tokens, maps, maps, P("batch"))

    def loss(*arrays):
        def local(*arrays):
            *arrays, ids = arrays
            ids = ids if packed else None
            final = run(*arrays, return_final_state=True, segment_ids=ids)
            total = sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(final))
            return jax.lax.psum(total, ("batch", "heads"))

        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(*arrays)

    ids = struct(4, 300, dtype=jnp.int32)
    text = lowered(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *arrays(), ids)
    assert "tensor<2x300x10x128xbf16>" in text
    assert set(targets(text)) >= {"document_states", "queries", "keys"}


def test_cpu_refuses_the_kernels():
    x = jnp.ones((1, 3, 2, 64), jnp.bfloat16)
    maps = np.ones((2, 64, 64), np.float32)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        jax.block_until_ready(run(x, x, x, maps, maps))
