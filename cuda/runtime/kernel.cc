#include "runtime/kernel.h"

#include <map>
#include <memory>
#include <string>

#include "runtime/compile.h"

namespace tk::runtime {
namespace {

// One compilation serves every GPU of the process, even where there is no cache folder.
Result<std::shared_ptr<const Compiled>> compile_once(const KernelSpec& spec) {
  static std::mutex mutex;
  static auto* compiled = new std::map<std::string, std::shared_ptr<const Compiled>>;
  std::lock_guard lock(mutex);
  const std::string name = translation_unit(spec);
  if (const auto found = compiled->find(name); found != compiled->end()) return found->second;
  auto result = compile(spec);
  if (!result.ok()) return result.error();
  auto shared = std::make_shared<const Compiled>(std::move(*result));
  compiled->emplace(name, shared);
  return shared;
}

}  // namespace

Result<Kernel> load_kernel(const KernelSpec& spec, const Device& device) {
  const auto opened = driver();
  if (!opened.ok()) return opened.error();
  const Driver& d = **opened;
  const auto compiled = compile_once(spec);
  if (!compiled.ok()) return compiled.error();

  const ScopedContext context(device);
  const auto failed = [&](const char* function, int code, const std::string& detail) {
    return Error{ErrorKind::kInternal, "kernel " + spec.symbol + " cannot be loaded on " +
                                           device.name + ": " + driver_error(d, function, code) +
                                           detail};
  };
  cuda::Module module = nullptr;
  char log[4096] = {};
  int options[] = {cuda::kJitErrorLogBuffer, cuda::kJitErrorLogBufferSize};
  void* values[] = {log, reinterpret_cast<void*>(sizeof(log))};
  if (const int code = d.module_load(&module, (*compiled)->cubin.data(), 2, options, values)) {
    return failed("cuModuleLoadDataEx", code,
                  std::string(log[0] != '\0' ? ": " : "") + log +
                      ". If the driver is older than the CUDA version of NVRTC (see python -m "
                      "tk_jax.doctor), update it or install an NVRTC that matches it.");
  }
  Kernel kernel{nullptr, spec.threads, spec.shared_bytes, spec.cluster_size};
  if (const int code = d.module_function(&kernel.function, module, spec.symbol.c_str())) {
    return failed("cuModuleGetFunction", code, "");
  }
  if (const int code = d.function_set_attribute(
          kernel.function, cuda::kFunctionMaxDynamicSharedBytes, spec.shared_bytes)) {
    return failed("cuFuncSetAttribute", code,
                  " for " + std::to_string(spec.shared_bytes) + " bytes of shared memory");
  }
  // Without this a lazily loading driver loads at the first launch, which may be inside a graph's
  // capture, where loading is not allowed.
  if (d.function_load != nullptr) {
    if (const int code = d.function_load(kernel.function)) return failed("cuFuncLoad", code, "");
  }
  return kernel;  // its module is never unloaded
}

}  // namespace tk::runtime
