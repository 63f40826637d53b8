// The custom call on the GPU: compiled when XLA loads the program, launched on XLA's stream.
#include <stdexcept>

#include "handlers.h"
#include "runtime/compile.h"
#include "runtime/kernel.h"
#include "runtime/launch.h"
#include "softmax_text.h"

namespace example {
namespace {

namespace runtime = tk::runtime;

runtime::KernelTable<runtime::KernelSpec> kernels;

runtime::KernelSpec make_spec() {
  runtime::KernelSpec spec;
  spec.symbol = "example_softmax";
  spec.source = kSoftmaxText;
  spec.function = "example::softmax";
  spec.params_type = "tk::KernelParams";
  spec.threads = kThreads;
  return spec;
}

const runtime::KernelSpec& spec() {
  static const runtime::KernelSpec* const spec = new runtime::KernelSpec(make_spec());
  return *spec;
}

ffi::Error to_ffi(const runtime::Error& error) {
  return ffi::Error(ffi::ErrorCode::kInternal, "example_softmax: " + error.message);
}

runtime::Result<const runtime::Kernel*> load(const runtime::Device& device) {
  return kernels.load(spec(), device, [] { return runtime::Result(spec()); });
}

ffi::Error initialize(std::int32_t ordinal, Matrix, ffi::Result<Matrix>) {
  const auto device = runtime::open_device(ordinal);
  if (!device.ok()) return to_ffi(device.error());
  const auto kernel = load(**device);
  return kernel.ok() ? ffi::Error::Success() : to_ffi(kernel.error());
}

ffi::Error execute(std::int32_t ordinal, runtime::cuda::Stream stream, Matrix x,
                   ffi::Result<Matrix> y) {
  const auto call = make_call(x, y);
  if (!call.has_value()) return call.error();
  if (call->blocks == 0) return ffi::Error::Success();
  const auto device = runtime::open_device(ordinal);
  if (!device.ok()) return to_ffi(device.error());
  const auto kernel = load(**device);  // initialize has: found without a lock
  if (!kernel.ok()) return to_ffi(kernel.error());
  const runtime::ScopedContext context(**device);
  const runtime::Status status =
      runtime::launch(**kernel, stream, {call->blocks, 1, 1}, &call->params);
  return status.ok() ? ffi::Error::Success() : to_ffi(status.error());
}

XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                       ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Matrix>()
                           .Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER(kExecute, execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::PlatformStream<runtime::cuda::Stream>>()
                           .Arg<Matrix>()
                           .Ret<Matrix>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

XLA_FFI_Handler* const kGpuInitialize = kInitialize;
XLA_FFI_Handler* const kGpuExecute = kExecute;

std::size_t compile_for_gpu() {
  const auto compiled = runtime::compile(spec());
  if (!compiled.ok()) throw std::runtime_error(compiled.error().message);
  return compiled->cubin.size();
}

}  // namespace example
