"""Packed documents of Hedgehog attention: their tiles, and that each is as if alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hedgehog_kernel_cases import EXACT, Case, arrays_of, public
from recurrent_cases import quick_jit, rounded, weights_like

from tk_jax.ops.hedgehog_attention import config, documents
from tk_jax.ops.hedgehog_attention.xla import token_positions

interpreted = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on the CPU alone"
)


def plain_tiles(positions) -> list[tuple[int, int]]:
    """First tokens and ends, one after another."""
    seqlen = len(positions)
    bounds = [t for t in range(seqlen) if positions[t] % 64 == 0] + [seqlen]
    tiles, start = [], 0
    while start < seqlen:
        end = max(x for x in bounds if start < x <= start + 64)
        tiles.append((start, end))
        start = end
    return tiles


@functools.partial(jax.jit, static_argnums=1)
def found_tiles(starts, before):
    lengths = jnp.full(starts.shape[0], before, jnp.int32)
    positions = token_positions(lengths, starts, starts.shape)
    return positions, documents.find_tiles(positions).documents


@pytest.mark.parametrize("before", [0, 128])
@pytest.mark.parametrize("seqlen", [1, 64, 65, 700])
def test_tiles(seqlen, before):
    rng = np.random.default_rng(seqlen)
    often = np.array([0.0, 0.01, 0.03, 0.2, 0.5, 1.0])
    starts = rng.random((6, seqlen)) < often[:, None]
    starts[:, 0] = False
    positions, packed = jax.tree.map(np.asarray, found_tiles(starts, before))
    windows = packed.windows.reshape(len(starts), -1, 64)
    for b in range(len(starts)):
        tiles = plain_tiles(positions[b])
        count = len(tiles)
        assert packed.counts[b] == count <= config.most_tiles(seqlen)
        assert (packed.tiles[b, count:] == 0).all() and (windows[b, count:] == -1).all()
        far_chunks = set()
        for i, (start, end) in enumerate(tiles):
            rows = np.arange(start, end)
            first = rows - positions[b, rows] % 64 - start
            assert (windows[b, i, : end - start] == first).all()
            assert (windows[b, i, end - start :] == -1).all()
            of_first, position = (first == 0).sum(), positions[b, start]
            flags = config.FAR_TILE * (position >= 128)
            flags += config.ONE_WINDOW * (of_first == 64)
            continued = of_first if position >= 64 else 0
            expected = (start, end - start, continued, flags)
            assert tuple(packed.tiles[b, i]) == expected
            if i > 0 and continued:
                assert tiles[i - 1] == (start - 64, start)
            if position >= 128:
                assert start // 64 not in far_chunks
                far_chunks.add(start // 64)


def _pulled_back(case, arrays, cotangent):
    def run(arrays, cotangent):
        (out,), pull_back = jax.vjp(lambda x: public(case)(**x), arrays)
        return out, pull_back((cotangent.astype(out.dtype),))[0]

    return quick_jit(run)(arrays, jnp.asarray(cotangent))


@interpreted
def test_each_document_is_as_if_it_were_alone():
    """Two rows, and the same tokens in one row, after ten others."""
    length, others = 150, 10
    alone = Case(length, heads=(2, 1), batch=2)
    arrays = rounded(arrays_of(alone), alone.dtype, EXACT)
    cotangent = weights_like(arrays["q"])
    expected = _pulled_back(alone, arrays, cotangent)

    def pack(x):
        rows = jnp.asarray(x).reshape(1, 2 * length, *x.shape[2:])
        return jnp.concatenate([rows[:, :others] * 3, rows], axis=1)

    case = Case(2 * length + others, heads=(2, 1), documents=(others, length))
    names = ("q", "k", "v")
    packed = arrays | {name: pack(arrays[name]) for name in names}
    ids = jnp.arange(2 * length + others) >= jnp.array([[others], [others + length]])
    ids = jnp.sum(ids, axis=0, dtype=jnp.int32)
    cotangent = pack(cotangent).at[:, :others].set(0)

    def run(packed, cotangent):
        def call(packed):
            return public(case)(**packed, segment_ids=ids)[0]

        out, pull_back = jax.vjp(call, packed)
        return out, pull_back(cotangent.astype(out.dtype))[0]

    out, gradients = quick_jit(run)(packed, cotangent)

    def rows(x):
        return np.float32(x[:, others:].reshape(2, length, *x.shape[2:]))

    np.testing.assert_allclose(rows(out), np.float32(expected[0]), rtol=1e-2, atol=1e-3)
    for name, x in gradients.items():
        got = rows(x) if name in names else np.float32(x)
        want = np.float32(expected[1][name])
        assert np.abs(got - want).max() <= 1e-2 * np.abs(want).max(), name
        if name in names:
            assert (x[:, :others] == 0).all(), name


@interpreted
def test_a_token_that_is_not_a_number_reaches_no_document_further_on():
    case = Case(400, documents=(150, 70, 180))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    run = quick_jit(public(case))
    (expected,) = run(**arrays)
    for name in ("q", "k", "v"):
        (out,) = run(**(arrays | {name: arrays[name].at[:, 20].set(jnp.nan)}))
        assert jnp.isnan(out[:, 20]).all()
        # Within the document its keys are seen by all that follow.
        last = 64 if name == "q" else 150
        np.testing.assert_array_equal(
            np.float32(out[:, last + 64 :]), np.float32(expected[:, last + 64 :])
        )


@interpreted
@pytest.mark.exhaustive
@pytest.mark.parametrize("mapped", [("q",), ("q_map",), ("q", "q_map")], ids=str)
@pytest.mark.parametrize("ids_mapped", [False, True])
def test_vmap_of_documents_is_a_larger_call(mapped, ids_mapped):
    case = Case(200, heads=(2, 1), documents=(150, 7))
    arrays = rounded(arrays_of(case), case.dtype, EXACT)
    ids = jnp.asarray(arrays.pop("segment_ids"))
    ids = jnp.stack([ids, jnp.roll(ids, 30)]) if ids_mapped else ids
    stacked = {name: jnp.stack([arrays[name], arrays[name] * 0.5]) for name in mapped}

    def gradients(changed, ids):
        def loss(arrays):
            (out,) = public(case)(**arrays, segment_ids=ids)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.grad(loss)(arrays | changed)

    got = quick_jit(jax.vmap(gradients, in_axes=(0, 0 if ids_mapped else None)))(
        stacked, ids
    )
    one = quick_jit(gradients)
    for i in range(2):
        changed = {name: x[i] for name, x in stacked.items()}
        for name, x in one(changed, ids[i] if ids_mapped else ids).items():
            np.testing.assert_allclose(
                np.float32(got[name][i]), np.float32(x), rtol=2e-2, atol=1e-4
            )
