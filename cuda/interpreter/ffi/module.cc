// The Python module tk_jax._interpreter.
#include <nanobind/nanobind.h>

#include "ffi/handlers.h"
#include "interpreter/ffi/options.h"

namespace nb = nanobind;

namespace tk::ffi {

NB_MODULE(_interpreter, module) {
  using namespace nb::literals;
  module.doc() = "The FFI targets of tk_jax for the CPU: kernels run in the interpreter.";
  module.def(
      "registrations",
      [] {
        nb::dict targets;
        for (const Target* target :
             {&kAttentionForwardTarget, &kAttentionBackwardTarget, &kMatmulTarget}) {
          targets[target->name] = nb::capsule(reinterpret_cast<void*>(target->execute));
        }
        return targets;
      },
      "{target: capsule}");
  module.def("ffi_api_version",
             [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  module.def(
      "set_schedules",
      [](std::uint64_t seed, std::int64_t count) {
        interpreter::set_schedule_options({seed, count});
      },
      "seed"_a, "count"_a);
  module.def("schedules", [] {
    const interpreter::ScheduleOptions options = interpreter::schedule_options();
    return nb::make_tuple(options.seed, options.count);
  });
}

}  // namespace tk::ffi
