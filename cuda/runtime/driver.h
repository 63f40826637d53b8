// The CUDA driver, opened at run time: the few functions that launching a kernel takes.
//
// Declared here instead of in <cuda.h>, so that building the extension needs no CUDA at all. Names
// and values are those of the driver's binary interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/status.h"

namespace tk::runtime {

namespace cuda {

using Device = int;
using Context = struct CUctx_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using Stream = struct CUstream_st*;

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  union {
    unsigned cluster[3];
    alignas(8) char bytes[64];
  };
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56);

constexpr int kLaunchClusterDimension = 4;
constexpr int kDeviceMultiprocessorCount = 16;
constexpr int kDeviceCapabilityMajor = 75;
constexpr int kDeviceCapabilityMinor = 76;
constexpr int kFunctionMaxDynamicSharedBytes = 8;
constexpr int kJitErrorLogBuffer = 5;
constexpr int kJitErrorLogBufferSize = 6;

}  // namespace cuda

// Every function returns 0 on success.
struct Driver {
  int (*init)(unsigned);
  int (*error_name)(int, const char**);
  int (*error_string)(int, const char**);
  int (*driver_version)(int*);
  int (*device_count)(int*);
  int (*device_get)(cuda::Device*, int);
  int (*device_name)(char*, int, cuda::Device);
  int (*device_attribute)(int*, int, cuda::Device);
  int (*primary_context_retain)(cuda::Context*, cuda::Device);
  int (*context_current)(cuda::Context*);
  int (*context_push)(cuda::Context);
  int (*context_pop)(cuda::Context*);
  int (*module_load)(cuda::Module*, const void*, unsigned, int*, void**);
  int (*module_function)(cuda::Function*, cuda::Module, const char*);
  int (*function_set_attribute)(cuda::Function, int, int);
  int (*function_load)(cuda::Function);  // null before CUDA 12.4
  int (*launch)(const cuda::LaunchConfig*, cuda::Function, void**, void**);
  int (*tensor_map_encode)(void*, int, std::uint32_t, void*, const std::uint64_t*,
                           const std::uint64_t*, const std::uint32_t*, const std::uint32_t*, int,
                           int, int, int);
};

// Opens libcuda.so.1 (or what TK_JAX_LIBCUDA names) on the first call.
Result<const Driver*> driver();

// "cuLaunchKernelEx failed: invalid argument (CUDA_ERROR_INVALID_VALUE)".
std::string driver_error(const Driver& driver, const char* function, int code);

struct Device {
  int ordinal = 0;
  std::string name;
  int capability_major = 0;
  int capability_minor = 0;
  int multiprocessors = 0;
  cuda::Context primary_context = nullptr;  // XLA's context too
};

// Of any GPU, without creating a context on it.
Result<std::vector<Device>> list_devices();

// Why our kernels cannot run on `device`, or success.
Status check_supported(const Device& device);

// A supported device with its primary context retained; lock-free after the first call.
Result<const Device*> open_device(int ordinal);

// Makes a device's primary context current while it lives, where it is not already.
class ScopedContext {
 public:
  explicit ScopedContext(const Device& device);
  ~ScopedContext();
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;

 private:
  bool pushed_ = false;
};

// "12.8", from the driver's version number, or an error.
Result<std::string> driver_version();

}  // namespace tk::runtime
