#include "interpreter/memory.h"

#include <algorithm>
#include <cstring>

#include "interpreter/report.h"

namespace tk::interpreter {
namespace {

// What the one who makes `access` knows of another.
std::uint32_t known(const VectorClock& clock, const GlobalAccess& access, std::int64_t cluster,
                    std::uint32_t who) {
  return cluster == access.cluster ? clock[who] : clock.of_cluster(cluster, who);
}

const char* verb_of(const GlobalAccess& access) {
  switch (access.use) {
    case GlobalUse::kRead:
      return access.by_copy ? "a copy reads" : "reads";
    case GlobalUse::kAdd:
      return access.by_copy ? "a copy adds to" : "adds to";
    case GlobalUse::kWrite:
      return access.by_copy ? "a copy writes" : "writes";
  }
  return "";
}

std::string origin(const GlobalAccess& access) {
  return " (" + std::string(verb_of(access)) + " it at " + text(access.at) + ", " + access.by + ")";
}

}  // namespace

void Memory::add(std::string name, const void* data, std::size_t bytes, bool written) {
  if (bytes == 0) return;
  const auto* begin = static_cast<const std::byte*>(data);
  const std::size_t cells = (bytes + kCellBytes - 1) / kCellBytes;
  for (Array& array : arrays_) {
    if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) {
      const std::size_t first = (begin - array.begin) / kCellBytes;
      if (written) std::memset(array.written.data() + first, 1, cells);
      array.writable = array.writable || !written;
      return;
    }
  }
  arrays_.push_back(
      {std::move(name), begin, bytes, !written, std::vector<std::uint8_t>(cells, written), {}});
}

bool Memory::overlaps(const void* data, std::size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(data);
  return std::any_of(arrays_.begin(), arrays_.end(), [&](const Array& array) {
    return begin < array.begin + array.bytes && array.begin < begin + bytes;
  });
}

void Memory::begin_launch() {
  for (Array& array : arrays_) array.cells.clear();
  log_ = {};
}

const Memory::Array& Memory::find(const void* pointer, std::size_t bytes, const char* verb,
                                  Location at) const {
  const auto* begin = static_cast<const std::byte*>(pointer);
  const Array* nearest = nullptr;
  for (const Array& array : arrays_) {
    if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) return array;
    if (begin >= array.begin && (!nearest || array.begin > nearest->begin)) nearest = &array;
  }
  std::string message = std::string(verb) + " " + std::to_string(bytes) +
                        " bytes of global memory outside of every array";
  if (nearest) {
    message += ", " + std::to_string(begin - nearest->begin) + " bytes after the start of " +
               nearest->name + ", which has " + std::to_string(nearest->bytes);
  }
  fail(FaultKind::kOutOfBounds, message, at);
}

bool Memory::check_inside(const void* pointer, std::size_t bytes, GlobalUse use,
                          Location at) const {
  if (bytes == 0) return false;
  const bool reads = use == GlobalUse::kRead;
  const Array& array = find(pointer, bytes, reads ? "reads" : "writes", at);
  if (!reads && !array.writable) {
    fail(FaultKind::kOutOfBounds,
         "writes " + array.name + ", an operand, which is not its to write", at);
  }
  return array.writable;
}

void Memory::refuse_unwritten(const Array& array, std::size_t cell, Location at) const {
  fail(FaultKind::kGlobalUnwritten,
       "reads global memory that nobody has written: byte " + std::to_string(cell * kCellBytes) +
           " of " + array.name,
       at);
}

