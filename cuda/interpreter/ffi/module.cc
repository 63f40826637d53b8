// The Python module tk_jax._interpreter.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ffi/handlers.h"
#include "ffi/host_headers.h"
#include "ffi/spec_dict.h"
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

// What `run` raises is what went wrong.
std::string call_stand_in(const nb::object& run, const interpreter::StandInLaunch& launch) {
  nb::gil_scoped_acquire acquire;
  try {
    nb::list arrays;
    for (const auto& array : launch.arrays) {
      arrays.append(nb::make_tuple(reinterpret_cast<std::uintptr_t>(array.data), array.bytes));
    }
    run(spec_to_dict(launch.spec), nb::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z),
        reinterpret_cast<std::uintptr_t>(launch.params), arrays, launch.multiprocessors);
  } catch (const std::exception& error) {
    return "kernel " + launch.spec.symbol + ": " + error.what();
  }
  return "";
}

void set_stand_in(const nb::object& run) {
  if (run.is_none()) return interpreter::set_stand_in(nullptr);
  // Never let go: kernels may be under way when it is replaced, and without Python's lock.
  auto* kept = new nb::object(run);
  interpreter::set_stand_in(std::make_shared<const interpreter::StandIn>(
      [kept](const interpreter::StandInLaunch& launch) { return call_stand_in(*kept, launch); }));
}

}  // namespace

NB_MODULE(_interpreter, module) {
  using namespace nb::literals;
  module.doc() = "The FFI targets of tk_jax for the CPU: kernels run in the interpreter.";
  runtime::set_host_headers(kHostHeaders);
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
  module.def(
      "set_stand_in", &set_stand_in, "run"_a.none(),
      "run(spec, grid, params, arrays, multiprocessors) runs kernels from now on, for tests: "
      "params is an address, arrays are (address, bytes). None: the interpreter again.");
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
