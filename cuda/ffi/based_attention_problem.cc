#include "ffi/based_attention_problem.h"

#include <cmath>
#include <cstdlib>

namespace tk::ffi {
namespace {

runtime::KernelTable<KernelKey> kernels;

}  // namespace

Result<LinearAttentionSizes> read_based_attention_sizes(const char* keys_name,
                                                        const AnyBuffer& keys,
                                                        const char* values_name,
                                                        const AnyBuffer& values) {
  const auto sizes = read_linear_attention_sizes(keys_name, keys, values_name, values);
  if (sizes.ok() && !based_attention::is_feature_dim(sizes->key_dim)) {
    return unsupported(std::string(keys_name) + " has shape " + shape_text(keys) +
                       "; the kernels take features of 8, 16, 24 and 32 values");
  }
  return sizes;
}

Status check_chunk_states(const char* name, const AnyBuffer& buffer, const AnyBuffer& other,
                          const LinearAttentionSizes& s) {
  return check_like(name, buffer, other,
                    {s.batch, s.num_heads, s.chunks(), s.value_dim, state_columns_of(s)});
}

Status check_counts(const AnyBuffer& counts, const LinearAttentionSizes& s) {
  return check_optional_floats("counts", counts, {s.batch, s.padded()});
}

Status encode_keys(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s) {
  const int columns = based_attention::tile_columns(static_cast<int>(s.key_dim));
  const std::int64_t row_bytes = s.key_dim * runtime::element_bytes(s.dtype);
  const std::int64_t dims[] = {s.key_dim, s.seqlen, s.num_groups, s.batch};
  const std::int64_t strides[] = {s.num_groups * row_bytes, row_bytes,
                                  s.seqlen * s.num_groups * row_bytes};
  const std::int64_t box[] = {columns, based_attention::kChunk, 1, 1};
  return runtime::encode_tensor_map(map, buffer.untyped_data(),
                                    {s.dtype, dims, strides, box, swizzle_bytes(columns, 2)});
}

Status encode_chunk_states(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s) {
  const int columns = based_attention::piece_columns(static_cast<int>(s.key_dim));
  const std::int64_t row_bytes = state_columns_of(s) * runtime::element_bytes(s.dtype);
  const std::int64_t dims[] = {state_columns_of(s), s.value_dim,
                               s.batch * s.num_heads * s.chunks()};
  const std::int64_t strides[] = {row_bytes, s.value_dim * row_bytes};
  const std::int64_t box[] = {panel_columns(columns, 2), based_attention::kSlice, 1};
  return runtime::encode_tensor_map(map, buffer.untyped_data(),
                                    {s.dtype, dims, strides, box, swizzle_bytes(columns, 2)});
}

Status check_added(const char* name, const AnyBuffer& buffer, const LinearAttentionSizes& s,
                   std::int64_t segments) {
  const int key_dim = static_cast<int>(s.key_dim);
  return check_optional_floats(
      name, buffer,
      {s.batch, s.num_heads, s.slices(), based_attention::state_pieces(key_dim), segments - 1,
       based_attention::kSlice, based_attention::piece_columns(key_dim)});
}

Result<BasedWalkCall> read_based_walk(const LinearAttentionSizes& s,
                                      BasedAttentionKernel::Name name, const AnyBuffer& counts,
                                      std::int64_t chunks_of_segment, const BasedConfig& config,
                                      const BasedStartBuffers& start, const AnyBuffer& to) {
  if (chunks_of_segment < 1 || chunks_of_segment > s.chunks()) {
    return invalid("chunks_of_segment is " + std::to_string(chunks_of_segment) +
                   "; expected 1 to the " + std::to_string(s.chunks()) + " chunks there are");
  }
  const std::int64_t segments = ceil_div(s.chunks(), chunks_of_segment);
  const auto check_state = [&](const char* name, const AnyBuffer& buffer) {
    return check_optional_floats(name, buffer,
                                 {s.batch, s.num_heads, s.value_dim, state_columns_of(s)});
  };
  if (Status status = first_error(
          {check_counts(counts, s), check_state("from", start.from), check_state("to", to),
           check_added("added", start.added, s, segments), check_grid("segments", segments),
           check_dtype("since", start.since, xffi::DataType::S32),
           is_given(start.since) ? check_dims("since", start.since, {s.batch, segments})
                                 : Status()});
      !status.ok()) {
    return status.error();
  }
  return BasedWalkCall{s, {name, s.dtype, s.key_dim, is_given(counts), config}, segments};
}

// Of those whose square is out of range, nothing is exact.
bool is_power_of_two(float x) {
  int exponent;
  return std::frexp(std::fabs(x), &exponent) == 0.5f && std::abs(exponent) < 60;
}

ProductFactors query_factors(float scale) { return {scale, 0.5f * scale * scale, scale * scale}; }

Status load_based_kernel(const Device& device, const BasedAttentionKernel& kernel) {
  return load(kernels, kernel, device);
}

Result<const runtime::Kernel*> find_based_kernel(const Device& device,
                                                 const BasedAttentionKernel& kernel) {
  return find_loaded(kernels, kernel, device);
}

}  // namespace tk::ffi
