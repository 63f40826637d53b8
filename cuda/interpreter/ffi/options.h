// Which schedules a call explores, and on what; or who runs kernels instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/kernel_spec.h"
#include "runtime/launch.h"

namespace tk::interpreter {

struct ScheduleOptions {
  std::uint64_t seed = 0;  // of the first
  std::int64_t count = 1;
  int threads = 0;          // that run blocks; 0: as many as there are processors
  int multiprocessors = 4;  // of the GPU: blocks that run at once
};

void set_schedule_options(const ScheduleOptions& value);
ScheduleOptions schedule_options();

// A launch as a stand-in for the interpreter sees it.
struct StandInLaunch {
  const runtime::KernelSpec& spec;
  const runtime::Grid& grid;
  const void* params;
  struct Array {
    const void* data;
    std::size_t bytes;
  };
  std::vector<Array> arrays;  // all that the kernel may touch
  int multiprocessors;
};
// Runs the launch; returns what went wrong, or nothing.
using StandIn = std::function<std::string(const StandInLaunch&)>;

// From now on `stand_in` runs kernels: for tests, which have an emulator of the GPU's own code.
// Kernels are not compiled for the interpreter then. Null: the interpreter again.
void set_stand_in(std::shared_ptr<const StandIn> stand_in);

}  // namespace tk::interpreter
