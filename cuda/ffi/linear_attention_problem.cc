#include "ffi/linear_attention_problem.h"

namespace tk::ffi {
namespace {

constexpr int kMapColumns = 64;  // of every box: 128 bytes

// What the copy engine asks of a row's length.
Status check_rows(const char* name, const AnyBuffer& buffer, runtime::DataType dtype) {
  if (dim(buffer, 3) * runtime::element_bytes(dtype) % 16 == 0) return {};
  return invalid("rows of " + std::string(name) + ", " + shape_text(buffer) +
                 ", are not a multiple of 16 bytes");
}

}  // namespace

Result<LinearAttentionSizes> read_linear_attention_sizes(const char* keys_name,
                                                         const AnyBuffer& keys,
                                                         const char* values_name,
                                                         const AnyBuffer& values) {
  if (Status status =
          first_error({check_rank(keys_name, keys, 4), check_rank(values_name, values, 4)});
      !status.ok()) {
    return status.error();
  }
  const auto dtype = data_type(keys);
  if (!dtype.ok()) return dtype.error();
  const LinearAttentionSizes s{*dtype,         dim(keys, 0), dim(keys, 1),  dim(keys, 2),
                               dim(values, 2), dim(keys, 3), dim(values, 3)};
  if (Status status = first_error(
          {check_like(values_name, values, keys, {s.batch, s.seqlen, s.num_heads, s.value_dim}),
           check_rows(keys_name, keys, *dtype), check_rows(values_name, values, *dtype)});
      !status.ok()) {
    return status.error();
  }
  for (const std::int64_t size : {s.seqlen, s.num_groups, s.num_heads, s.key_dim, s.value_dim}) {
    if (size == 0) {
      return invalid(std::string(keys_name) + " has shape " + shape_text(keys) + " and " +
                     values_name + " has shape " + shape_text(values) +
                     "; only the batch may be empty");
    }
  }
  if (s.num_heads % s.num_groups != 0) {
    return invalid(std::string(values_name) + " has " + std::to_string(s.num_heads) +
                   " heads, which is not a multiple of the " + std::to_string(s.num_groups) +
                   " of " + keys_name);
  }
  if (s.seqlen > kMaxInt - linear_attention::kChunk ||
      int_product({s.batch, s.num_heads, s.slices(), s.padded()}) < 0 ||
      int_product({s.num_heads, s.padded_values()}) < 0) {
    return unsupported("more than 2^31 - 1 rows: " + std::string(values_name) + " " +
                       shape_text(values));
  }
  if (Status status = check_grid("batch elements", s.batch); !status.ok()) return status.error();
  return s;
}

Status check_floats(const char* name, const AnyBuffer& buffer,
                    std::initializer_list<std::int64_t> expected) {
  return first_error(
      {check_dims(name, buffer, expected), check_dtype(name, buffer, xffi::DataType::F32)});
}

Status check_optional_floats(const char* name, const AnyBuffer& buffer,
                             std::initializer_list<std::int64_t> expected) {
  if (!is_given(buffer)) return check_dtype(name, buffer, xffi::DataType::F32);
  return check_floats(name, buffer, expected);
}

Status check_like(const char* name, const AnyBuffer& buffer, const AnyBuffer& other,
                  std::initializer_list<std::int64_t> expected) {
  return first_error(
      {check_dims(name, buffer, expected), check_dtype(name, buffer, other.element_type())});
}

Status check_stored_states(const char* name, const AnyBuffer& buffer, const AnyBuffer& other,
                           const LinearAttentionSizes& s, std::int64_t stored_every) {
  const std::int64_t runs = ceil_div(s.chunks(), stored_every);
  return check_like(name, buffer, other,
                    {s.batch, runs, s.num_heads, s.padded_values(), s.key_dim});
}

Status check_gates(const GateBuffers& gates, const LinearAttentionSizes& s) {
  return first_error(
      {check_floats("sums", gates.sums, {s.batch, s.num_heads, s.padded()}),
       check_optional_floats("weights", gates.weights, {s.batch, s.num_heads, s.padded()}),
       check_optional_floats("counts", gates.counts, {s.batch, s.padded()})});
}

unsigned features_of(const GateBuffers& gates) {
  return (is_given(gates.weights) ? linear_attention::kWeights : 0u) |
         (is_given(gates.counts) ? linear_attention::kCounts : 0u);
}

linear_attention::Gates kernel_gates(const GateBuffers& gates) {
  return {floats(gates.sums), optional_floats(gates.weights), optional_floats(gates.counts)};
}

Status encode_tokens(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s) {
  const std::int64_t heads = dim(buffer, 2), columns = dim(buffer, 3);
  const std::int64_t row_bytes = columns * runtime::element_bytes(s.dtype);
  const std::int64_t dims[] = {columns, s.seqlen, heads, s.batch};
  const std::int64_t strides[] = {heads * row_bytes, row_bytes, s.seqlen * heads * row_bytes};
  const std::int64_t box[] = {kMapColumns, linear_attention::kChunk, 1, 1};
  return runtime::encode_tensor_map(map, buffer.untyped_data(), {s.dtype, dims, strides, box, 128});
}

Status encode_states(TensorMap* map, const AnyBuffer& buffer, const LinearAttentionSizes& s) {
  const std::int64_t dims[] = {s.key_dim,
                               s.batch * dim(buffer, 1) * dim(buffer, 2) * s.padded_values()};
  const std::int64_t strides[] = {s.key_dim * runtime::element_bytes(s.dtype)};
  const std::int64_t box[] = {kMapColumns, linear_attention::kSlice};
  return runtime::encode_tensor_map(map, buffer.untyped_data(), {s.dtype, dims, strides, box, 128});
}

Status check_grid(const char* what, std::int64_t blocks) {
  if (blocks <= kMaxGridYZ) return {};
  return unsupported(std::to_string(blocks) + " " + what + "; the kernels take up to " +
                     std::to_string(kMaxGridYZ));
}

}  // namespace tk::ffi
