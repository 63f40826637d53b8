"""How causal key blocks are dealt out in waves: each once, in an order that ends."""

import ctypes
import itertools
import random

import host_library
import pytest

SOURCE = """
#define TK_INTERPRETER
#include "kernels/attention/turns.cuh"
using namespace tk;
using namespace tk::attention;
using QTurns = Turns<Mask::kCausal, 0, 128, 64, 128>;
static BackwardParams params_of(const int* x) {
  BackwardParams params = {};
  params.seqlen_q = x[0];
  params.seqlen_kv = x[1];
  params.last_offset = x[2];
  params.tile_rows = x[3];
  params.rows_together = x[4];
  params.phase_blocks = x[5];
  params.turn_group = x[6];
  params.q_blocks = ceil_div(x[0], 64);
  params.kv_blocks = ceil_div(x[1], 128);
  return params;
}
extern "C" void deal(const int* x, int number, int* tile) {
  const DealtTile dealt = QTurns::deal(params_of(x), number);
  tile[0] = dealt.n;
  tile[1] = dealt.row;
  tile[2] = dealt.wave.first;
  tile[3] = dealt.wave.end;
  tile[4] = dealt.wave.up;
  tile[5] = dealt.wave_dealt;
}
// The first query block, how many there are, and the turns at them.
extern "C" void turns(const int* x, const int* tile, int* first, int* steps,
                      int* turns) {
  const BackwardParams params = params_of(x);
  QTurns q_turns = {params.q_blocks, params.kv_blocks, params.turn_group,
                    {x[0], x[1], -(1 << 30), x[2]}};
  q_turns.wave = {tile[2], tile[3], tile[4] != 0};
  *first = q_turns.first_q_block(tile[0]);
  *steps = q_turns.steps(tile[0]);
  const BlockMap map = {};
  for (int i = 0; i < *steps; ++i) {
    turns[i] = q_turns.turn(tile[0], *first + i, {map, 0, 0, 0});
  }
}
extern "C" long together(long key_blocks, long rows, long group, long head_dim,
                         long resident) {
  return causal_rows_together(key_blocks, rows, group, head_dim, resident);
}
"""
# Queries, keys, the diagonal's offset, key/value heads, multiprocessors.
CASES = (
    (640, 640, 0, 3, 4),
    (2048, 2048, 0, 5, 7),
    (2048, 2048, 0, 8, 4),
    (1000, 2000, 1000, 4, 6),
    (2000, 900, 0, 4, 5),
    (1024, 2048, -300, 3, 4),
    (1500, 1500, 1500, 4, 5),
    (3000, 3000, 0, 1, 6),
    (256, 256, 0, 30, 8),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = host_library.compile_for_host(SOURCE, tmp_path_factory.mktemp("waves"))
    library.together.restype = ctypes.c_long
    library.together.argtypes = [ctypes.c_long] * 5
    return library


class Tile:
    def __init__(self, library, sizes, number):
        self.number = number
        place = (ctypes.c_int * 6)()
        library.deal(sizes, number, place)
        self.n, self.row, self.first, self.end, up, self.wave_dealt = place
        self.up = bool(up)
        first, steps = ctypes.c_int(), ctypes.c_int()
        turns = (ctypes.c_int * 4096)()
        library.turns(sizes, place, ctypes.byref(first), ctypes.byref(steps), turns)
        visits = [(first.value + i, turns[i]) for i in range(steps.value)]
        self.visits = visits if self.up else visits[::-1]


def deal(library, case, together=None):
    queries, keys, offset, rows, resident = case
    key_blocks = -(-keys // 128)
    together = together or library.together(key_blocks, rows, 1, 128, resident)
    phase = max(1, min(key_blocks, 2 * resident // together))
    sizes = (ctypes.c_int * 7)(queries, keys, offset, rows, together, phase, resident)
    return [Tile(library, sizes, i) for i in range(key_blocks * rows)]


def each(test):
    cases = pytest.mark.parametrize("case", CASES, ids=str)
    return cases(pytest.mark.parametrize("together", [None, 1, 2, 3])(test))


@each
def test_every_tile_is_dealt_once(library, case, together):
    together = together and min(together, case[3])
    tiles = deal(library, case, together)
    blocks = range(-(-case[1] // 128))
    assert sorted((tile.n, tile.row) for tile in tiles) == list(
        itertools.product(blocks, range(case[3]))
    )


@each
def test_waves_run_at_once(library, case, together):
    """Numbers of a wave that goes up are no further apart than there are blocks."""
    together = together and min(together, case[3])
    tiles = deal(library, case, together)
    for tile in tiles:
        assert tile.first <= tile.n < tile.end
        if not tile.up:
            continue
        wave = [
            other.number
            for other in tiles
            if other.row == tile.row and tile.first <= other.n < tile.end
        ]
        assert len(wave) == tile.end - tile.first
        assert max(wave) < tile.wave_dealt <= min(wave) + case[4]


@each
def test_turns_are_a_permutation(library, case, together):
    together = together and min(together, case[3])
    turns = {}
    for tile in deal(library, case, together):
        for block, turn in tile.visits:
            turns.setdefault((tile.row, block), []).append(turn)
    for taken in turns.values():
        assert sorted(taken) == list(range(len(taken)))


class Walk:
    """Blocks that take tiles by their numbers and turns at query blocks, in any order.

    A block takes a tile while it still waits at the last queries of the one before.
    """

    def __init__(self, tiles, blocks, rng, careful=True):
        self.tiles, self.rng, self.careful = tiles, rng, careful
        self.taken = 0
        self.counters = {}
        self.queues = [[] for _ in range(blocks)]  # [tile, visits left]

    def may_take(self, queue):
        if self.taken == len(self.tiles) or len(queue) > 1:
            return False
        if not queue:
            return True
        tile, left = queue[0]
        if self.careful and tile.up and self.taken < tile.wave_dealt:
            return False
        return len(left) <= 3

    def may_step(self, queue):
        if not queue:
            return False
        tile, left = queue[0]
        return not left or self.counters.get((tile.row, left[0][0]), 0) == left[0][1]

    def ends(self):
        while True:
            acts = [(self.take, q) for q in self.queues if self.may_take(q)]
            acts += [(self.step, q) for q in self.queues if self.may_step(q)]
            if not acts:
                return self.taken == len(self.tiles) and not any(self.queues)
            act, queue = self.rng.choice(acts)
            act(queue)

    def take(self, queue):
        tile = self.tiles[self.taken]
        queue.append((tile, list(tile.visits)))
        self.taken += 1

    def step(self, queue):
        tile, left = queue[0]
        if left:
            block, turn = left.pop(0)
            self.counters[tile.row, block] = turn + 1
        else:
            queue.pop(0)


@each
def test_every_order_ends(library, case, together):
    together = together and min(together, case[3])
    tiles = deal(library, case, together)
    for seed in range(3):
        assert Walk(tiles, case[4], random.Random(seed)).ends()


def test_who_may_take_a_tile_of_its_own_wave(library):
    """Without the rule that nobody may, a block waits for what it has taken itself."""
    case = (640, 640, 0, 2, 3)
    tiles = deal(library, case, together=1)
    assert any(tile.up for tile in tiles)
    walks = [
        [Walk(tiles, 3, random.Random(seed), careful).ends() for seed in range(200)]
        for careful in (True, False)
    ]
    assert all(walks[0])
    assert not all(walks[1])


@pytest.mark.parametrize(
    ("key_blocks", "rows", "group", "head_dim", "expected"),
    [
        (128, 16, 1, 128, 8),
        (128, 8, 4, 128, 4),
        (64, 32, 1, 128, 8),
        (32, 64, 1, 128, 8),
        (16, 64, 4, 128, 16),
        (8, 256, 1, 128, 32),
        (8, 128, 4, 128, 8),
        (4, 512, 1, 128, 32),
        (4, 1024, 1, 64, 64),
        (128, 2, 1, 128, 2),
        (512, 1, 8, 128, 1),
    ],
)
def test_heads_side_by_side(library, key_blocks, rows, group, head_dim, expected):
    """On 132 multiprocessors, what was fastest where it was measured."""
    assert library.together(key_blocks, rows, group, head_dim, 132) == expected
