// The arrays of an attention call beside q, k and v, as the handlers' last arguments.
#pragma once

#include <cstdint>
#include <optional>

#include "ffi/ffi_util.h"
#include "kernels/attention/attention.h"

namespace tk::ffi {

// Sizes that the arrays are checked against.
struct AttentionSizes {
  runtime::DataType dtype;
  std::int64_t batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, head_dim_v;
};

// Either none of the arguments are there, or all: those that a call does not have are of size 0.
struct ExtraBuffers {
  std::optional<AnyBuffer> query_lengths, kv_lengths;  // int32 [B]
  std::optional<AnyBuffer> q_segments, kv_segments;    // int32 [B, T], [B, S]
  std::optional<AnyBuffer> mask;                       // bool [B or 1, H or 1, T or 1, S or 1]
  std::optional<AnyBuffer> bias;                       // of q's dtype, the same
  std::optional<AnyBuffer> sinks;                      // float32 [B or 1, H]
};

Result<ExtraBuffers> read_extras(const xffi::RemainingArgs& args);
Status check_extras(const ExtraBuffers& extras, const AttentionSizes& sizes);

// What a call's kernels may touch: its other arrays, and these.
void declare_arrays(std::initializer_list<CallArray> arrays, const ExtraBuffers& extras);

// Bits of attention::Feature.
unsigned features_of(const ExtraBuffers& extras, const attention::Options& options);
attention::Extras kernel_extras(const ExtraBuffers& extras, const attention::Options& options);

}  // namespace tk::ffi
