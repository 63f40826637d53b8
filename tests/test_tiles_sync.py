"""Barriers, rings, turns, the block template and schedulers of the tile library."""

import ctypes
import itertools
import math

import numpy as np
import pytest
import tiles
from host_library import compile_for_host
from tiles import BF16, FP16, NAMES, assert_same, integers, kernel, normals

PLACES = kernel("sync", "places", threads=384)
HANDOFF = {
    kind: kernel("sync", "handoff", kind, threads=256, shared=True)
    for kind in ("true", "false")
}
TURNS = kernel("sync", "turns", threads=128, shared=True, cluster_size=8)
NUMBERS = kernel("sync", "numbers", threads=128, shared=True, cluster_size=8)
RINGS = {
    (name, cluster): kernel(
        "sync", "ring", name, cluster, threads=384, shared=True, cluster_size=cluster
    )
    for name, cluster in ((BF16, 1), (FP16, 2))
}
SCHEDULES = kernel("sync", "schedules")


def test_places(tile_implementation):
    warps = np.arange(12)
    out = ((12, 16, 16), np.float32)
    warp, warpgroup, warp_leader, warpgroup_leader, block = PLACES(
        [out] * 5, grid=(2, 3, 2)
    )
    tile = np.ones((16, 16))
    assert_same(warp, warps[:, None, None] * tile)
    assert_same(warpgroup, (warps // 4)[:, None, None] * tile)
    z, y, x = np.unravel_index(np.arange(12), (2, 3, 2))
    places = 2000 + 100 * z + 10 * y + x
    assert_same(block, places[:, None, None] * tile)
    # A lane holds 8 of a tile's 256 values; in the interpreter the leader is the warp.
    interpreted = tile_implementation == "interpret" and not tiles.emulated
    held = 256 if interpreted else 8
    np.testing.assert_array_equal(warp_leader.sum((1, 2)), np.full(12, held))
    np.testing.assert_array_equal(
        warpgroup_leader.sum((1, 2)), np.where(warps % 4 == 0, held, 0)
    )


@pytest.mark.usefixtures("tile_implementation")
@pytest.mark.parametrize("kind", HANDOFF, ids=["named", "shared-memory"])
def test_handoff(rng, kind):
    x = integers(rng, (64, 32))
    (result,) = HANDOFF[kind]([((6, 64, 32), np.float32)], x)
    assert_same(result, np.stack([x + i for i in range(1, 7)]))


@pytest.mark.usefixtures("tile_implementation")
def test_turns(rng):
    """In the order of the turns: another order rounds differently."""
    x = normals(rng, (8, 64, 32)) * np.float32(10) ** rng.integers(-3, 4, (8, 1, 1))
    x = x.astype(np.float32)
    total, y = x[7], np.float32(0.5) + x[7]
    for part in x[6::-1]:
        total, y = total + part, np.float32(0.5) * y + part
    assert np.any(total != x.sum(0)), "the order of the sum does not show"
    f32 = np.float32
    counters, _, sums, result = TURNS(
        [((2,), np.int32), ((64 * 32,), f32), ((64, 32), f32), ((64, 32), f32)],
        x,
        grid=8,
    )
    np.testing.assert_array_equal(counters, [8, 8])
    assert_same(sums, total)
    assert_same(result, y)


@pytest.mark.usefixtures("tile_implementation")
def test_numbers():
    """Each is given to one block, and all have been when a wait for them ends."""
    counter, taken = NUMBERS([((1,), np.int32), ((8, 4, 64, 16), np.float32)], grid=8)
    assert counter == [24]
    assert (taken == taken[..., :1, :1]).all()
    taken = taken[..., 0, 0]
    assert sorted(taken[:, :3].ravel()) == list(range(24))
    np.testing.assert_array_equal(taken[:, 3], taken[:, 0])


@pytest.mark.usefixtures("tile_implementation")
@pytest.mark.parametrize(("name", "cluster"), RINGS)
@pytest.mark.parametrize("count", [1, 25])
def test_ring(rng, name, cluster, count):
    """Of 25 matrices on two workers, one gets 13: more than four rounds of its ring."""
    x = integers(rng, (count, 128, 64), NAMES[name])
    result, learnt = RINGS[name, cluster](
        [((count * cluster, 128, 64), x.dtype), ((2 * cluster, 2), np.int32)],
        x,
        grid=2 * cluster,
        tiles={0: (128 // cluster, 64), 1: (64, 64)},
    )
    expected = x.astype(np.float32) * np.arange(1, count + 1)[:, None, None]
    assert_same(result, np.repeat(expected, cluster, 0))
    for block, votes in enumerate(learnt):
        numbers = range(1 + block // cluster, count + 1, 2)
        assert (votes == sum(1 << number for number in numbers)).all()


# Blocks (or tile rows), heads (or tile columns), batches, heads of a section (or rows
# of a group), workers.
CASES = [
    (1, 1, 1, 1, 1),
    (5, 3, 2, 2, 4),
    (7, 4, 3, 5, 6),
    (4, 8, 1, 8, 3),
    (3, 2, 2, 100, 7),
    (2, 3, 2, 1, 5),
    (16, 6, 2, 4, 13),
    (3, 4, 2, 3, 4),
    (5, 7, 1, 3, 6),
]


def rounds(blocks, heads, batches, workers):
    """For every worker the indices it takes."""
    indices = range(blocks * heads * batches)
    return [list(indices[worker::workers]) for worker in range(workers)]


def sections(blocks, heads, batches, section, workers):
    """Deals each section's tiles out in rounds, every other round backwards.

    After an even number of rounds, the last of which may leave out some workers, the
    next section starts as many further.
    """
    hands = [[] for _ in range(workers)]
    rows = [(batch, head) for batch in range(batches) for head in range(heads)]
    shift, backwards = 0, False
    for first in range(0, len(rows), section):
        part = rows[first : first + section]
        tiles = [(block, head, b) for block in range(blocks) for b, head in part]
        order = [(place + shift) % workers for place in range(workers)]
        for start in range(0, len(tiles), workers):
            dealt = tiles[start : start + workers]
            for worker, tile in zip(
                reversed(order) if backwards else order, dealt, strict=False
            ):
                hands[worker].append(tile)
            backwards = not backwards
        if math.ceil(len(tiles) / workers) % 2 == 0:
            shift = (shift + len(tiles)) % workers
    return hands


def groups(rows, cols, batches, group):
    """Tiles in the order in which they are handed out."""
    return [
        (row, col, batch)
        for batch in range(batches)
        for first in range(0, rows, group)
        for col in range(cols)
        for row in range(first, min(first + group, rows))
    ]


def sequence(blocks, heads, batches):
    order = itertools.product(range(batches), range(heads), range(blocks))
    return [(block, head, batch) for batch, head, block in order]


def padded(hands, slots, entry):
    """Lists of unequal length as one array, filled up with -1."""
    return np.array([hand + [entry] * (slots - len(hand)) for hand in hands], np.int32)


def expected_schedules(blocks, heads, batches, section, workers):
    walks = rounds(blocks, heads, batches, workers)
    dealt = sections(blocks, heads, batches, section, workers)
    slots = max(map(len, walks)) + 1
    dealt_slots = max(map(len, dealt)) + 1
    return [
        padded(walks, slots, -1),
        padded(dealt, dealt_slots, (-1, -1, -1)),
        np.array(groups(blocks, heads, batches, section), np.int32),
        np.array(sequence(blocks, heads, batches), np.int32),
    ]


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    """The schedulers compiled for the host: they are integers alone."""
    source = """
#include "kernels/tile_test/scheduler.cuh"
extern "C" void schedules(int* const* out, const int* slots, const int* scalars) {
  using namespace tk::tile_test;
  const int blocks = scalars[0], heads = scalars[1], batches = scalars[2];
  const int section = scalars[3], workers = scalars[4];
  const int count = blocks * heads * batches;
  list_rounds(out[0], workers, slots[0], count);
  list_sections(out[1], workers, slots[1], blocks, heads, batches, section);
  list_groups(out[2], count, blocks, heads, section);
  list_sequence(out[3], count, blocks, heads);
}
"""
    return compile_for_host(source, tmp_path_factory.mktemp("schedulers"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schedules_on_the_host(host_library, case):
    expected = expected_schedules(*case)
    results = [np.full_like(array, -2) for array in expected]
    pointers = (ctypes.c_void_p * 4)(*(array.ctypes.data for array in results))
    slots = (ctypes.c_int * 2)(expected[0].shape[1], expected[1].shape[1])
    host_library.schedules(pointers, slots, (ctypes.c_int * 5)(*case))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_schedules_visit_every_tile_once(case):
    blocks, heads, batches, *_ = case
    count = blocks * heads * batches
    by_number, dealt, grouped, sequential = expected_schedules(*case)
    assert sorted(by_number[by_number >= 0]) == list(range(count))
    for order in (dealt.reshape(-1, 3), grouped, sequential):
        visited = [tuple(tile) for tile in order.tolist() if tile[0] >= 0]
        sizes = (blocks, heads, batches)
        assert sorted(visited) == list(itertools.product(*map(range, sizes)))


@pytest.mark.usefixtures("tile_implementation")
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_schedules_on_the_device(case):
    expected = expected_schedules(*case)
    results = SCHEDULES(
        [(array.shape, np.int32) for array in expected], scalars=case[:4]
    )
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
