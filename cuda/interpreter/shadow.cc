#include "interpreter/shadow.h"

#include <string>

#include "interpreter/report.h"

namespace tk::interpreter {
namespace {

std::string place(std::uint32_t chunk) {
  return " at byte " + std::to_string(chunk * kChunkBytes) + " of shared memory";
}

std::string origin(const Access& access) {
  return std::string(access.what) + " at " + text(access.at) + ", warp " +
         std::to_string(access.warp) + " of block " + std::to_string(access.block);
}

}  // namespace

Shadow::Cell& Shadow::cell(std::uint32_t chunk, const Access& access) {
  if (chunk < cells_.size()) return cells_[chunk];
  fail(FaultKind::kOutOfBounds,
       std::string(access.what) + place(chunk) + ", of which the block has " +
           std::to_string(cells_.size() * kChunkBytes),
       access.at);
}

void Shadow::check_after_write(const AccessLog& log, const VectorClock& clock, std::uint32_t write,
                               std::uint32_t chunk, const Access& access, bool writes) const {
  if (write == 0) {
    if (writes) return;
    fail(FaultKind::kSharedUnwritten,
         std::string(access.what) + place(chunk) + ", which nobody has written", access.at);
  }
  const Access& before = log.access(write);
  if (clock[before.who] < before.count) {
    const bool landing = before.kind == AccessKind::kCopy;
    fail(writes ? FaultKind::kSharedOverwritten : FaultKind::kSharedReadEarly,
         std::string(access.what) + place(chunk) +
             (landing ? ", although no wait says that what lands there has landed ("
                      : ", although no barrier orders this after what was written there (") +
             origin(before) + ")",
         access.at);
  }
  const bool crosses = before.kind == AccessKind::kPlain && access.kind != AccessKind::kPlain;
  if (crosses && clock[before.published] < before.count) {
    fail(FaultKind::kMissingFence,
         std::string(access.what) + place(chunk) +
             ", which was written by ordinary stores that publish_shared did not follow before "
             "the barrier (" +
             origin(before) + ")",
         access.at);
  }
}

void Shadow::check_after_reads(const AccessLog& log, const VectorClock& clock, std::uint32_t reads,
                               std::uint32_t chunk, const Access& access) const {
  for (const std::uint32_t number : log.set(reads)) {
    const Access& before = log.access(number);
    if (clock[before.who] >= before.count) continue;
    fail(FaultKind::kSharedOverwritten,
         std::string(access.what) + place(chunk) +
             ", although nothing says that it has been read (" + origin(before) + ")",
         access.at);
  }
}

void Shadow::read(AccessLog& log, const VectorClock& clock, const Chunks& chunks,
                  const Access& access) {
  const std::uint32_t self = log.add(access);
  std::uint32_t checked = 0;
  std::vector<std::pair<std::uint32_t, std::uint32_t>> grown;  // set -> set with this access
  for (const std::uint32_t chunk : chunks) {
    Cell& here = cell(chunk, access);
    if (here.write == 0 || here.write != checked) {
      check_after_write(log, clock, here.write, chunk, access, false);
      checked = here.write;
    }
    std::uint32_t with_self = 0;
    for (const auto& [from, to] : grown) {
      if (here.reads == from || here.reads == to) with_self = to;
    }
    if (with_self == 0) {
      with_self = log.with(here.reads, self);
      grown.emplace_back(here.reads, with_self);
    }
    here.reads = with_self;
  }
}

void Shadow::write(AccessLog& log, const VectorClock& clock, const Chunks& chunks,
                   const Access& access) {
  const std::uint32_t self = log.add(access);
  std::uint32_t checked_write = 0, checked_reads = 0;
  for (const std::uint32_t chunk : chunks) {
    Cell& here = cell(chunk, access);
    if (here.write == self) continue;
    if (here.write != checked_write) {
      check_after_write(log, clock, here.write, chunk, access, true);
      checked_write = here.write;
    }
    if (here.reads != checked_reads) {
      check_after_reads(log, clock, here.reads, chunk, access);
      checked_reads = here.reads;
    }
    here = {self, 0};
  }
}

}  // namespace tk::interpreter
