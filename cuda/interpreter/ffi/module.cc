// The Python module tk_jax._interpreter.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ffi/handlers.h"
#include "interpreter/ffi/compile.h"
#include "interpreter/ffi/options.h"
#include "runtime/settings.h"

namespace nb = nanobind;

namespace tk::ffi {

namespace {

runtime::KernelSpec read_spec(const nb::dict& item) {
  runtime::KernelSpec spec;
  spec.symbol = nb::cast<std::string>(item["symbol"]);
  spec.header = nb::cast<std::string>(item["header"]);
  spec.source = nb::cast<std::string>(item["source"]);
  spec.function = nb::cast<std::string>(item["function"]);
  spec.params_type = nb::cast<std::string>(item["params_type"]);
  spec.threads = nb::cast<int>(item["threads"]);
  return spec;
}

}  // namespace

NB_MODULE(_interpreter, module) {
  using namespace nb::literals;
  module.doc() = "The FFI targets of tk_jax for the CPU: kernels run in the interpreter.";
  module.def(
      "registrations",
      [] {
        nb::dict targets;
        for (const Target* target : kTargets) {
          targets[target->name] = nb::capsule(reinterpret_cast<void*>(target->execute));
        }
        return targets;
      },
      "{target: capsule}");
  module.def("ffi_api_version",
             [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  module.def(
      "set_schedules",
      [](std::uint64_t seed, std::int64_t count, int threads, int multiprocessors) {
        interpreter::set_schedule_options({seed, count, threads, multiprocessors});
      },
      "seed"_a, "count"_a, "threads"_a, "multiprocessors"_a);
  module.def("schedules", [] {
    const interpreter::ScheduleOptions options = interpreter::schedule_options();
    return nb::make_tuple(options.seed, options.count, options.threads, options.multiprocessors);
  });
  module.def("set_source_root", &runtime::set_source_root, "path"_a);
  module.def("host_compiler", &interpreter::host_compiler);
  module.def(
      "compile",
      [](const std::vector<nb::dict>& items) {
        std::vector<runtime::KernelSpec> specs;
        for (const nb::dict& item : items) specs.push_back(read_spec(item));
        runtime::Status status;
        {
          nb::gil_scoped_release release;
          status = interpreter::compile_specialisations(specs);
        }
        if (!status.ok()) throw std::runtime_error(status.error().message);
      },
      "specs"_a, "Compiles kernels of one header and source into one library, and loads it.");
}

}  // namespace tk::ffi
