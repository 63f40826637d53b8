"""Attention's kernels under segment ids and mask arrays, and their block maps."""

import attention_masks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_masks import NAMES, MaskedCase

import tk_jax
from tk_jax.ops.attention.blocks import block_map, mask_bits

SMALL = [
    MaskedCase(2, 300, 300, 2, 1, 64, "causal", documents=4),
    MaskedCase(1, 200, 300, 2, 2, 128, documents=3),
    MaskedCase(1, 140, 270, 1, 1, 64, documents=3, shuffled=True),
    MaskedCase(1, 140, 140, 2, 1, 128, window=(30, 9), documents=2),
    MaskedCase(2, 150, 270, 4, 2, 64, mask_shape=(2, 4, 150, 270)),
    MaskedCase(2, 150, 270, 2, 1, 128, "causal", mask_shape=(1, 1, 150, 270)),
    MaskedCase(2, 150, 270, 2, 2, 64, mask_shape=(2, 1, 1, 270), share=0.1),
    MaskedCase(1, 150, 270, 2, 1, 64, mask_shape=(1, 2, 150, 1), share=0.1),
    MaskedCase(
        *(2, 150, 270, 2, 1, 128, "bottom_right"),
        q_lengths=(150, 77),
        kv_lengths=(200, 270),
        documents=2,
        mask_shape=(1, 2, 150, 270),
        share=0.9,
    ),
]
# Beyond a head dim of 128. Queries of a document without keys, and keys that no query
# sees; clusters of two blocks and none; a mask that differs by head.
WIDE = [
    MaskedCase(2, 150, 230, 2, 1, 192, "causal", head_dim_v=128, documents=3),
    MaskedCase(1, 130, 200, 2, 1, 256, mask_shape=(1, 2, 130, 200), share=0.1),
    MaskedCase(1, 140, 140, 2, 1, 256, "causal", documents=3, shuffled=True),
    MaskedCase(1, 150, 270, 2, 2, 192, "bottom_right", mask_shape=(1, 1, 1, 270)),
    MaskedCase(
        *(2, 150, 270, 2, 1, 256, "bottom_right", "fp16"),
        q_lengths=(150, 77),
        kv_lengths=(200, 270),
        documents=2,
        mask_shape=(1, 2, 150, 270),
        share=0.9,
    ),
    MaskedCase(1, 160, 140, 2, 1, 136, window=(30, 9), documents=2, head_dim_v=200),
]
LARGE = [
    MaskedCase(2, 4200, 4200, 2, 1, 64, "causal", documents=9),
    MaskedCase(2, 4200, 4200, 2, 1, 128, "causal", documents=30),
    MaskedCase(3, 1000, 5000, 4, 4, 128, documents=5),
    MaskedCase(1, 2500, 2500, 4, 1, 64, documents=40),
    MaskedCase(2, 700, 700, 4, 2, 64, documents=3, shuffled=True),
    MaskedCase(2, 700, 700, 4, 2, 128, "causal", "fp16", documents=3, shuffled=True),
    MaskedCase(1, 1025, 1025, 4, 2, 128, window=(200, 50), documents=4),
    MaskedCase(3, 513, 1300, 8, 2, 64, mask_shape=(3, 8, 513, 1300)),
    MaskedCase(3, 513, 1300, 8, 2, 128, mask_shape=(1, 8, 513, 1300), share=0.02),
    MaskedCase(2, 1300, 513, 4, 4, 64, "causal", mask_shape=(2, 1, 1300, 513)),
    MaskedCase(2, 777, 777, 4, 1, 128, mask_shape=(1, 1, 1, 777), share=0.05),
    MaskedCase(2, 777, 777, 4, 1, 64, window=(90, 90), mask_shape=(1, 4, 777, 1)),
    MaskedCase(
        *(3, 900, 1100, 4, 2, 64, "bottom_right"),
        q_lengths=(900, 0, 333),
        kv_lengths=(1000, 1100, 64),
        documents=4,
        mask_shape=(3, 1, 900, 1100),
        share=0.9,
    ),
    MaskedCase(
        *(3, 900, 1100, 4, 2, 128),
        q_lengths=(900, 0, 333),
        kv_lengths=(1000, 1100, 64),
        documents=4,
    ),
    MaskedCase(2, 4200, 4200, 2, 1, 192, "causal", head_dim_v=128, documents=9),
    MaskedCase(1, 2500, 2500, 4, 1, 256, documents=40),
    MaskedCase(2, 1300, 1513, 4, 2, 256, "causal", mask_shape=(2, 1, 1300, 1513)),
    MaskedCase(2, 777, 777, 4, 1, 192, window=(90, 90), mask_shape=(1, 4, 777, 1)),
]


