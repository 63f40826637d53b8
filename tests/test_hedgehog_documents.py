"""The tiles that packed documents of Hedgehog attention are cut into."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tk_jax.ops.hedgehog_attention import config, documents
from tk_jax.ops.hedgehog_attention.xla import token_positions


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


@pytest.mark.parametrize(
    ("seqlen", "before"), [(1, 0), (64, 128), (65, 0), (500, 0), (500, 128)]
)
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
