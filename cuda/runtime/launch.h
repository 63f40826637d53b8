// Launching a loaded kernel.
#pragma once

#include <cstdint>

#include "runtime/kernel.h"

namespace tk::runtime {

struct Grid {
  std::int64_t x = 1;
  std::int64_t y = 1;
  std::int64_t z = 1;
};

// `params` points at the kernel's one parameter; it is copied before this returns. Allocates
// nothing, waits for nothing. The device's context must be current.
Status launch(const Kernel& kernel, cuda::Stream stream, const Grid& grid, const void* params);

}  // namespace tk::runtime
