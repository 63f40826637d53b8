"""Packed documents: the tiles that kernels work on, and the sums before each.

Windows begin wherever a document does. A tile is as many whole windows, in order, as
have at most 64 tokens, so that a full window is a tile by itself, and any two tiles in
a row have more than 64 tokens: there are at most twice as many as there would be
chunks, however short documents are. ``cuda/kernels/hedgehog_attention`` says what a
tile's queries see.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tk_jax.ops.hedgehog_attention import calls, config

# Shares that are added up one by one.
_FEW = 4


class Tiles(NamedTuple):
    """What kernels are told, and the first tokens of the documents of tiles."""

    documents: calls.Documents
    origins: jax.Array | None  # int32 [B, most + 2]; None where all is one document


def find_tiles(positions) -> Tiles:
    """Of tokens that so many of their document precede, int32 [B, T].

    What each row begins with is a window's start.
    """
    batch, seqlen = positions.shape
    most = config.most_tiles(seqlen)
    token = jnp.arange(seqlen, dtype=jnp.int32)
    is_start = positions % config.CHUNK == 0
    window = lax.cummax(jnp.where(is_start, token, 0), axis=1)
    # The tile that begins with a token ends where the last window that it would reach
    # into begins; beyond the sequence nothing does.
    missing = ((0, 0), (0, config.CHUNK + 1))
    ends = jnp.pad(window, missing, constant_values=seqlen)[:, config.CHUNK :]
    starts = _iterated(ends, most + 3)

    first, tokens = starts[:, :-1], jnp.diff(starts, axis=1)
    is_tile = tokens > 0
    position = jnp.where(is_tile, _at(positions, first), 0)
    row = jnp.arange(config.CHUNK, dtype=jnp.int32)
    rows = (first[:, :, None] + row).reshape(batch, first.shape[1] * config.CHUNK)
    windows = _at(window, rows).reshape(*first.shape, config.CHUNK) - first[:, :, None]
    windows = jnp.where(row < tokens[:, :, None], windows, -1)
    of_first_window = jnp.sum(windows == 0, axis=-1, dtype=jnp.int32)
    flags = jnp.where(position >= 2 * config.CHUNK, config.FAR_TILE, 0)
    flags |= jnp.where(of_first_window == config.CHUNK, config.ONE_WINDOW, 0)
    continued = jnp.where(position >= config.CHUNK, of_first_window, 0)
    numbers = [jnp.where(is_tile, first, 0), tokens, continued, flags]
    documents = calls.Documents(
        tiles=jnp.stack(numbers, axis=-1).astype(jnp.int32),
        counts=jnp.sum(is_tile, axis=1, dtype=jnp.int32),
        windows=windows[:, :most]
        .reshape(batch, most * config.CHUNK)
        .astype(jnp.float32),
    )
    return Tiles(documents, first - position)


def of_chunks(batch: int, seqlen: int) -> Tiles:
    """The chunks of sequences that are not packed, for the kernel of sums.

    All are far: before the first tokens is nothing that adds to sums.
    """
    count, most = -(-seqlen // config.CHUNK), config.most_tiles(seqlen)
    first = config.CHUNK * np.arange(count)
    numbers = np.zeros((most + 2, 4), np.int32)
    numbers[:count, 0] = first
    numbers[:count, 1] = np.minimum(seqlen - first, config.CHUNK)
    numbers[:count, 2] = config.CHUNK
    numbers[:count, 3] = config.FAR_TILE | config.ONE_WINDOW
    documents = calls.Documents(
        tiles=jnp.broadcast_to(numbers, (batch, *numbers.shape)),
        counts=jnp.full((batch,), count, jnp.int32),
        # The kernel of sums does not ask.
        windows=jnp.zeros((batch, most * config.CHUNK), jnp.float32),
    )
    return Tiles(documents, None)


def _iterated(following, count):
    """Of each row of [B, n]: 0, what follows 0, what follows that, ...: [B, count].

    By doubling, in as many steps as the last one's number has bits.
    """
    index = jnp.arange(count, dtype=jnp.int32)
    places = jnp.broadcast_to(following[:, :1] * 0, (following.shape[0], count))
    for bit in range((count - 1).bit_length()):
        places = jnp.where((index >> bit) & 1, _at(following, places), places)
        following = _at(following, following)
    return places


def _at(x, index):
    """x[b, index[b, i]], and its last one beyond."""
    return jnp.take_along_axis(x, jnp.minimum(index, x.shape[1] - 1), axis=1)


def of_tokens(tiles: Tiles, x):
    """[B, H, tiles * 64] with zeros for rows that are no tokens."""
    is_token = tiles.documents.windows >= 0
    return jnp.where(is_token[:, None], x, 0)


# -- Shares of tiles ------------------------------------------------------------------


def _kept(tiles: Tiles, shares: int, *, reverse: bool):
    """Whether what sums there are at a share's start are still in those at its end.

    bool [B, shares]; with ``reverse``, of what is at its end in those at its start.
    None where all are.
    """
    if tiles.origins is None:
        return None
    counts = tiles.documents.counts[:, None]
    size = -(-counts // shares)
    bounds = jnp.minimum(jnp.arange(shares + 1, dtype=jnp.int32) * size, counts)
    origins = _at(tiles.origins, bounds)
    is_far = _at(tiles.documents.tiles[..., 3] & config.FAR_TILE, bounds) > 0
    far = is_far[:, :-1] if reverse else is_far[:, 1:]
    return far & (origins[:, 1:] == origins[:, :-1])


def chained(first, kept, added):
    """x[0] = first, x[s + 1] = (x[s] where kept[s], or 0) + added[s], along axis 2.

    ``first`` may be None for zeros, and ``kept`` where all are.
    """
    first = jnp.zeros_like(added[:, :, 0]) if first is None else first
    if kept is None and added.shape[2] <= _FEW:
        # One fusion, which a scan is not.
        values = [first]
        for i in range(added.shape[2]):
            values.append(values[-1] + added[:, :, i])
        return jnp.stack(values, axis=2)
    values = jnp.concatenate([first[:, :, None], added], axis=2)
    if kept is None:
        return jnp.cumsum(values, axis=2)
    kept = jnp.pad(kept, ((0, 0), (1, 0)))
    kept = jnp.expand_dims(kept, (1, *range(3, values.ndim)))

    def after(one, other):
        return one[0] & other[0], other[1] + jnp.where(other[0], one[1], 0)

    return lax.associative_scan(after, (kept, values), axis=2)[1]


def starts_of_segments(arrays, tiles: Tiles, segments: int, pieces: int):
    """Sums and normalizer before each segment of ``pieces`` shares; None for zeros."""
    given = (arrays.sums, arrays.normalizer)
    if segments == 1:
        return tuple(None if x is None else x[:, :, None] for x in given)
    count = pieces * (segments - 1)
    _, added = _walk_on(arrays, tiles, shares=segments * pieces, ended=count)
    kept = _kept(tiles, segments * pieces, reverse=False)[:, :count]
    return tuple(
        chained(first, kept, x)[:, :, ::pieces]
        for first, x in zip(given, added, strict=True)
    )


def states(arrays, tiles: Tiles):
    """Sums and normalizers before far tiles, [B, K, chunks, ..]."""
    shares = config.segments(*arrays.k.shape[:3])
    return stored_states(arrays, tiles, starts_of_segments(arrays, tiles, shares, 1))


def stored_states(arrays, tiles: Tiles, start):
    """The same, from what segments start with."""
    shares = config.segments(*arrays.k.shape[:3])
    stored, _ = _walk_on(arrays, tiles, shares=shares, start=start, stored=True)
    return stored


def _walk_on(arrays, tiles, **settings):
    return calls.document_states(
        arrays.k,
        arrays.v,
        tiles.documents,
        k_map=arrays.k_map,
        first=arrays.first,
        **settings,
    )


def state_gradients(arrays, tiles: Tiles, features, delta, dout):
    """After the tiles that are seen from afar, [B, H, chunks, ..]; before the first.

    The latter are None unless there are sums to begin with.
    """
    shares = config.segments(*dout.shape[:3])
    rows = tiles.documents.windows.shape[1]
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, rows - delta.shape[2])))
    walk = functools.partial(
        calls.document_states,
        features,
        dout,
        tiles.documents,
        delta=delta,
        shares=shares,
    )
    ends = (None, None)
    if shares > 1:
        _, added = walk(ended=shares)
        kept = _kept(tiles, shares, reverse=True)
        if kept is not None:
            kept = jnp.flip(kept, 1)[:, :-1]
        ends = (
            jnp.flip(chained(None, kept, jnp.flip(x, 2)[:, :, :-1]), 2) for x in added
        )
    wanted = arrays.sums is not None
    stored, starts = walk(
        start=tuple(ends), stored=True, ended=shares if wanted else None
    )
    return stored, tuple(x[:, :, 0] if wanted else None for x in starts)
