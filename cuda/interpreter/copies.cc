// The copy engine: boxes of tensor maps and runs of bytes, which land and leave when it pleases.
#include <algorithm>
#include <cstring>

#include "interpreter/machine.h"
#include "interpreter/tensor_map.h"
#include "tk/interpreter/convert.h"

namespace tk::interpreter {
namespace {

// A row of a box: where its elements lie in global memory, those inside of the array.
struct BoxRow {
  std::byte* global;  // of the first element inside
  int first, count;   // elements of the row that are inside
};

std::uint32_t chunk_address(const Panel& panel, int row, int byte) {
  const std::uint32_t offset = row * panel.swizzle + byte;
  return panel.address + (offset ^ ((offset >> 3) & (panel.swizzle - 16)));
}

Chunks chunks_of(const Panel& panel) {
  Chunks chunks;
  for (int row = 0; row < panel.rows; ++row) {
    for (int byte = 0; byte < panel.columns * panel.element_bytes; byte += kChunkBytes) {
      chunks.push_back(chunk_address(panel, row, byte) / kChunkBytes);
    }
  }
  return chunks;
}

// Copies a row of a panel from (or to) consecutive bytes.
void read_row(const Panel& panel, const std::byte* base, int row, std::byte* to) {
  for (int byte = 0; byte < panel.columns * panel.element_bytes; byte += kChunkBytes) {
    std::memcpy(to + byte, base + chunk_address(panel, row, byte), kChunkBytes);
  }
}
void write_row(const Panel& panel, std::byte* base, int row, const std::byte* from) {
  for (int byte = 0; byte < panel.columns * panel.element_bytes; byte += kChunkBytes) {
    std::memcpy(base + chunk_address(panel, row, byte), from + byte, kChunkBytes);
  }
}

[[noreturn]] void refuse(const std::string& what, Location at) {
  fail(FaultKind::kTensorMap, what, at);
}

BoxMap checked_map(const TensorMap& map, Location at) {
  const BoxMap box = decode(map);
  if (box.magic != BoxMap::kMagic) refuse("the tensor map was never encoded", at);
  return box;
}

void check_fits(const BoxMap& map, const Panel& panel, std::span<const int> coordinates,
                Location at) {
  if (static_cast<int>(coordinates.size()) != map.rank) {
    refuse("a tensor map of " + std::to_string(map.rank) + " dimensions is given " +
               std::to_string(coordinates.size()) + " coordinates",
           at);
  }
  if (coordinates[0] * map.element_bytes() % kChunkBytes != 0) {
    refuse("a box starts at column " + std::to_string(coordinates[0]) +
               ", which is not on 16 bytes: the copy engine stops the kernel",
           at);
  }
  int rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  if (map.element_bytes() != panel.element_bytes || map.box[0] != panel.columns ||
      rows != panel.rows) {
    refuse("the tensor map's boxes are " + std::to_string(rows) + " rows of " +
               std::to_string(map.box[0]) + " elements of " + std::to_string(map.element_bytes()) +
               " bytes; the tile's panels are " + std::to_string(panel.rows) + " rows of " +
               std::to_string(panel.columns) + " of " + std::to_string(panel.element_bytes),
           at);
  }
  if (map.swizzle != panel.swizzle) {
    refuse("the tensor map swizzles over " + std::to_string(map.swizzle) +
               " bytes, the tile over " + std::to_string(panel.swizzle),
           at);
  }
  if (panel.address % (8 * panel.swizzle) != 0) {
    refuse("a box lands at byte " + std::to_string(panel.address) +
               " of shared memory, which the swizzle's period of " +
               std::to_string(8 * panel.swizzle) + " does not divide",
           at);
  }
}

std::vector<BoxRow> rows_of(const BoxMap& map, std::span<const int> coordinates) {
  std::vector<BoxRow> rows;
  int count = 1;
  for (int i = 1; i < map.rank; ++i) count *= map.box[i];
  for (int row = 0; row < count; ++row) {
    auto* at = static_cast<std::byte*>(map.address);
    bool inside = true;
    for (int i = 1, rest = row; i < map.rank; rest /= map.box[i], ++i) {
      const std::int64_t place = static_cast<std::int64_t>(coordinates[i]) + rest % map.box[i];
      inside = inside && place >= 0 && place < map.dims[i];
      if (inside) at += place * map.strides[i];
    }
    const std::int64_t from = coordinates[0];
    const std::int64_t first = std::clamp<std::int64_t>(-from, 0, map.box[0]);
    const std::int64_t last = std::clamp<std::int64_t>(map.dims[0] - from, first, map.box[0]);
    rows.push_back({inside ? at + (from + first) * map.element_bytes() : nullptr,
                    static_cast<int>(first), inside ? static_cast<int>(last - first) : 0});
  }
  return rows;
}

std::vector<GlobalSpan> spans_of(const std::vector<BoxRow>& rows, int element_bytes) {
  std::vector<GlobalSpan> spans;
  for (const BoxRow& row : rows) {
    if (row.count == 0) continue;
    spans.push_back({row.global, static_cast<std::size_t>(row.count) * element_bytes});
  }
  return spans;
}

template <typename T>
void add_elements(std::byte* to, const std::byte* from, int count) {
  for (int i = 0; i < count; ++i) {
    T a, b;
    std::memcpy(&a, to + i * sizeof(T), sizeof(T));
    std::memcpy(&b, from + i * sizeof(T), sizeof(T));
    const T sum = from_float<T>(to_float(a) + to_float(b));
    std::memcpy(to + i * sizeof(T), &sum, sizeof(T));
  }
}

void put(std::byte* to, const std::byte* from, int count, ElementType type, bool add) {
  const int bytes = type == ElementType::kFloat32 || type == ElementType::kInt32 ? 4 : 2;
  if (!add) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * bytes);
  } else if (type == ElementType::kFloat32) {
    add_elements<float>(to, from, count);
  } else if (type == ElementType::kBFloat16) {
    add_elements<bf16>(to, from, count);
  } else if (type == ElementType::kFloat16) {
    add_elements<fp16>(to, from, count);
  } else {
    for (int i = 0; i < count; ++i) {
      std::int32_t a, b;
      std::memcpy(&a, to + 4 * i, 4);
      std::memcpy(&b, from + 4 * i, 4);
      a += b;
      std::memcpy(to + 4 * i, &a, 4);
    }
  }
}

