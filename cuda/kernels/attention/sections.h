// How the forward pass's tiles are dealt out where a mask makes them differ. Plain C++, of the
// host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/attention/attention.h"

namespace tk::attention {

// What is to be dealt out.
struct TileGrid {
  std::int64_t block_q, block_kv;
  std::int64_t lead;  // forward_lead
  std::int64_t seqlen_q, seqlen_kv;
  std::int64_t first_offset, last_offset;  // query i sees keys from i + first to i + last
  std::int64_t rows;                       // batch entries x heads
  std::int64_t workers;
  std::int64_t row_bytes;  // of keys and values, for each row

  std::int64_t blocks() const { return (seqlen_q + block_q - 1) / block_q; }
  bool operator==(const TileGrid&) const = default;

  // Of a block of queries: the key blocks that its consumers visit, half their mean and half the
  // most, as they share the tensor cores and yet wait for each other; and its start and end, which
  // take as long as 1.2 of them.
  std::int64_t work(std::int64_t block) const {
    std::int64_t sum = 0, most = 0;
    for (std::int64_t i = 0; i < block_q; i += 64) {
      const std::int64_t first_query = block * block_q - lead + i;
      if (first_query < 0 || first_query >= seqlen_q) continue;
      const std::int64_t last_query = std::min(first_query + 64, seqlen_q) - 1;
      const std::int64_t end = std::clamp<std::int64_t>(last_query + last_offset + 1, 0, seqlen_kv);
      const std::int64_t begin = std::clamp<std::int64_t>(first_query + first_offset, 0, end);
      const std::int64_t visited = (end + block_kv - 1) / block_kv - begin / block_kv;
      sum += visited;
      most = std::max(most, visited);
    }
    const std::int64_t consumers = block_q / 64;
    return 5 * (sum + consumers * most) + 12 * consumers;
  }
};

// The workers' loads where sections have so many heads and grid::SectionedSnake deals them out.
// `work` is that of blocks, in its order.
inline std::vector<std::int64_t> deal_loads(const TileGrid& grid,
                                            const std::vector<std::int64_t>& work,
                                            std::int64_t section) {
  const std::int64_t workers = grid.workers;
  std::vector<std::int64_t> loads(workers), places(workers);
  std::int64_t shift = 0, dealt_width = 0, rounds = 0;
  bool backwards = false;
  for (std::int64_t first = 0; first < grid.rows; first += section) {
    const std::int64_t width = std::min(section, grid.rows - first);
    if (width != dealt_width) {  // what the places of a section get, if it starts forwards
      std::fill(places.begin(), places.end(), 0);
      rounds = 1;
      std::int64_t place = 0;
      for (const std::int64_t of_block : work) {
        for (std::int64_t column = 0; column < width; ++column) {
          if (place == workers) {
            place = 0;
            ++rounds;
          }
          places[rounds % 2 != 0 ? place : workers - 1 - place] += of_block;
          ++place;
        }
      }
      dealt_width = width;
    }
    if (backwards) std::reverse(places.begin(), places.end());
    for (std::int64_t place = 0; place < workers - shift; ++place) {
      loads[place + shift] += places[place];
    }
    for (std::int64_t place = workers - shift; place < workers; ++place) {
      loads[place + shift - workers] += places[place];
    }
    if (backwards) std::reverse(places.begin(), places.end());
    if (rounds % 2 == 0) {
      shift = (shift + width * static_cast<std::int64_t>(work.size())) % workers;
    } else {
      backwards = !backwards;
    }
  }
  return loads;
}

// How many heads, over all batch entries, a section of grid::SectionedSnake has: of the numbers
// that nearly fill whole rounds, the one that is dealt out most evenly, or a larger one that is
// nearly as even. The keys and values of a section are to stay in L2: 50 MB, of which each half
// serves its own multiprocessors. Short sequences are bound by memory: theirs leave most of it to
// what goes by, or half of it where that is more even by 2%.
inline int choose_section(TileGrid grid) {
  constexpr int kRounds = 6;
  const bool is_short = grid.seqlen_kv <= 1024;
  const std::int64_t roomy = (is_short ? 9 : 36) << 20, most = (is_short ? 17 : 36) << 20;
  const std::int64_t blocks = grid.blocks();
  if (grid.rows * blocks <= grid.workers) return static_cast<int>(grid.rows);
  grid.rows = std::min(grid.rows, 32 * grid.workers);  // beyond, all are as even
  std::vector<std::int64_t> work(blocks);
  for (std::int64_t rank = 0; rank < blocks; ++rank) work[rank] = grid.work(blocks - 1 - rank);
  std::int64_t chosen = 0, least = 0;
  for (int rounds = 1; rounds <= kRounds; ++rounds) {
    const std::int64_t section =
        std::clamp<std::int64_t>(rounds * grid.workers / blocks, 1, grid.rows);
    const std::int64_t bytes = section * grid.row_bytes;
    if (section == chosen) continue;
    if (chosen > 0 && bytes > most) break;
    const auto loads = deal_loads(grid, work, section);
    const std::int64_t load = *std::max_element(loads.begin(), loads.end());
    const std::int64_t bearable = bytes <= roomy ? 1003 : 980;  // of the least so far, thousandths
    if (chosen == 0 || 1000 * load < bearable * least) {
      chosen = section;
      least = least > 0 ? std::min(load, least) : load;
    }
  }
  return static_cast<int>(chosen);
}

}  // namespace tk::attention
