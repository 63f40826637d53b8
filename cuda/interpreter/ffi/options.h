// Which schedules a call explores.
#pragma once

#include <cstdint>

namespace tk::interpreter {

struct ScheduleOptions {
  std::uint64_t seed = 0;  // of the first
  std::int64_t count = 1;
  int threads = 0;  // that run blocks; 0: as many as there are processors
};

void set_schedule_options(const ScheduleOptions& value);
ScheduleOptions schedule_options();

}  // namespace tk::interpreter