// Registers what a load will write, in every block where it lands, and starts it.
void start_load(const Chunks& chunks, std::uint32_t address, std::uint32_t blocks, int bytes,
                std::vector<GlobalSpan> sources, std::function<void(std::byte*)> write,
                Location at) {
  Machine& m = machine();
  Warp& warp = m.warp();
  IncomingCopy copy = {{}, address, {}, bytes, {}, at};
  std::erase_if(sources, [&](const GlobalSpan& span) {
    return !m.memory().check_inside(span.begin, span.bytes, GlobalUse::kRead, at);
  });
  std::vector<std::byte*> bases;
  for (const auto& block : m.cluster().blocks) {
    const bool lands = blocks == 0 ? block.get() == warp.block : (blocks >> block->rank & 1) != 0;
    if (!lands) continue;
    const BarrierState& barrier = m.barrier(*block, address, at);
    if (!barrier.published) {
      fail(FaultKind::kMissingFence,
           "a copy completes on a barrier whose initialisation was not published: "
           "publish_barriers is missing",
           at);
    }
    const Access access = {AccessKind::kCopy, barrier.who, barrier.phase + 1,    0,
                           "a copy lands",    at,          warp.block->index[0], warp.index};
    block->shadow.write(m.cluster().log, warp.clock, chunks, access);
    if (!sources.empty()) {
      m.account(sources, {GlobalUse::kRead, true, 0, barrier.who, barrier.phase + 1, 0, at, ""});
    }
    copy.ranks.push_back(block->rank);
    copy.phases.push_back(barrier.phase);
    bases.push_back(block->shared);
  }
  if (blocks >> m.cluster().blocks.size() != 0 && blocks != 0) {
    fail(FaultKind::kOutOfBounds, "a copy is sent to blocks that the cluster does not have", at);
  }
  copy.land = [bases = std::move(bases), write = std::move(write)] {
    for (std::byte* base : bases) write(base);
  };
  m.start_load(std::move(copy));
}

void start_store(const Chunks& chunks, std::shared_ptr<OutgoingCopy> copy,
                 std::vector<GlobalSpan> targets, bool add, Location at) {
  Machine& m = machine();
  Warp& warp = m.warp();
  const GlobalUse use = add ? GlobalUse::kAdd : GlobalUse::kWrite;
  for (const GlobalSpan& span : targets) m.memory().check_inside(span.begin, span.bytes, use, at);
  copy->group = warp.copy_group;
  copy->at = at;
  const Access access = {
      AccessKind::kCopy,    warp.copy_reads(), warp.copy_group + 1, 0, "a copy reads a tile", at,
      warp.block->index[0], warp.index};
  m.block().shadow.read(m.cluster().log, warp.clock, chunks, access);
  m.account(std::move(targets), {use, true, 0, warp.copy_writes(), warp.copy_group + 1, 0, at, ""});
  warp.copies.push_back(copy);
  m.start_copy(std::move(copy));
}

}  // namespace

void check_tensor_map(const TensorMap& map, Location at) { checked_map(map, at); }

