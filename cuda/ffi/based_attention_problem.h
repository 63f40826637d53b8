// What the handlers of Based attention share: the sizes of a call, checks, its tensor maps.
#pragma once

#include "ffi/based_attention_kernels.h"
#include "ffi/linear_attention_problem.h"

namespace tk::ffi {

// As linear attention's, of which K is one of the dims that there are features of.
Result<LinearAttentionSizes> read_based_attention_sizes(const char* keys_name,
                                                        const AnyBuffer& keys,
                                                        const char* values_name,
                                                        const AnyBuffer& values);

// Columns of states.
inline std::int64_t state_columns_of(const LinearAttentionSizes& s) {
  return based_attention::state_columns(static_cast<int>(s.key_dim));
}
// [B, H, chunks, V, F] in the dtype of another.
Status check_chunk_states(const char* name, const AnyBuffer& buffer, const AnyBuffer& other,
                          const LinearAttentionSizes& s);
Status check_counts(const AnyBuffer& counts, const LinearAttentionSizes& s);

// A map over q or k, [B, T, G, d]: dimensions (d, T, G, B), boxes of 64 tokens.
Status encode_keys(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s);
// A map over the states of chunks: dimensions (F, V, all others), of which a slice that is not
// whole takes no more memory than it has.
Status encode_chunk_states(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s);

// What makes phi(scale q) . phi(k) the Taylor series.
ProductFactors query_factors(float scale);
// Whether products with it and with its square are exact.
bool is_power_of_two(float x);

template <typename Params>
void set_based_sizes(Params* params, const LinearAttentionSizes& s, const AnyBuffer& counts) {
  params->counts = optional_floats(counts);
  params->seqlen = static_cast<int>(s.seqlen);
  params->num_heads = static_cast<int>(s.num_heads);
  params->num_groups = static_cast<int>(s.num_groups);
  params->value_dim = static_cast<int>(s.value_dim);
  params->chunks = static_cast<int>(s.chunks());
}

// A kernel that walks through a sequence.
struct BasedWalkCall {
  LinearAttentionSizes sizes;
  BasedAttentionKernel kernel;
  std::int64_t segments;
};
// What segments start from; all may be missing.
struct BasedStartBuffers {
  AnyBuffer from, added, since;
};
// [B, H, slices, pieces, segments - 1, 64, columns of a piece], or missing.
Status check_added(const char* name, const AnyBuffer& buffer, const LinearAttentionSizes& s,
                   std::int64_t segments);
// Checks what all walks have.
Result<BasedWalkCall> read_based_walk(const LinearAttentionSizes& s,
                                      BasedAttentionKernel::Name name, const AnyBuffer& counts,
                                      std::int64_t chunks_of_segment, const BasedConfig& config,
                                      const BasedStartBuffers& start, const AnyBuffer& to);

template <typename Params>
void set_based_walk(Params* params, const BasedWalkCall& call, const AnyBuffer& counts,
                    const BasedStartBuffers& start, const AnyBuffer& to,
                    std::int64_t chunks_of_segment) {
  set_based_sizes(params, call.sizes, counts);
  params->from = optional_floats(start.from);
  params->added = optional_floats(start.added);
  params->since =
      is_given(start.since) ? static_cast<const int*>(start.since.untyped_data()) : nullptr;
  params->to = optional_floats(to);
  params->chunks_of_segment = static_cast<int>(chunks_of_segment);
}

// Compiles or finds the kernel, in the initialize stage.
Status load_based_kernel(const Device& device, const BasedAttentionKernel& kernel);
// The kernel that was loaded, in the execute stage.
Result<const runtime::Kernel*> find_based_kernel(const Device& device,
                                                 const BasedAttentionKernel& kernel);

}  // namespace tk::ffi
