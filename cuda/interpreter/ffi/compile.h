// Kernels compiled for the interpreter where they run, by the host's C++ compiler.
#pragma once

#include <span>
#include <string>

#include "runtime/kernel_spec.h"
#include "runtime/status.h"

namespace tk::interpreter {

// The kernels become one library, kept in the kernel cache, whose functions find_specialisation
// then knows. They share the header and the source text of the first.
runtime::Status compile_specialisations(std::span<const runtime::KernelSpec> specs);

// The compiler that would be used, or an empty string: TK_JAX_CXX, CXX, or the first of c++, g++
// and clang++ that is found.
std::string host_compiler();

}  // namespace tk::interpreter