@pytest.fixture
def interpreter():
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs on the CPU alone")


# Each is two kernels to be compiled: what these two have, others have too.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=[pytest.mark.exhaustive] if i in (1, 5) else [])
        for i, x in enumerate(SMALL)
    ],
    ids=str,
)
def test_in_the_interpreter(case, interpreter):
    attention_masks.check(case, implementation="interpret")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=[pytest.mark.exhaustive] if i > 1 else [])
        for i, x in enumerate(WIDE)
    ],
    ids=str,
)
def test_wide_heads_in_the_interpreter(case, interpreter):
    attention_masks.check(case, implementation="interpret")


def test_what_the_gpu_executes_for_wide_heads(interpreter, ptx):
    case = MaskedCase(1, 70, 140, 1, 1, 192, head_dim_v=128, documents=2)
    attention_masks.check(case, implementation="interpret")


def test_many_interleavings_of_wide_heads(interpreter):
    with tk_jax.interpret_options(seed=3, schedules=4):
        attention_masks.check(WIDE[0], implementation="interpret")


def test_blocks_without_a_common_document_are_not_visited(interpreter):
    """What is not visited may be NaN: even a weight of zero would spread it."""
    case = MaskedCase(1, 256, 256, 2, 1, 192, "causal", head_dim_v=128)
    ids = {
        "q_segment_ids": np.repeat([[0, 2]], 128, 1).astype(np.int32),
        "kv_segment_ids": np.repeat([[0, 1]], 128, 1).astype(np.int32),
    }
    q, k, v, dout, dlse = case.inputs()

    def results(hidden):
        for x in (q, k, v, dout):
            x[:, 128:] = hidden
        inputs = (q, k, v, dout, dlse)
        return attention_masks.run(case, inputs, ids, implementation="interpret")

    for name, x, y in zip(NAMES, results(np.nan), results(0), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
        x = np.asarray(x, np.float32)
        assert (x[:, 128:] == (-np.inf if name == "lse" else 0)).all(), name
        assert np.isfinite(x[:, :128]).all() and x[:, :128].any(), name


def test_any_order_in_the_interpreter(interpreter):
    attention_masks.check(SMALL[0], implementation="interpret", deterministic=False)


def test_many_interleavings(interpreter):
    case = MaskedCase(1, 300, 400, 2, 1, 64, mask_shape=(1, 2, 300, 400), share=0.01)
    with tk_jax.interpret_options(seed=3, schedules=8):
        attention_masks.check(case, implementation="interpret")


def test_nothing_is_seen(interpreter):
    case = MaskedCase(1, 70, 90, 2, 1, 64)
    mask = np.zeros((70, 90), bool)
    results = attention_masks.run(
        case, case.inputs(), {"mask": mask}, implementation="interpret"
    )
    assert np.isneginf(results[1]).all()
    for x in (results[0], *results[2:]):
        assert (np.asarray(x, np.float32) == 0).all()


def test_features_go_together(interpreter):
    """With a cap and sinks, whose lse is that of no key too."""
    case = SMALL[8]
    q, k, v, dout, dlse = case.inputs()
    sinks = jnp.array([0.5, -1.0], jnp.float32)

    def gradients(implementation):
        def attention(q, k, v, sinks):
            return tk_jax.attention(
                *(q, k, v),
                sinks=sinks,
                logits_soft_cap=2.0,
                return_lse=True,
                implementation=implementation,
                **case.settings,
                **case.arrays,
            )

        results, transpose = jax.vjp(attention, q, k, v, sinks)
        return *results, *transpose((dout, dlse))

    for x, y in zip(gradients("interpret"), gradients("xla"), strict=True):
        x, y = (np.asarray(array, np.float32) for array in (x, y))
        np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())


# -- On a GPU --------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + WIDE + LARGE, ids=str)
def test_on_the_gpu(case):
    attention_masks.check(case, implementation="tk")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LARGE[0], LARGE[7]], ids=str)
