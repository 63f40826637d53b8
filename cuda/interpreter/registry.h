// The specialisations of kernels that were compiled for the interpreter, by the name that a
// KernelSpec gives them.
#pragma once

#include <string>

namespace tk::interpreter {

struct Specialisation {
  std::string function;  // "tk::attention::forward<tk::attention::ForwardTraits<...>>"
  void (*run)(const void* params);
};

// Null where it was not compiled.
const Specialisation* find_specialisation(const std::string& function);

class Registration {
 public:
  Registration(std::string function, void (*run)(const void* params));
};

template <auto kFunction, typename Params>
void run_kernel(const void* params) {
  kFunction(*static_cast<const Params*>(params));
}

}  // namespace tk::interpreter
