// The arrays of an attention call beside q, k and v, as the handlers' last arguments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "ffi/ffi_util.h"
#include "kernels/attention/attention.h"

namespace tk::ffi {

// Sizes of a call, and where its diagonals are.
struct AttentionSizes {
  runtime::DataType dtype;
  std::int64_t batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim, head_dim_v;

  std::int64_t padded_q() const { return attention::padded_queries(seqlen_q); }
  // Query i sees keys from i + first_offset to i + last_offset; beyond -T and S no offset matters.
  int first_offset(const attention::Options& o) const {
    return static_cast<int>(std::clamp(diagonal(o) + window_first(o), -seqlen_q, seqlen_kv));
  }
  int last_offset(const attention::Options& o) const {
    return static_cast<int>(std::clamp(diagonal(o) + window_last(o), -seqlen_q, seqlen_kv));
  }
  // The same from the diagonal on; what nothing limits is farther away than any diagonal.
  std::int64_t window_first(const attention::Options& o) const {
    return o.window_left >= 0 ? std::max(-o.window_left, -farthest()) : -farthest();
  }
  std::int64_t window_last(const attention::Options& o) const {
    if (o.is_causal) return 0;
    return o.window_right >= 0 ? std::min(o.window_right, farthest()) : farthest();
  }

 private:
  std::int64_t farthest() const {
    return std::min<std::int64_t>(seqlen_q + seqlen_kv, 1 << 30);  // more rows fit on no GPU
  }
  std::int64_t diagonal(const attention::Options& o) const {
    return o.bottom_right ? seqlen_kv - seqlen_q : 0;
  }
};

// Either none of the arguments are there, or all: those that a call does not have are of size 0.
struct ExtraBuffers {
  std::optional<AnyBuffer> query_lengths, kv_lengths;  // int32 [B]
  std::optional<AnyBuffer> q_segments, kv_segments;    // int32 [B, T], [B, S]
  // uint32 [B or 1, H or 1, words or 1, rows or 1]: attention::MaskBits.
  std::optional<AnyBuffer> mask, transposed_mask;
  std::optional<AnyBuffer> bias;   // of q's dtype or float32 [B or 1, H or 1, T or 1, S or 1]
  std::optional<AnyBuffer> sinks;  // float32 [B or 1, H]
  // int32 [B or 1, H or 1, blocks, ceil(blocks / 32), 2], of pairs MapWord: attention::BlockMap.
  std::optional<AnyBuffer> key_map, query_map;
};

bool has_float_bias(const ExtraBuffers& extras);
// How the forward pass reads a bias, as a Feature: through the copy engine, two neighbouring keys
// at once, or 0.
unsigned bias_reading(const ExtraBuffers& extras);
Status encode_bias(TensorMap* map, const ExtraBuffers& extras, std::int64_t block_kv);

Result<ExtraBuffers> read_extras(const xffi::RemainingArgs& args);
Status check_extras(const ExtraBuffers& extras, const AttentionSizes& sizes);
// Queries and keys of a block of a map, and of a mask: those of the tiles of the kernel that reads
// it.
struct MapBlock {
  std::int64_t queries, keys;
};
// Maps are there where they are needed, and of their size. A forward pass has no query_map.
Status check_maps(const ExtraBuffers& extras, const AttentionSizes& sizes, const MapBlock& key_map,
                  const std::optional<MapBlock>& query_map);
// A mask's bits are there for the kernels that read them, given the blocks of these, as often as
// they do; of whole blocks.
Status check_masks(const ExtraBuffers& extras, const AttentionSizes& sizes,
                   const std::optional<MapBlock>& mask,
                   const std::optional<MapBlock>& transposed_mask);

// What a call's kernels may touch: its other arrays, and these.
void declare_arrays(std::initializer_list<CallArray> arrays, const ExtraBuffers& extras);

// Bits of attention::Feature.
unsigned features_of(const ExtraBuffers& extras, const attention::Options& options);
attention::Extras kernel_extras(const ExtraBuffers& extras, const AttentionSizes& sizes,
                                const attention::Options& options);

}  // namespace tk::ffi
