// Parameters of a free-standing kernel: what the generic FFI target `tk_kernel_v1` passes.
//
// Plain C++: included by the host compiler and by the device compiler alike.
#pragma once

#include "tk/tensor_map.h"

namespace tk {

constexpr int kMaxKernelBuffers = 8;
constexpr int kMaxKernelRank = 5;

// One array argument or result of a kernel: its address, its row-major shape, and, where the caller
// asked for one, a tensor map over it whose dimensions are the array's from last to first.
struct KernelBuffer {
  void* data;
  long shape[kMaxKernelRank];  // unused trailing entries are 1
  int rank;
};

// Arguments come first, then results, in the order of the call.
struct KernelParams {
  TensorMap maps[kMaxKernelBuffers];
  KernelBuffer buffers[kMaxKernelBuffers];
  float scalars[4];
};

}  // namespace tk
