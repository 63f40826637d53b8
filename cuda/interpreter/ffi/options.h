// Which schedules a call explores, and on what.
#pragma once

#include <cstdint>

namespace tk::interpreter {

struct ScheduleOptions {
  std::uint64_t seed = 0;  // of the first
  std::int64_t count = 1;
  int threads = 0;          // that run blocks; 0: as many as there are processors
  int multiprocessors = 4;  // of the GPU: blocks that run at once
};

void set_schedule_options(const ScheduleOptions& value);
ScheduleOptions schedule_options();

}  // namespace tk::interpreter