void load_box(const Panel& panel, const TensorMap& map, std::uint32_t barrier, std::uint32_t blocks,
              std::span<const int> coordinates, Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("a copy is started", at);
  const BoxMap box = checked_map(map, at);
  check_fits(box, panel, coordinates, at);
  auto rows = rows_of(box, coordinates);
  auto spans = spans_of(rows, panel.element_bytes);
  const int row_bytes = panel.columns * panel.element_bytes;
  start_load(
      chunks_of(panel), barrier, blocks, panel.rows * row_bytes, std::move(spans),
      [=, rows = std::move(rows)](std::byte* base) {
        std::vector<std::byte> line(row_bytes);
        for (int r = 0; r < panel.rows; ++r) {
          std::fill(line.begin(), line.end(), std::byte{0});
          if (rows[r].count > 0) {
            std::memcpy(line.data() + rows[r].first * panel.element_bytes, rows[r].global,
                        static_cast<std::size_t>(rows[r].count) * panel.element_bytes);
          }
          write_row(panel, base, r, line.data());
        }
      },
      at);
}

void store_box(const TensorMap& map, const Panel& panel, std::span<const int> coordinates, bool add,
               Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("a copy is started", at);
  const BoxMap box = checked_map(map, at);
  check_fits(box, panel, coordinates, at);
  for (const int coordinate : coordinates) {
    if (coordinate >= 0) continue;
    fail(FaultKind::kOutOfBounds,
         "a copy starts before the array's first element, which loads may and stores may not", at);
  }
  auto rows = rows_of(box, coordinates);
  auto copy = std::make_shared<OutgoingCopy>();
  auto spans = spans_of(rows, panel.element_bytes);
  const int row_bytes = panel.columns * panel.element_bytes;
  copy->gather = [=, base = m.block().shared](std::vector<std::byte>& bytes) {
    bytes.resize(static_cast<std::size_t>(panel.rows) * row_bytes);
    for (int r = 0; r < panel.rows; ++r) read_row(panel, base, r, bytes.data() + r * row_bytes);
  };
  copy->scatter = [=, rows = std::move(rows), type = box.type](std::vector<std::byte>& bytes) {
    for (int r = 0; r < panel.rows; ++r) {
      if (rows[r].count == 0) continue;
      put(rows[r].global, bytes.data() + r * row_bytes + rows[r].first * panel.element_bytes,
          rows[r].count, type, add);
    }
  };
  start_store(chunks_of(panel), std::move(copy), std::move(spans), add, at);
}

void load_bytes(std::uint32_t address, const void* from, int bytes, std::uint32_t barrier,
                Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("a copy is started", at);
  if (address % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail(FaultKind::kOutOfBounds, "a bulk copy's addresses are not multiples of 16 bytes", at);
  }
  start_load(
      chunks_of(address, bytes), barrier, 0, bytes, {{from, static_cast<std::size_t>(bytes)}},
      [=](std::byte* base) { std::memcpy(base + address, from, bytes); }, at);
}

void store_bytes(void* to, std::uint32_t address, int bytes, bool add, Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("a copy is started", at);
  if (address % 16 != 0 || reinterpret_cast<std::uintptr_t>(to) % 16 != 0) {
    fail(FaultKind::kOutOfBounds, "a bulk copy's addresses are not multiples of 16 bytes", at);
  }
  auto copy = std::make_shared<OutgoingCopy>();
  copy->gather = [=, base = m.block().shared](std::vector<std::byte>& out) {
    out.assign(base + address, base + address + bytes);
  };
  copy->scatter = [=](std::vector<std::byte>& in) {
    put(static_cast<std::byte*>(to), in.data(), bytes / 4, ElementType::kFloat32, add);
  };
  start_store(chunks_of(address, bytes), std::move(copy), {{to, static_cast<std::size_t>(bytes)}},
              add, at);
}

void commit_copies(Location at) {
  require_one_lane("copies are committed", at);
  ++machine().warp().copy_group;
}

void wait_copies(int pending, bool only_read, Location at) {
  Machine& m = machine();
  m.yield();
  require_one_lane("copies are waited for", at);
  Warp& warp = m.warp();
  if (warp.copy_group < static_cast<std::uint32_t>(pending)) return;
  const std::uint32_t done = warp.copy_group - pending;  // groups before this one
  bool all_written = true;
  for (const auto& copy : warp.copies) {
    if (copy->group >= done) continue;
    Machine::read_copy(*copy);
    all_written = all_written && copy->written;
  }
  if (!only_read) {
    if (!all_written) {
      m.exclusive(
          [&] {
            for (const auto& copy : warp.copies) {
              if (copy->group < done) Machine::write_copy(*copy);
            }
          },
          at);
    }
    std::erase_if(warp.copies, [&](const auto& copy) { return copy->group < done; });
    warp.clock.raise(warp.copy_writes(), done);
  }
  warp.copies_read = std::max(warp.copies_read, done);
  warp.clock.raise(warp.copy_reads(), done);
}

}  // namespace tk::interpreter
