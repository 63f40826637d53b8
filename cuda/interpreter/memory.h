// Global memory: the arrays a kernel was given, which of their bytes anybody wrote, and who in this
// launch read and wrote them.
//
// As with shared memory (shadow.h), an access is refused unless what it depends on is known, by the
// clock of whoever makes it, to have happened. Arrays that are only read need no such account.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "interpreter/access_sets.h"
#include "interpreter/clock.h"
#include "tk/interpreter/engine.h"

namespace tk::interpreter {

enum class GlobalUse : std::uint8_t { kRead, kAdd, kWrite };

struct GlobalAccess {
  GlobalUse use;
  bool by_copy;  // by the copy engine, not by a warp's own loads and stores
  std::int64_t cluster;
  std::uint32_t who, count;  // done for everyone whose clock says so
  std::uint32_t published;   // of plain writes: whose count says that the async proxy sees them
  Location at;
  std::string by;  // "block (0, 0, 0) warp 5 (consumer 0)"

  bool same_agent(const GlobalAccess& other) const {
    return cluster == other.cluster && who == other.who;
  }
};

class Memory {
 public:
  // Arrays that overlap or repeat are taken once; one that anybody says is written is.
  // Those that are there to be read may not be written.
  void add(std::string name, const void* data, std::size_t bytes, bool written);
  bool overlaps(const void* data, std::size_t bytes) const;
  // Calls visit(data, bytes) for each array.
  template <typename Visit>
  void for_each_array(Visit&& visit) const {
    for (const Array& array : arrays_) visit(array.begin, array.bytes);
  }
  // Everything that was done before is known to everyone.
  void begin_launch();

  // Fails where the bytes lie outside of every array, or are to be written and may not be. Whether
  // the launch may write them, which makes every access to them one to be accounted for.
  bool check_inside(const void* pointer, std::size_t bytes, GlobalUse use, Location at) const;
  // Fails where it must not happen now, and takes note of it. One at a time.
  void account(const std::vector<GlobalSpan>& spans, const GlobalAccess& access,
               const VectorClock& clock);
  // Fails where a number that warps wait for was never written, or not surely.
  void check_counter(const int* counter, std::int64_t cluster, const VectorClock& clock,
                     Location at) const;

 private:
  // Those are kept apart that may have different histories: a half each.
  static constexpr std::size_t kCellBytes = 2;
  struct Cell {
    std::uint32_t write = 0, adds = 0, reads = 0;  // adds and reads: sets, since the write
  };
  struct Array {
    std::string name;
    const std::byte* begin;
    std::size_t bytes;
    bool writable;
    std::vector<std::uint8_t> written;  // for each cell
    std::vector<Cell> cells;            // empty until somebody uses it in a launch
  };
  const Array& find(const void* pointer, std::size_t bytes, const char* verb, Location at) const;
  [[noreturn]] void refuse_unwritten(const Array& array, std::size_t cell, Location at) const;
  void check_after_write(const Array& array, const Cell& cell, const GlobalAccess& access,
                         const VectorClock& clock) const;
  void check_after(const Array& array, std::uint32_t set, const GlobalAccess& access,
                   const VectorClock& clock) const;

  std::vector<Array> arrays_;
  AccessSets<GlobalAccess> log_;
};

}  // namespace tk::interpreter
