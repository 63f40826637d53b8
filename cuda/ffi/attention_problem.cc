#include "ffi/attention_problem.h"

namespace tk::ffi {
namespace {

constexpr int kMapColumns = 64;  // of every box: 128 bytes

}  // namespace

Result<AttentionSizes> read_sizes(const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v,
                                  const ExtraBuffers& extras, const attention::Options& options) {
  if (!(options.scale > 0)) {
    return invalid("scale is " + std::to_string(options.scale) + "; expected a positive number");
  }
  if (!(options.soft_cap >= 0)) {
    return invalid("soft_cap is " + std::to_string(options.soft_cap) +
                   "; expected a positive number, or 0 for none");
  }
  if (Status status =
          first_error({check_rank("q", q, 4), check_rank("k", k, 4), check_rank("v", v, 4)});
      !status.ok()) {
    return status.error();
  }
  const auto dtype = data_type(q);
  if (!dtype.ok()) return dtype.error();
  const AttentionSizes s{*dtype,    dim(q, 0), dim(q, 1), dim(k, 1),
                         dim(q, 2), dim(k, 2), dim(q, 3), dim(v, 3)};
  if (Status status =
          first_error({check_dims("k", k, {s.batch, s.seqlen_kv, s.num_kv_heads, s.head_dim}),
                       check_dims("v", v, {s.batch, s.seqlen_kv, s.num_kv_heads, s.head_dim_v}),
                       check_dtype("k", k, q.element_type()), check_dtype("v", v, q.element_type()),
                       check_extras(extras, s)});
      !status.ok()) {
    return status.error();
  }
  if (s.num_heads > 0 && (s.num_kv_heads == 0 || s.num_heads % s.num_kv_heads != 0)) {
    return invalid("q has " + std::to_string(s.num_heads) + " heads, which is not a multiple of " +
                   std::to_string(s.num_kv_heads) + " key/value heads");
  }
  if (int_product({s.batch, s.padded_q(), s.num_heads}) < 0 ||
      int_product({s.batch, s.seqlen_kv, s.num_kv_heads}) < 0) {
    return unsupported("more than 2^31 - 1 rows: q " + shape_text(q) + ", k " + shape_text(k));
  }
  return s;
}

Result<bool> is_empty(const AttentionSizes& s, bool backward) {
  if (s.batch == 0 || s.num_heads == 0) return true;
  if (s.seqlen_q == 0 && (s.seqlen_kv == 0 || !backward)) return true;
  if (s.seqlen_q == 0 || s.seqlen_kv == 0) {
    return invalid("seqlen_q is " + std::to_string(s.seqlen_q) + " and seqlen_kv is " +
                   std::to_string(s.seqlen_kv) + "; both must be at least 1");
  }
  return false;
}

Status encode_rows(TensorMap* map, const AnyBuffer& buffer, const AttentionSizes& s,
                   std::int64_t rows) {
  const std::int64_t length = dim(buffer, 1), heads = dim(buffer, 2), head_dim = dim(buffer, 3);
  const std::int64_t row_bytes = head_dim * runtime::element_bytes(s.dtype);
  const std::int64_t dims[] = {head_dim, length, heads, s.batch};
  const std::int64_t strides[] = {heads * row_bytes, row_bytes, length * heads * row_bytes};
  const std::int64_t box[] = {kMapColumns, rows, 1, 1};
  return runtime::encode_tensor_map(map, buffer.untyped_data(), {s.dtype, dims, strides, box, 128});
}

}  // namespace tk::ffi
