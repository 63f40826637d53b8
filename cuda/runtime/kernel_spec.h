// One specialisation of a kernel: all that identifies it, and the source text that it becomes.
#pragma once

#include <string>
#include <vector>

#include "runtime/settings.h"
#include "runtime/status.h"

namespace tk::runtime {

struct KernelSpec {
  std::string symbol;       // what profilers show: "tk_attention_fwd_d128_causal_bf16"
  std::string header;       // relative to the source root: "kernels/attention/forward.cuh"
  std::string source;       // device code placed after the header, for kernels without a file
  std::string function;     // device function: "tk::attention::forward<...>"
  std::string params_type;  // "tk::attention::ForwardParams"
  int threads = 0;
  int shared_bytes = 0;  // dynamic shared memory
  int cluster_size = 1;  // blocks of a cluster, along x
  int min_blocks = 1;    // blocks that must fit on one multiprocessor

  bool operator==(const KernelSpec&) const = default;
};

std::size_t hash_value(const KernelSpec& spec);

// Shared memory that one block may have on sm_90.
constexpr int kMaxSharedBytes = 227 * 1024;

// Refuses a spec that no launch could use, or whose names are not names.
Status check_spec(const KernelSpec& spec);

// The translation unit: one __global__ function named `symbol` that calls `function`.
std::string translation_unit(const KernelSpec& spec);

// The compiler's options, apart from include folders.
std::vector<std::string> compile_options();

// A digest of every header below <source_root>/include and <source_root>/kernels. An error where
// one of the host's headers is not as it was: kernels would read their parameters at other places
// than handlers write them to.
Result<std::string> source_digest(const Settings& settings);

}  // namespace tk::runtime
