"""How the forward pass deals tiles out under a mask: evenly, as the kernel walks."""

import ctypes
import itertools

import host_library
import numpy as np
import pytest

from tk_jax.ops.attention import tiling as attention_tiling

SOURCE = """
#include "kernels/attention/sections.h"
#include "tk/grid/scheduler.cuh"
using namespace tk;
static attention::TileGrid grid_of(const long* x) {
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9]};
}
extern "C" int choose(const long* x) { return attention::choose_section(grid_of(x)); }
extern "C" long lead(const long* x) {
  return attention::forward_lead(x[3], x[0], attention::Mask::kCausal, 0);
}
// Every worker's load as it is predicted, and as it comes about.
extern "C" void loads(const long* x, int section, int heads, long* predicted,
                      long* walked) {
  const attention::TileGrid grid = grid_of(x);
  const int blocks = static_cast<int>(grid.blocks());
  const int workers = static_cast<int>(grid.workers);
  std::vector<std::int64_t> work;
  for (int block = blocks - 1; block >= 0; --block) work.push_back(grid.work(block));
  const auto dealt = attention::deal_loads(grid, work, section);
  std::copy(dealt.begin(), dealt.end(), predicted);
  const int batches = static_cast<int>(grid.rows) / heads;
  for (int worker = 0; worker < workers; ++worker) {
    walked[worker] = 0;
    grid::SectionedSnake walk{worker, workers, blocks, heads, batches, section};
    for (walk.start(); walk.valid(); walk.next()) {
      walked[worker] += work[walk.tile().block];
    }
  }
}
"""
MULTIPROCESSORS = 132
# Head dim, heads, heads of keys.
FAMILIES = ((64, 32, 32), (128, 16, 16), (128, 32, 8), (256, 8, 8))
SEQLENS = (256, 512, 1000, 1024, 2048, 4096, 8192, 16384)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return host_library.compile_for_host(SOURCE, tmp_path_factory.mktemp("sections"))


class Grid:
    """A causal call's tiles, of 16384 tokens."""

    def __init__(self, library, family, seqlen, workers=MULTIPROCESSORS):
        head_dim, self.heads, kv_heads = family
        tiles = attention_tiling.forward_config(head_dim, head_dim, seqlen, "causal")
        self.rows = 16384 // seqlen * self.heads
        self.row_bytes = 4 * head_dim * seqlen * kv_heads // self.heads
        self.workers = workers
        self.library = library
        fields = [tiles.block_q, tiles.block_kv, 0, seqlen, seqlen, -seqlen, 0]
        fields += [self.rows, workers, self.row_bytes]
        self.fields = (ctypes.c_long * 10)(*fields)
        self.fields[2] = library.lead(self.fields)

    def choose(self) -> int:
        return self.library.choose(self.fields)

    def loads(self, section):
        predicted, walked = np.zeros((2, self.workers), np.int64)
        self.library.loads(
            self.fields,
            section,
            self.heads,
            ctypes.c_void_p(predicted.ctypes.data),
            ctypes.c_void_p(walked.ctypes.data),
        )
        return predicted, walked


@pytest.mark.parametrize("workers", [7, 114, MULTIPROCESSORS])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_loads_are_what_the_kernel_walks(library, family, workers):
    for seqlen, section in itertools.product((512, 1000, 4096), (1, 5, 33, 1000)):
        predicted, walked = Grid(library, family, seqlen, workers).loads(section)
        np.testing.assert_array_equal(predicted, walked)


@pytest.mark.parametrize("seqlen", SEQLENS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_work_is_even(library, family, seqlen):
    """Within 3% of it, and what a section reads stays in L2."""
    grid = Grid(library, family, seqlen)
    section = grid.choose()
    assert 1 <= section <= grid.rows
    loads, _ = grid.loads(section)
    assert loads.max() <= 1.035 * loads.mean()
    assert section * grid.row_bytes <= (17 if seqlen <= 1024 else 36) << 20


def test_few_tiles_are_one_section(library):
    grid = Grid(library, (128, 4, 4), 16384 // 4)
    assert grid.rows * 32 > MULTIPROCESSORS
    grid.fields[7] = 4  # of one batch element
    assert grid.choose() == 4


@pytest.mark.parametrize("seqlen", [1, 63, 64, 128, 192, 200, 330, 4096])
def test_the_first_tile_is_the_one_that_is_cut(library, seqlen):
    """By whole consumers: 64 queries."""
    for block_q in (64, 128, 192):
        fields = (ctypes.c_long * 10)(block_q, 128, 0, seqlen)
        lead = library.lead(fields)
        missing = -seqlen % block_q
        assert lead == missing // 64 * 64
