#include "runtime/launch.h"

#include <string>

namespace tk::runtime {
namespace {

constexpr std::int64_t kMaxGridX = 2147483647;
constexpr std::int64_t kMaxGridYZ = 65535;

std::string text(const Grid& grid) {
  return "(" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
         std::to_string(grid.z) + ")";
}

}  // namespace

Status launch(const Kernel& kernel, cuda::Stream stream, const Grid& grid, const void* params) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ || grid.x % kernel.cluster_size != 0) {
    return Error{ErrorKind::kUnsupported, "a grid of " + text(grid) + " blocks in clusters of " +
                                              std::to_string(kernel.cluster_size) +
                                              " cannot be launched"};
  }
  const auto opened = driver();
  if (!opened.ok()) return opened.error();
  cuda::LaunchAttribute cluster = {};
  cluster.id = cuda::kLaunchClusterDimension;
  cluster.cluster[0] = static_cast<unsigned>(kernel.cluster_size);
  cluster.cluster[1] = 1;
  cluster.cluster[2] = 1;
  cuda::LaunchConfig config = {};
  config.grid[0] = static_cast<unsigned>(grid.x);
  config.grid[1] = static_cast<unsigned>(grid.y);
  config.grid[2] = static_cast<unsigned>(grid.z);
  config.block[0] = static_cast<unsigned>(kernel.threads);
  config.block[1] = 1;
  config.block[2] = 1;
  config.shared_bytes = static_cast<unsigned>(kernel.shared_bytes);
  config.stream = stream;
  config.attributes = &cluster;
  config.num_attributes = kernel.cluster_size > 1 ? 1 : 0;
  void* arguments[] = {const_cast<void*>(params)};
  if (const int code = (*opened)->launch(&config, kernel.function, arguments, nullptr)) {
    return Error{ErrorKind::kInternal,
                 driver_error(**opened, "cuLaunchKernelEx", code) + " for a grid of " + text(grid) +
                     " blocks of " + std::to_string(kernel.threads) + " threads with " +
                     std::to_string(kernel.shared_bytes) + " bytes of shared memory"};
  }
  return {};
}

}  // namespace tk::runtime
