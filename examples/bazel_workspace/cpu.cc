// The custom call on the CPU: the kernel's own source, run and checked by the interpreter.
#include "handlers.h"
#include "interpreter/launch.h"
#include "interpreter/registry.h"
#include "softmax.cuh"

namespace example {
namespace {

namespace interpreter = tk::interpreter;

ffi::Error execute(Matrix x, ffi::Result<Matrix> y) {
  const auto call = make_call(x, y);
  if (!call.has_value()) return call.error();
  interpreter::Memory memory;
  memory.add("x", x.untyped_data(), x.size_bytes(), true);
  memory.add("y", y->untyped_data(), y->size_bytes(), false);
  interpreter::Launch launch;
  launch.kernel = "example_softmax";
  launch.entry = interpreter::run_kernel<softmax, tk::KernelParams>;
  launch.params = &call->params;
  launch.grid[0] = call->blocks;
  launch.threads = kThreads;
  const auto report = interpreter::run(launch, memory);
  return report ? ffi::Error(ffi::ErrorCode::kInternal, report->text()) : ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kExecute, execute, ffi::Ffi::Bind().Arg<Matrix>().Ret<Matrix>());

}  // namespace

XLA_FFI_Handler* const kCpu = kExecute;

}  // namespace example
