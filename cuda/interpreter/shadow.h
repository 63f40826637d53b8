// Who last wrote each chunk of a block's shared memory, and who has read it since.
//
// An access is refused unless what it depends on is known, by the clock of whoever makes it, to
// have happened: so a missing wait is found in every schedule, not only in those where it bites.
#pragma once

#include <cstdint>
#include <vector>

#include "interpreter/access_sets.h"
#include "interpreter/clock.h"
#include "tk/interpreter/engine.h"

namespace tk::interpreter {

enum class AccessKind : std::uint8_t {
  kPlain,    // by a warp's own loads and stores
  kProduct,  // by the tensor cores
  kCopy,     // by the copy engine
};

struct Access {
  AccessKind kind;
  std::uint32_t who, count;  // done for everyone whose clock says so
  std::uint32_t published;   // of plain writes: whose count says that the async proxy sees them
  const char* what;          // "stores a tile to shared memory"
  Location at;
  int block, warp;

  bool same_agent(const Access& other) const { return who == other.who; }
};

// The accesses of a cluster.
using AccessLog = AccessSets<Access>;

class Shadow {
 public:
  explicit Shadow(std::size_t bytes) : cells_((bytes + kChunkBytes - 1) / kChunkBytes) {}

  // `clock` is what the agent of the access knows when it begins.
  void read(AccessLog& log, const VectorClock& clock, const Chunks& chunks, const Access& access);
  void write(AccessLog& log, const VectorClock& clock, const Chunks& chunks, const Access& access);

 private:
  struct Cell {
    std::uint32_t write = 0, reads = 0;
  };
  Cell& cell(std::uint32_t chunk, const Access& access);
  void check_after_write(const AccessLog& log, const VectorClock& clock, std::uint32_t write,
                         std::uint32_t chunk, const Access& access, bool writes) const;
  void check_after_reads(const AccessLog& log, const VectorClock& clock, std::uint32_t reads,
                         std::uint32_t chunk, const Access& access) const;

  std::vector<Cell> cells_;
};

}  // namespace tk::interpreter
