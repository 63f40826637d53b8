// What the handlers of kernels of gates share: sizes and grids.
#pragma once

#include "ffi/linear_attention_kernels.h"
#include "ffi/linear_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {

struct GateSizes {
  std::int64_t batch, seqlen, num_heads;

  std::int64_t chunks() const { return ceil_div(seqlen, linear_attention::kChunk); }
  std::int64_t padded() const { return chunks() * linear_attention::kChunk; }
};

inline Status check_gate_sizes(const GateSizes& s) {
  if (s.seqlen < 1 || s.num_heads < 1) {
    return invalid(std::to_string(s.seqlen) + " tokens of " + std::to_string(s.num_heads) +
                   " heads; expected at least one of both");
  }
  if (s.seqlen > kMaxInt - linear_attention::kChunk ||
      int_product({s.batch, s.num_heads, s.padded()}) < 0) {
    return unsupported("more than 2^31 - 1 gates: " + std::to_string(s.batch) + " x " +
                       std::to_string(s.num_heads) + " x " + std::to_string(s.padded()));
  }
  return first_error(
      {check_grid("times 16 heads", ceil_div(s.num_heads, linear_attention::kHeadsOfBlock)),
       check_grid("batch elements", s.batch)});
}

// Blocks of a chunk of sixteen heads.
template <typename Params>
Status launch_gates(runtime::KernelTable<KernelKey>& kernels,
                    const LinearAttentionGateKernel& kernel, const Execution& on,
                    const GateSizes& s, Params* params) {
  const auto loaded = find_loaded(kernels, kernel, on.device);
  if (!loaded.ok()) return loaded.error();
  params->batch = static_cast<int>(s.batch);
  params->seqlen = static_cast<int>(s.seqlen);
  params->num_heads = static_cast<int>(s.num_heads);
  return runtime::launch(
      **loaded, on.stream,
      {s.chunks(), ceil_div(s.num_heads, linear_attention::kHeadsOfBlock), s.batch}, params);
}

// The parts that gradients of gates are made of.
struct GatePartBuffers {
  AnyBuffer as_query, as_key, to_state, through;
};

inline Status check_gate_parts(const GatePartBuffers& b, const GateSizes& s) {
  return first_error({check_floats("as_query", b.as_query, {s.batch, s.num_heads, s.padded()}),
                      check_floats("as_key", b.as_key, {s.batch, s.num_heads, s.padded()}),
                      check_floats("to_state", b.to_state, {s.batch, s.num_heads, s.padded()}),
                      check_floats("through", b.through, {s.batch, s.num_heads, s.padded()})});
}

inline linear_attention::GateParts kernel_gate_parts(const GatePartBuffers& b) {
  return {floats(b.as_query), floats(b.as_key), floats(b.to_state), floats(b.through)};
}

}  // namespace tk::ffi
