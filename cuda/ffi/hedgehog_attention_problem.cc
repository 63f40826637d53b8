#include "ffi/hedgehog_attention_problem.h"

namespace tk::ffi {
namespace {

runtime::KernelTable<KernelKey> kernels;

// As linear attention has them, with heads of keys for groups.
LinearAttentionSizes as_linear(const HedgehogSizes& s) {
  return {s.dtype, s.batch, s.seqlen, s.num_kv_heads, s.num_kv_heads, s.key_dim, s.value_dim};
}

}  // namespace

Result<HedgehogSizes> read_hedgehog_sizes(const AnyBuffer& k, const AnyBuffer& v,
                                          std::int64_t num_heads) {
  const auto sizes = read_linear_attention_sizes("k", k, "v", v);
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes s{sizes->dtype,      sizes->batch,   sizes->seqlen,   num_heads,
                        sizes->num_groups, sizes->key_dim, sizes->value_dim};
  if (sizes->num_heads != s.num_kv_heads) {
    return invalid("k has " + std::to_string(s.num_kv_heads) + " heads and v has " +
                   std::to_string(sizes->num_heads) + "; expected as many");
  }
  if (num_heads < 1 || num_heads % s.num_kv_heads != 0) {
    return invalid("q has " + std::to_string(num_heads) +
                   " heads, which is not a multiple of the " + std::to_string(s.num_kv_heads) +
                   " of k");
  }
  if (s.key_dim > hedgehog_attention::kMaxDim || s.value_dim > hedgehog_attention::kMaxDim) {
    return unsupported("k " + shape_text(k) + " and v " + shape_text(v) +
                       "; the kernels take up to " + std::to_string(hedgehog_attention::kMaxDim) +
                       " dimensions");
  }
  if (int_product({s.batch, num_heads, s.padded()}) < 0 ||
      int_product({s.batch, s.num_kv_heads, s.chunks(), s.padded_values()}) < 0) {
    return unsupported("more than 2^31 - 1 rows: k " + shape_text(k));
  }
  if (Status status = check_grid("heads", num_heads); !status.ok()) return status.error();
  return s;
}

Status check_first(const AnyBuffer& first, const HedgehogSizes& s) {
  if (Status status = check_dtype("first", first, xffi::DataType::S32); !status.ok()) return status;
  return is_given(first) ? check_dims("first", first, {s.batch}) : Status();
}

Status check_documents(const DocumentBuffers& b, const HedgehogSizes& s) {
  if (!b.given()) {
    return first_error({check_dtype("tiles", b.tiles, xffi::DataType::S32),
                        check_dtype("counts", b.counts, xffi::DataType::S32),
                        check_dtype("windows", b.windows, xffi::DataType::F32),
                        is_given(b.counts) || is_given(b.windows)
                            ? Status(invalid("tiles, counts and windows go together"))
                            : Status()});
  }
  if (int_product({s.batch, s.num_heads, s.most_tiles(), hedgehog_attention::kChunk}) < 0) {
    return unsupported("more than 2^31 - 1 rows of tiles");
  }
  return first_error(
      {check_dtype("tiles", b.tiles, xffi::DataType::S32),
       check_dims("tiles", b.tiles,
                  {s.batch, s.most_tiles() + 2, hedgehog_attention::kTileNumbers}),
       check_dtype("counts", b.counts, xffi::DataType::S32),
       check_dims("counts", b.counts, {s.batch}),
       check_floats("windows", b.windows, {s.batch, s.most_tiles() * hedgehog_attention::kChunk})});
}

hedgehog_attention::Documents kernel_documents(const DocumentBuffers& b, const HedgehogSizes& s,
                                               std::int64_t shares,
                                               std::int64_t shares_of_segment) {
  if (!b.given()) return {};
  return {static_cast<const int*>(b.tiles.untyped_data()),
          static_cast<const int*>(b.counts.untyped_data()),
          floats(b.windows),
          static_cast<int>(s.most_tiles()),
          static_cast<int>(shares),
          static_cast<int>(shares_of_segment)};
}

hedgehog_attention::TokenRows token_rows(const AnyBuffer& buffer) {
  return {buffer.untyped_data(), static_cast<int>(dim(buffer, 2)),
          static_cast<int>(dim(buffer, 3))};
}

Status check_shares(std::int64_t shares, const HedgehogSizes& s) {
  if (shares < 1 || shares > s.most_tiles()) {
    return invalid("shares is " + std::to_string(shares) + "; expected 1 to the " +
                   std::to_string(s.most_tiles()) + " tiles there may be");
  }
  return check_grid("shares", shares);
}

Status check_segments(std::int64_t chunks_of_segment, const HedgehogSizes& s) {
  if (chunks_of_segment < 1 || chunks_of_segment > s.chunks()) {
    return invalid("chunks_of_segment is " + std::to_string(chunks_of_segment) +
                   "; expected 1 to the " + std::to_string(s.chunks()) + " chunks there are");
  }
  return check_grid("segments", ceil_div(s.chunks(), chunks_of_segment));
}

Status encode_tokens(TensorMap* map, const AnyBuffer& buffer, const HedgehogSizes& s) {
  return encode_tokens(map, buffer, as_linear(s));
}

Status encode_head_maps(TensorMap* map, const AnyBuffer& buffer, const HedgehogSizes& s) {
  const std::int64_t rows = dim(buffer, 1), columns = dim(buffer, 2);
  const std::int64_t row_bytes = columns * runtime::element_bytes(s.dtype);
  const std::int64_t dims[] = {columns, rows, dim(buffer, 0)};
  const std::int64_t strides[] = {row_bytes, rows * row_bytes};
  const std::int64_t box[] = {hedgehog_attention::kMap, hedgehog_attention::tile_dim(s.key_dim), 1};
  return runtime::encode_tensor_map(map, buffer.untyped_data(), {s.dtype, dims, strides, box, 128});
}

Status encode_chunk_states(TensorMap* map, const AnyBuffer& buffer, const HedgehogSizes& s) {
  LinearAttentionSizes states = as_linear(s);
  states.key_dim = hedgehog_attention::kFeatures;
  return encode_states(map, buffer, states);
}

Status load_hedgehog(const Device& device, const HedgehogKernel& kernel) {
  return load(kernels, kernel, device);
}

Result<const runtime::Kernel*> find_hedgehog(const Device& device, const HedgehogKernel& kernel) {
  return find_loaded(kernels, kernel, device);
}

}  // namespace tk::ffi
