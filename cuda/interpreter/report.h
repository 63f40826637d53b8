// What the interpreter found wrong with a kernel.
#pragma once

#include <cstdint>
#include <string>

#include "tk/interpreter/engine.h"

namespace tk::interpreter {

struct Report {
  FaultKind kind;
  std::string kernel;   // "tk_attention_fwd_d64_causal_bf16"
  std::string where;    // "kernels/attention/forward.cuh:190"
  std::string who;      // "block (0, 0, 0) warp 5 (consumer 0)"
  std::string message;  // one sentence, and for a deadlock who waits for what
  std::uint64_t seed = 0;

  std::string text() const;
};

// "kernels/attention/forward.cuh:190": from the folder of the sources on.
std::string text(Location at);

}  // namespace tk::interpreter
