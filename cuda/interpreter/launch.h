// Running a kernel in the interpreter.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "interpreter/memory.h"
#include "interpreter/report.h"

namespace tk::interpreter {

struct Launch {
  std::string kernel;                 // for reports
  void (*entry)(const void* params);  // what every warp runs
  const void* params;
  std::int64_t grid[3] = {1, 1, 1};
  int threads = 0;
  int shared_bytes = 0;
  int cluster_size = 1;
  int resident_blocks = 16;  // as many run at once; the next start as they end
  std::uint64_t seed = 0;    // of the order in which things happen
  int threads_of_host = 0;   // that run blocks; 0: as many as there are processors
};

// Runs to the end, or to the first thing that is wrong. What happens, and what is reported, does
// not depend on how many threads share the work.
std::optional<Report> run(const Launch& launch, Memory& memory);

}  // namespace tk::interpreter
