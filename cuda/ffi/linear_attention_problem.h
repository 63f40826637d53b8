// What the handlers of linear attention share: the sizes of a call, checks, its tensor maps.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/linear_attention/linear_attention.h"

namespace tk::ffi {

struct LinearAttentionSizes {
  runtime::DataType dtype;
  std::int64_t batch, seqlen, num_groups, num_heads, key_dim, value_dim;

  std::int64_t chunks() const { return ceil_div(seqlen, linear_attention::kChunk); }
  std::int64_t padded() const { return chunks() * linear_attention::kChunk; }
  std::int64_t slices() const { return ceil_div(value_dim, linear_attention::kSlice); }
  std::int64_t padded_values() const { return slices() * linear_attention::kSlice; }
  bool empty() const { return batch == 0; }
};

// keys [B, T, G, K] and values [B, T, H, V], or others of the same shapes. Nothing but the batch
// may be empty.
Result<LinearAttentionSizes> read_linear_attention_sizes(const char* keys_name,
                                                         const AnyBuffer& keys,
                                                         const char* values_name,
                                                         const AnyBuffer& values);

// Optional arrays are there unless they are of size 0.
inline bool is_given(const AnyBuffer& buffer) { return buffer.element_count() != 0; }

// A float32 array of these dimensions; or, where it is optional, one of size 0.
Status check_floats(const char* name, const AnyBuffer& buffer,
                    std::initializer_list<std::int64_t> expected);
Status check_optional_floats(const char* name, const AnyBuffer& buffer,
                             std::initializer_list<std::int64_t> expected);
// An array of these dimensions in the dtype of another.
Status check_like(const char* name, const AnyBuffer& buffer, const AnyBuffer& other,
                  std::initializer_list<std::int64_t> expected);
// States of runs of so many chunks, [B, runs, H, slices * 64, K] in the dtype of another.
Status check_stored_states(const char* name, const AnyBuffer& buffer, const AnyBuffer& other,
                           const LinearAttentionSizes& s, std::int64_t stored_every);

inline float* floats(const AnyBuffer& buffer) { return static_cast<float*>(buffer.untyped_data()); }
inline float* optional_floats(const AnyBuffer& buffer) {
  return is_given(buffer) ? floats(buffer) : nullptr;
}

struct GateBuffers {
  AnyBuffer sums, weights, counts;
};
Status check_gates(const GateBuffers& gates, const LinearAttentionSizes& s);
unsigned features_of(const GateBuffers& gates);
linear_attention::Gates kernel_gates(const GateBuffers& gates);

// A map over [B, T, heads, D]: dimensions (D, T, heads, B), boxes of 64 tokens.
Status encode_tokens(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s);
// A map over stored states, [B, .., .., slices * 64, K]: dimensions (K, all others).
Status encode_states(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s);

// The fields that the parameters of all kernels but those of gates share.
template <typename Params>
void set_sizes(Params* params, const LinearAttentionSizes& s) {
  params->seqlen = static_cast<int>(s.seqlen);
  params->num_heads = static_cast<int>(s.num_heads);
  params->num_groups = static_cast<int>(s.num_groups);
  params->key_dim = static_cast<int>(s.key_dim);
  params->value_dim = static_cast<int>(s.value_dim);
  params->chunks = static_cast<int>(s.chunks());
}

// Grids have up to this many blocks along y and z.
constexpr std::int64_t kMaxGridYZ = 65535;
Status check_grid(const char* what, std::int64_t blocks);

}  // namespace tk::ffi
