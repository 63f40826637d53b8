// The custom call "example_softmax": bf16[rows, 128] -> bf16[rows, 128].
#pragma once

#include <cstdint>
#include <string>

#include "tk/kernel_params.h"
#include "xla/ffi/api/ffi.h"

namespace example {

namespace ffi = xla::ffi;

using Matrix = ffi::Buffer<ffi::BF16, 2>;

constexpr int kThreads = 128;
constexpr int kRowsOfBlock = 64;
constexpr int kColumns = 128;

struct Call {
  tk::KernelParams params = {};
  std::int64_t blocks = 0;
};

// What the kernel is given, or why it cannot be.
inline ffi::ErrorOr<Call> make_call(const Matrix& x, ffi::Result<Matrix>& y) {
  const auto shape = x.dimensions();
  if (shape[1] != kColumns || shape != y->dimensions()) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument,
                                      "example_softmax: x has " + std::to_string(shape[1]) +
                                          " columns; expected 128, and y the same shape"));
  }
  Call call;
  call.blocks = (shape[0] + kRowsOfBlock - 1) / kRowsOfBlock;
  call.params.buffers[0] = {x.untyped_data(), {shape[0], kColumns, 1, 1, 1}, 2};
  call.params.buffers[1] = {y->untyped_data(), {shape[0], kColumns, 1, 1, 1}, 2};
  return call;
}

extern XLA_FFI_Handler* const kCpu;            // runs the kernel in the interpreter
extern XLA_FFI_Handler* const kGpuInitialize;  // compiles and loads it
extern XLA_FFI_Handler* const kGpuExecute;     // launches it

// Compiles the kernel for sm_90a, which needs no GPU; returns the cubin's size or throws.
std::size_t compile_for_gpu();

}  // namespace example
