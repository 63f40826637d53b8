#include "runtime/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

#include "runtime/settings.h"

namespace tk::runtime {
namespace {

constexpr int kMaxDevices = 64;

struct Opened {
  Driver functions = {};
  std::optional<Error> error;
};

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

Opened open_driver() {
  Opened opened;
  const std::string chosen = environment("TK_JAX_LIBCUDA");
  const std::string path = chosen.empty() ? "libcuda.so.1" : chosen;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    opened.error = Error{ErrorKind::kFailedPrecondition,
                         std::string("the NVIDIA driver was not found (") + dlerror() +
                             "). Install NVIDIA's driver on the machine, or pass "
                             "implementation=\"xla\"."};
    return opened;
  }
  Driver& d = opened.functions;
  const bool complete = find(library, "cuInit", d.init) &&
                        find(library, "cuGetErrorName", d.error_name) &&
                        find(library, "cuGetErrorString", d.error_string) &&
                        find(library, "cuDriverGetVersion", d.driver_version) &&
                        find(library, "cuDeviceGetCount", d.device_count) &&
                        find(library, "cuDeviceGet", d.device_get) &&
                        find(library, "cuDeviceGetName", d.device_name) &&
                        find(library, "cuDeviceGetAttribute", d.device_attribute) &&
                        find(library, "cuDevicePrimaryCtxRetain", d.primary_context_retain) &&
                        find(library, "cuCtxGetCurrent", d.context_current) &&
                        find(library, "cuCtxPushCurrent_v2", d.context_push) &&
                        find(library, "cuCtxPopCurrent_v2", d.context_pop) &&
                        find(library, "cuModuleLoadDataEx", d.module_load) &&
                        find(library, "cuModuleGetFunction", d.module_function) &&
                        find(library, "cuFuncSetAttribute", d.function_set_attribute) &&
                        find(library, "cuLaunchKernelEx", d.launch) &&
                        find(library, "cuTensorMapEncodeTiled", d.tensor_map_encode);
  if (!complete) {
    opened.error = Error{ErrorKind::kFailedPrecondition,
                         "the NVIDIA driver (" + path +
                             ") is older than CUDA 12.0. Update it to 525 or newer; kernels "
                             "compiled by NVRTC 13 need 580. Or pass implementation=\"xla\"."};
    return opened;
  }
  find(library, "cuFuncLoad", d.function_load);
  if (const int code = d.init(0)) {
    opened.error = Error{ErrorKind::kFailedPrecondition,
                         driver_error(d, "cuInit", code) +
                             ". Check the GPU with nvidia-smi, or pass implementation=\"xla\"."};
  }
  return opened;
}

Result<Device> describe(const Driver& d, int ordinal) {
  Device device;
  device.ordinal = ordinal;
  cuda::Device handle = 0;
  char name[256] = {};
  if (const int code = d.device_get(&handle, ordinal)) {
    return Error{ErrorKind::kInternal, driver_error(d, "cuDeviceGet", code)};
  }
  if (const int code = d.device_name(name, sizeof(name), handle)) {
    return Error{ErrorKind::kInternal, driver_error(d, "cuDeviceGetName", code)};
  }
  device.name = name;
  const std::pair<int, int*> attributes[] = {
      {cuda::kDeviceCapabilityMajor, &device.capability_major},
      {cuda::kDeviceCapabilityMinor, &device.capability_minor},
      {cuda::kDeviceMultiprocessorCount, &device.multiprocessors}};
  for (const auto& [attribute, value] : attributes) {
    if (const int code = d.device_attribute(value, attribute, handle)) {
      return Error{ErrorKind::kInternal, driver_error(d, "cuDeviceGetAttribute", code)};
    }
  }
  return device;
}

}  // namespace

Result<const Driver*> driver() {
  static const Opened* opened = new Opened(open_driver());
  if (opened->error) return *opened->error;
  return &opened->functions;
}

std::string driver_error(const Driver& driver, const char* function, int code) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.error_name(code, &name);
  driver.error_string(code, &text);
  return std::string(function) + " failed: " + (text != nullptr ? text : "unknown error") + " (" +
         (name != nullptr ? name : std::to_string(code).c_str()) + ")";
}

Result<std::string> driver_version() {
  const auto opened = driver();
  if (!opened.ok()) return opened.error();
  int version = 0;
  if (const int code = (*opened)->driver_version(&version)) {
    return Error{ErrorKind::kInternal, driver_error(**opened, "cuDriverGetVersion", code)};
  }
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Result<std::vector<Device>> list_devices() {
  const auto opened = driver();
  if (!opened.ok()) return opened.error();
  int count = 0;
  if (const int code = (*opened)->device_count(&count)) {
    return Error{ErrorKind::kInternal, driver_error(**opened, "cuDeviceGetCount", code)};
  }
  std::vector<Device> devices;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    auto device = describe(**opened, ordinal);
    if (!device.ok()) return device.error();
    devices.push_back(*device);
  }
  return devices;
}

Status check_supported(const Device& device) {
  if (device.capability_major == 9 && device.capability_minor == 0) return {};
  return Error{ErrorKind::kUnsupported,
               "GPU " + std::to_string(device.ordinal) + " is a " + device.name +
                   " (compute capability " + std::to_string(device.capability_major) + "." +
                   std::to_string(device.capability_minor) +
                   "); tk_jax's kernels need a Hopper GPU (9.0). Pass implementation=\"xla\"."};
}

Result<const Device*> open_device(int ordinal) {
  static std::atomic<const Device*> devices[kMaxDevices];
  static std::mutex mutex;
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return Error{ErrorKind::kInternal, "device ordinal " + std::to_string(ordinal)};
  }
  if (const Device* device = devices[ordinal].load(std::memory_order_acquire)) return device;

  std::lock_guard lock(mutex);
  if (const Device* device = devices[ordinal].load(std::memory_order_acquire)) return device;
  const auto opened = driver();
  if (!opened.ok()) return opened.error();
  auto device = describe(**opened, ordinal);
  if (!device.ok()) return device.error();
  if (const Status status = check_supported(*device); !status.ok()) return status.error();
  cuda::Device handle = 0;
  (*opened)->device_get(&handle, ordinal);
  if (const int code = (*opened)->primary_context_retain(&device->primary_context, handle)) {
    return Error{ErrorKind::kInternal, driver_error(**opened, "cuDevicePrimaryCtxRetain", code)};
  }
  const Device* kept = new Device(*device);  // devices live as long as the process
  devices[ordinal].store(kept, std::memory_order_release);
  return kept;
}

ScopedContext::ScopedContext(const Device& device) {
  const Driver& d = **driver();  // a Device exists only where the driver is open
  cuda::Context current = nullptr;
  d.context_current(&current);
  pushed_ = current != device.primary_context && d.context_push(device.primary_context) == 0;
}

ScopedContext::~ScopedContext() {
  if (!pushed_) return;
  cuda::Context popped = nullptr;
  (**driver()).context_pop(&popped);
}

}  // namespace tk::runtime