void Memory::check_after_write(const Array& array, const Cell& cell, const GlobalAccess& access,
                               const VectorClock& clock) const {
  if (cell.write == 0) return;
  const GlobalAccess& before = log_.access(cell.write);
  if (known(clock, access, before.cluster, before.who) < before.count) {
    fail(FaultKind::kGlobalRace,
         std::string(verb_of(access)) + " a part of " + array.name +
             ", although nothing says that what was written there is done" + origin(before),
         access.at);
  }
  if (access.by_copy && !before.by_copy &&
      known(clock, access, before.cluster, before.published) < before.count) {
    fail(FaultKind::kMissingFence,
         std::string(verb_of(access)) + " a part of " + array.name +
             ", which was written by ordinary stores that publish_global did not follow" +
             origin(before),
         access.at);
  }
  // A block may well overwrite what it put there itself, a value to start from.
  const bool replaces = access.use == GlobalUse::kWrite && cell.reads == 0 && access.by_copy &&
                        before.by_copy && access.cluster != before.cluster;
  if (replaces) {
    fail(FaultKind::kLostWrite,
         std::string(verb_of(access)) + " a part of " + array.name +
             " over what another block's copy wrote, which nobody has read: one of them is lost" +
             origin(before),
         access.at);
  }
}

void Memory::check_after(const Array& array, std::uint32_t set, const GlobalAccess& access,
                         const VectorClock& clock) const {
  for (const std::uint32_t number : log_.set(set)) {
    const GlobalAccess& before = log_.access(number);
    if (known(clock, access, before.cluster, before.who) >= before.count) continue;
    fail(FaultKind::kGlobalRace,
         std::string(verb_of(access)) + " a part of " + array.name +
             ", although nothing says that " +
             (before.use == GlobalUse::kRead ? "it has been read" : "what is added there is done") +
             origin(before),
         access.at);
  }
}

void Memory::account(const std::vector<GlobalSpan>& spans, const GlobalAccess& access,
                     const VectorClock& clock) {
  const std::uint32_t self = log_.add(access);
  // Neighbours mostly have the same history: what was checked last need not be again.
  Cell checked;
  std::vector<std::pair<std::uint32_t, std::uint32_t>> grown;  // set -> set with this access
  const auto with_self = [&](std::uint32_t set) {
    for (const auto& [from, to] : grown) {
      if (set == from || set == to) return to;
    }
    grown.emplace_back(set, log_.with(set, self));
    return grown.back().second;
  };
  for (const GlobalSpan& span : spans) {
    if (span.bytes == 0) continue;
    auto& array = const_cast<Array&>(find(span.begin, span.bytes, "touches", access.at));
    const std::size_t offset = static_cast<const std::byte*>(span.begin) - array.begin;
    const std::size_t first = offset / kCellBytes;
    const std::size_t last = (offset + span.bytes + kCellBytes - 1) / kCellBytes;
    if (access.use == GlobalUse::kWrite) {
      std::memset(array.written.data() + first, 1, last - first);
    } else if (const void* hole = std::memchr(array.written.data() + first, 0, last - first)) {
      refuse_unwritten(array, static_cast<const std::uint8_t*>(hole) - array.written.data(),
                       access.at);
    }
    if (array.cells.empty()) array.cells.resize(array.written.size());
    for (std::size_t i = first; i < last; ++i) {
      Cell& cell = array.cells[i];
      if (cell.write == self) continue;
      const bool again =
          cell.write == checked.write && cell.adds == checked.adds && cell.reads == checked.reads;
      if (!again) {
        checked = cell;
        check_after_write(array, cell, access, clock);
        if (access.use != GlobalUse::kAdd) check_after(array, cell.adds, access, clock);
        if (access.use != GlobalUse::kRead) check_after(array, cell.reads, access, clock);
      }
      if (access.use == GlobalUse::kWrite) {
        cell = {self, 0, 0};
      } else if (access.use == GlobalUse::kAdd) {
        cell.adds = with_self(cell.adds);
      } else {
        cell.reads = with_self(cell.reads);
      }
    }
  }
}

void Memory::check_counter(const int* counter, std::int64_t cluster, const VectorClock& clock,
                           Location at) const {
  const Array& array = find(counter, sizeof(int), "waits for", at);
  const std::size_t first =
      (reinterpret_cast<const std::byte*>(counter) - array.begin) / kCellBytes;
  if (array.written[first] == 0) refuse_unwritten(array, first, at);
  if (array.cells.empty()) return;
  const GlobalAccess access = {GlobalUse::kRead, false, cluster, 0, 0, 0, at, ""};
  check_after_write(array, array.cells[first], access, clock);
}

}  // namespace tk::interpreter
