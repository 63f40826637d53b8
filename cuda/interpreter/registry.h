// The specialisations of kernels that the interpreter can run: compiled with it, or later.
#pragma once

#include <string>

namespace tk::interpreter {

// As a KernelSpec names it.
struct SpecialisationName {
  std::string header, source;
  std::string function;  // "tk::attention::forward<tk::attention::ForwardTraits<...>>"

  bool operator==(const SpecialisationName&) const = default;
};
using RunKernel = void (*)(const void* params);

// Null where it was not compiled.
RunKernel find_specialisation(const SpecialisationName& name);
// The first of a name stays.
void register_specialisation(SpecialisationName name, RunKernel run);

// Registers before main: for those that are compiled with the interpreter.
class Registration {
 public:
  template <typename Spec>
  Registration(const Spec& spec, RunKernel run) {
    register_specialisation({spec.header, spec.source, spec.function}, run);
  }
};

template <auto kFunction, typename Params>
void run_kernel(const void* params) {
  kFunction(*static_cast<const Params*>(params));
}

}  // namespace tk::interpreter
