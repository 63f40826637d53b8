// What the handlers of Hedgehog attention share: the sizes of a call, checks, its tensor maps.
#pragma once

#include "ffi/ffi_util.h"
#include "ffi/hedgehog_attention_kernels.h"
#include "ffi/linear_attention_problem.h"

namespace tk::ffi {

struct HedgehogSizes {
  runtime::DataType dtype;
  std::int64_t batch, seqlen, num_heads, num_kv_heads, key_dim, value_dim;

  std::int64_t chunks() const { return ceil_div(seqlen, hedgehog_attention::kChunk); }
  std::int64_t padded() const { return chunks() * hedgehog_attention::kChunk; }
  std::int64_t padded_values() const { return hedgehog_attention::tile_dim(value_dim); }
  bool empty() const { return batch == 0; }
  bool documents = false;  // are packed
  std::int64_t most_tiles() const { return hedgehog_attention::most_tiles(seqlen); }
  // Chunks, or tiles at most, of kChunk tokens each.
  std::int64_t places() const { return documents ? most_tiles() : chunks(); }
  HedgehogKernel kernel(HedgehogKernel::Kind kind) const {
    return {kind, dtype, hedgehog_attention::tile_dim(key_dim), padded_values(), documents};
  }
};

// k [B, T, K, D] and v [B, T, K, V], and how many heads queries have. Nothing but the batch may be
// empty.
Result<HedgehogSizes> read_hedgehog_sizes(const AnyBuffer& k, const AnyBuffer& v,
                                          std::int64_t num_heads);

// How documents are packed, all of size 0 where they are not: which tiles there are, as
// hedgehog_attention::Documents has them.
struct DocumentBuffers {
  AnyBuffer tiles, counts, windows;
  // Also for a batch that is empty.
  bool given() const { return tiles.dimensions().size() > 1; }
};
Status check_documents(const DocumentBuffers& b, const HedgehogSizes& s);
hedgehog_attention::Documents kernel_documents(const DocumentBuffers& b, const HedgehogSizes& s,
                                               std::int64_t shares, std::int64_t shares_of_segment);
// An array [B, T, heads, dim].
hedgehog_attention::TokenRows token_rows(const AnyBuffer& buffer);

// int32 [B], or of size 0 where all tokens are there.
Status check_first(const AnyBuffer& first, const HedgehogSizes& s);
inline const int* optional_ints(const AnyBuffer& buffer) {
  return is_given(buffer) ? static_cast<const int*>(buffer.untyped_data()) : nullptr;
}
Status check_segments(std::int64_t chunks_of_segment, const HedgehogSizes& s);
// As many shares as segments may be made of.
Status check_shares(std::int64_t shares, const HedgehogSizes& s);

// A map over [B, T, heads, D], boxes of 64 tokens; over maps [heads, D, kMap], a head to a box; and
// over the states of chunks, [B, K, chunks, padded values, kFeatures].
Status encode_tokens(TensorMap* map, const AnyBuffer& buffer, const HedgehogSizes& s);
Status encode_head_maps(TensorMap* map, const AnyBuffer& buffer, const HedgehogSizes& s);
Status encode_chunk_states(TensorMap* map, const AnyBuffer& buffer, const HedgehogSizes& s);

template <typename Params>
void set_sizes(Params* params, const HedgehogSizes& s) {
  params->seqlen = static_cast<int>(s.seqlen);
  params->num_kv_heads = static_cast<int>(s.num_kv_heads);
  params->value_dim = static_cast<int>(s.value_dim);
  params->chunks = static_cast<int>(s.chunks());
}

// The kernels of both files of handlers, by what they are.
Status load_hedgehog(const Device& device, const HedgehogKernel& kernel);
Result<const runtime::Kernel*> find_hedgehog(const Device& device, const HedgehogKernel& kernel);

}  // namespace tk::ffi
