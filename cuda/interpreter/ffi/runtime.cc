// The runtime's interface (cuda/runtime) over the interpreter: the same handlers run kernels on the
// CPU.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "ffi/ffi_util.h"
#include "interpreter/ffi/compile.h"
#include "interpreter/ffi/options.h"
#include "interpreter/launch.h"
#include "interpreter/registry.h"
#include "interpreter/tensor_map.h"
#include "runtime/launch.h"

namespace tk {
namespace {

std::mutex options_mutex;
interpreter::ScheduleOptions options;
std::shared_ptr<const interpreter::StandIn> stand_in;

std::shared_ptr<const interpreter::StandIn> current_stand_in() {
  std::lock_guard lock(options_mutex);
  return stand_in;
}

// Of the call that runs on this thread.
thread_local interpreter::Memory memory;
thread_local std::uint64_t seed = 0;
// What its results that are operands too, given away by the caller, held before its first schedule:
// the others start from there.
thread_local std::map<void*, std::vector<std::byte>> given_away;

}  // namespace

namespace interpreter {

void set_schedule_options(const ScheduleOptions& value) {
  std::lock_guard lock(options_mutex);
  options = value;
}
ScheduleOptions schedule_options() {
  std::lock_guard lock(options_mutex);
  return options;
}
void set_stand_in(std::shared_ptr<const StandIn> value) {
  std::lock_guard lock(options_mutex);
  stand_in = std::move(value);
}

}  // namespace interpreter

namespace ffi {

extern const bool kInterpreted = true;

void declare_call_arrays(std::span<const CallArray> arrays) {
  memory = {};
  for (const CallArray& array : arrays) {
    if (array.is_result) continue;
    memory.add(array.name, array.buffer.untyped_data(), array.buffer.size_bytes(), true);
  }
  for (const CallArray& array : arrays) {
    if (!array.is_result) continue;
    void* data = array.buffer.untyped_data();
    const std::size_t bytes = array.buffer.size_bytes();
    if (memory.overlaps(data, bytes)) {
      const auto* begin = static_cast<const std::byte*>(data);
      given_away.try_emplace(data, begin, begin + bytes);
    } else {
      std::memset(data, 0xff, bytes);
    }
    memory.add(array.name, data, bytes, false);
  }
}

Status explore(const std::function<Status()>& call) {
  const interpreter::ScheduleOptions schedules = interpreter::schedule_options();
  given_away.clear();
  for (std::int64_t i = 0; i < schedules.count; ++i) {
    seed = schedules.seed + i;
    for (const auto& [data, before] : given_away) std::memcpy(data, before.data(), before.size());
    if (Status status = call(); !status.ok()) return status;
  }
  return {};
}

}  // namespace ffi

namespace runtime {
namespace {

Result<interpreter::RunKernel> compiled(const KernelSpec& spec) {
  const interpreter::SpecialisationName name = {spec.header, spec.source, spec.function};
  if (interpreter::find_specialisation(name) == nullptr) {
    if (Status status = interpreter::compile_specialisations({&spec, 1}); !status.ok()) {
      return status.error();
    }
  }
  return interpreter::find_specialisation(name);
}

}  // namespace

Result<const Device*> open_device(int) {
  const int multiprocessors = interpreter::schedule_options().multiprocessors;
  static std::mutex mutex;
  static std::map<int, Device> devices;  // by their multiprocessors
  std::lock_guard lock(mutex);
  const Device device = {0, "interpreter", 9, 0, multiprocessors, nullptr};
  return &devices.emplace(multiprocessors, device).first->second;
}

ScopedContext::ScopedContext(const Device&) {}
ScopedContext::~ScopedContext() = default;

Result<Kernel> load_kernel(const KernelSpec& spec, const Device&) {
  if (!current_stand_in()) {
    if (const auto run = compiled(spec); !run.ok()) return run.error();
  }
  // Lives as long as the table of loaded kernels does: for ever.
  auto* loaded = new KernelSpec(spec);
  return Kernel{reinterpret_cast<cuda::Function>(loaded), spec.threads, spec.shared_bytes,
                spec.cluster_size};
}

Status launch(const Kernel& kernel, cuda::Stream, const Grid& grid, const void* params) {
  const auto& spec = *reinterpret_cast<const KernelSpec*>(kernel.function);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x % kernel.cluster_size != 0) {
    return Error{ErrorKind::kInvalidArgument,
                 "kernel " + spec.symbol + ": a grid of (" + std::to_string(grid.x) + ", " +
                     std::to_string(grid.y) + ", " + std::to_string(grid.z) +
                     ") blocks in clusters of " + std::to_string(kernel.cluster_size)};
  }
  const interpreter::ScheduleOptions chosen = interpreter::schedule_options();
  if (const auto run = current_stand_in()) {
    interpreter::StandInLaunch launch = {spec, grid, params, {}, chosen.multiprocessors};
    memory.for_each_array(
        [&](const void* data, std::size_t bytes) { launch.arrays.push_back({data, bytes}); });
    const std::string problem = (*run)(launch);
    if (problem.empty()) return {};
    return Error{ErrorKind::kInternal, problem};
  }
  const auto run = compiled(spec);
  if (!run.ok()) return run.error();
  interpreter::Launch launch = {};
  launch.kernel = spec.symbol;
  launch.entry = *run;
  launch.params = params;
  launch.grid[0] = grid.x;
  launch.grid[1] = grid.y;
  launch.grid[2] = grid.z;
  launch.threads = kernel.threads;
  launch.shared_bytes = kernel.shared_bytes;
  launch.cluster_size = kernel.cluster_size;
  launch.seed = seed;
  launch.resident_blocks = chosen.multiprocessors * spec.min_blocks;
  launch.threads_of_host = chosen.threads;
  const auto report = interpreter::run(launch, memory);
  if (!report) return {};
  return Error{ErrorKind::kInternal, report->text()};
}

Status encode_tensor_map(TensorMap* map, void* address, const TensorMapShape& shape) {
  static constexpr interpreter::ElementType kTypes[] = {
      interpreter::ElementType::kBFloat16, interpreter::ElementType::kFloat16,
      interpreter::ElementType::kFloat32, interpreter::ElementType::kInt32};
  const std::string problem =
      interpreter::encode(map, address, kTypes[static_cast<int>(shape.type)], shape.dims,
                          shape.strides, shape.box, shape.swizzle_bytes);
  if (problem.empty()) return {};
  return Error{ErrorKind::kInvalidArgument, "tensor map: " + problem};
}

}  // namespace runtime
}  // namespace tk
