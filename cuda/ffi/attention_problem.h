// What attention's handlers share: the sizes of a call, its tensor maps, its kernels' parameters.
#pragma once

#include "ffi/attention_extras.h"
#include "ffi/ffi_util.h"
#include "kernels/attention/attention.h"

namespace tk::ffi {

// q [B, T, H, D], k [B, S, K, D] and v [B, S, K, Dv].
Result<AttentionSizes> read_sizes(const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v,
                                  const ExtraBuffers& extras, const attention::Options& options);

// True where there is nothing to compute. Some empty dimensions leave results to be written that
// no kernel writes: those are refused.
Result<bool> is_empty(const AttentionSizes& s, bool backward);

// A map over [B, length, heads, D]: dimensions (D, length, heads, B), boxes of `rows` rows.
Status encode_rows(TensorMap* map, const AnyBuffer& buffer, const AttentionSizes& s,
                   std::int64_t rows);

// The fields that the parameters of all kernels share.
template <typename Params>
void set_problem(Params* params, const AttentionSizes& s, const ExtraBuffers& extras,
                 const attention::Options& options) {
  params->batch = static_cast<int>(s.batch);
  params->seqlen_q = static_cast<int>(s.seqlen_q);
  params->seqlen_kv = static_cast<int>(s.seqlen_kv);
  params->num_heads = static_cast<int>(s.num_heads);
  params->num_kv_heads = static_cast<int>(s.num_kv_heads);
  params->first_offset = s.first_offset(options);
  params->last_offset = s.last_offset(options);
  params->scale = options.scale;
  params->extras = kernel_extras(extras, s, options);
}

}  // namespace tk::ffi