def test_any_order_on_the_gpu(case):
    attention_masks.check(case, implementation="tk", deterministic=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_twenty_runs_are_equal_in_every_bit(case):
    inputs = case.inputs()
    first = attention_masks.run(case, inputs, implementation="tk")
    for _ in range(19):
        got = attention_masks.run(case, inputs, implementation="tk")
        for name, x, y in zip(attention_masks.NAMES, got, first, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


# -- Block maps and bits ---------------------------------------------------------------


def _unpacked(words, columns):
    words = np.asarray(words).view(np.uint32)
    bits = words[..., None, :] >> np.arange(32, dtype=np.uint32)[:, None] & 1
    bits = np.moveaxis(bits, -1, 0).reshape(2, *words.shape[:3], -1)
    assert not bits[..., columns:].any()
    return bits[..., :columns].astype(bool)


SHAPES = [(2, 3, 75, 1111), (1, 1, 1, 1111), (1, 3, 75, 1), (2, 1, 1, 1), (1, 1, 75, 9)]


def _masks(rng, shape):
    return (rng.random(shape) < 0.002) | (rng.random((*shape[:3], 1)) < 0.7)


def _seqlens(shape):
    return 75, 9 if shape[3] == 9 else 1111


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [(32, 16), (64, 80), (128, 96)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_map_of_a_mask(shape, blocks, transposed, of_keys, rng):
    seqlens = _seqlens(shape)
    sizes = [-(-n // block) for n, block in zip(seqlens, blocks, strict=True)]
    mask = _masks(rng, shape)
    bits = mask_bits(jnp.asarray(mask), blocks, transposed=of_keys)
    words = block_map(
        seqlens, blocks, None, bits, transposed=transposed, of_keys=of_keys
    )
    whole_mask = np.broadcast_to(mask, (*shape[:2], *seqlens))
    expected = np.zeros((2, *shape[:2], *sizes), bool)
    for i in range(sizes[0]):
        rows = slice(blocks[0] * i, blocks[0] * (i + 1))
        for j in range(sizes[1]):
            columns = slice(blocks[1] * j, blocks[1] * (j + 1))
            block = whole_mask[..., rows, columns].reshape(*shape[:2], -1)
            expected[:, ..., i, j] = block.any(-1), block.all(-1)
    if transposed:
        expected = expected.swapaxes(-1, -2)
    unpacked = _unpacked(words, expected.shape[-1])
    np.testing.assert_array_equal(np.broadcast_to(unpacked, expected.shape), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [(64, 80), (192, 128)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_a_mask(shape, blocks, transposed, rng):
    mask, seqlens = _masks(rng, shape), _seqlens(shape)
    words = np.asarray(mask_bits(jnp.asarray(mask), blocks, transposed=transposed))
    whole = [-(-n // block) * block for n, block in zip(seqlens, blocks, strict=True)]
    seen = np.zeros((*shape[:2], *whole), bool)
    seen[:, :, : seqlens[0], : seqlens[1]] = mask
    if transposed:
        seen, shape, whole = (
            seen.swapaxes(2, 3),
            (*shape[:2], *shape[:1:-1]),
            whole[::-1],
        )
    rows, columns = whole
    num_words = 1 if shape[3] == 1 else -(-columns // 32)
    assert words.shape == (*shape[:2], num_words, 1 if shape[2] == 1 else rows)
    words = np.broadcast_to(words, (*shape[:2], -(-columns // 32), rows))
    bits = words[:, :, :, None] >> np.arange(32, dtype=np.uint32)[:, None] & 1
    bits = bits.reshape(*shape[:2], -1, rows).swapaxes(2, 3).astype(bool)
    # Of what is shared, all places are the same, also beyond the mask.
    own = slice(seqlens[1] if shape[3] == 1 else None)
    if transposed:
        own = slice(seqlens[0] if shape[3] == 1 else None)
    if shape[2] == 1:
        bits, seen = bits[:, :, :1], seen[:, :, :1]
    np.testing.assert_array_equal(bits[..., own][..., :columns], seen[..., own])


def test_map_of_segments():
    # Documents of 40, 24 and 36 tokens: blocks of 16 queries and of 32 keys.
    ids = np.repeat([5, -3, 9], [40, 24, 36]).astype(np.int32)[None]
    words = block_map((100, 100), (16, 32), (jnp.asarray(ids),) * 2, None)
    visited, whole = _unpacked(words, 4)[:, 0, 0]
    same = ids[0][:, None] == ids[0][None, :]
    for i in range(7):
        for j in range(4):
            block = same[16 * i : 16 * i + 16, 32 * j : 32 * j + 32]
            assert whole[i, j] == block.all(), (i, j)
            assert visited[i, j] or not block.any(), (i, j)
    # Of those without a common document only where ranges of ids overlap.
    assert not visited[0, 2] and not visited[0, 3] and not visited[6, 0]


def test_maps_of_both():
    ids = jnp.repeat(jnp.arange(2), 64)[None]
    mask = jnp.ones((1, 4, 128, 128), bool).at[0, 2, :64].set(False)
    bits = mask_bits(mask, (64, 64))
    words = block_map((128, 128), (64, 64), (ids, ids), bits)
    visited, whole = _unpacked(words, 2)
    expected = np.broadcast_to(np.eye(2, dtype=bool), (1, 4, 2, 2)).copy()
    expected[0, 2, 0] = False
    np.testing.assert_array_equal(visited, expected)
    np.testing.assert_array_equal(whole, expected)
