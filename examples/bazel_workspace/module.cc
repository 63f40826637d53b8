// The Python module _softmax.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "handlers.h"
#include "runtime/nvrtc.h"
#include "runtime/settings.h"

namespace py = pybind11;

namespace example {

PYBIND11_MODULE(_softmax, module) {
  const auto capsule = [](XLA_FFI_Handler* handler) {
    return py::capsule(reinterpret_cast<void*>(handler));
  };
  module.def("cpu_handler", [=] { return capsule(kCpu); });
  module.def("gpu_handlers", [=] {
    py::dict stages;
    stages["initialize"] = capsule(kGpuInitialize);
    stages["execute"] = capsule(kGpuExecute);
    return stages;
  });
  module.def("compile_for_gpu", &compile_for_gpu);
  module.def("has_nvrtc", [] { return tk::runtime::nvrtc_version().ok(); });
  module.def("set_source_root", &tk::runtime::set_source_root);
  module.def("set_nvrtc_paths", &tk::runtime::set_nvrtc_paths);
}

}  // namespace example
