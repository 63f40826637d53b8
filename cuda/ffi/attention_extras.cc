#include "ffi/attention_extras.h"

#include <array>
#include <iterator>
#include <utility>

namespace tk::ffi {
namespace {

using Member = std::optional<AnyBuffer> ExtraBuffers::*;

struct Argument {
  const char* name;
  Member member;
};
// In the order of the arguments.
constexpr Argument kArguments[] = {
    {"query_lengths", &ExtraBuffers::query_lengths},
    {"kv_lengths", &ExtraBuffers::kv_lengths},
    {"q_segments", &ExtraBuffers::q_segments},
    {"kv_segments", &ExtraBuffers::kv_segments},
    {"mask", &ExtraBuffers::mask},
    {"transposed_mask", &ExtraBuffers::transposed_mask},
    {"bias", &ExtraBuffers::bias},
    {"sinks", &ExtraBuffers::sinks},
    {"key_map", &ExtraBuffers::key_map},
    {"query_map", &ExtraBuffers::query_map},
};

template <typename T>
const T* data_of(const std::optional<AnyBuffer>& buffer) {
  return buffer ? static_cast<const T*>(buffer->untyped_data()) : nullptr;
}

Status check_array(const char* name, const std::optional<AnyBuffer>& buffer, xffi::DataType dtype,
                   std::initializer_list<std::int64_t> dims) {
  if (!buffer) return {};
  return first_error({check_dims(name, *buffer, dims), check_dtype(name, *buffer, dtype)});
}

// Of an axis that all share: 0.
void set_strides(long* const (&strides)[4], const AnyBuffer& buffer) {
  long stride = 1;
  for (int axis = 3; axis >= 0; --axis) {
    const long size = dim(buffer, axis);
    *strides[axis] = size == 1 ? 0 : stride;
    stride *= size;
  }
}

// Every axis is whole or, shared by all, of size 1.
Status check_shared(const char* name, const std::optional<AnyBuffer>& buffer, xffi::DataType dtype,
                    std::initializer_list<std::int64_t> dims) {
  if (!buffer) return {};
  if (Status status =
          first_error({check_rank(name, *buffer, dims.size()), check_dtype(name, *buffer, dtype)});
      !status.ok()) {
    return status;
  }
  std::size_t axis = 0;
  for (const std::int64_t expected : dims) {
    if (const std::int64_t size = dim(*buffer, axis); size != expected && size != 1) {
      return invalid(std::string(name) + " has shape " + shape_text(*buffer) + "; axis " +
                     std::to_string(axis) + " must have size 1 or " + std::to_string(expected));
    }
    ++axis;
  }
  return {};
}

bool has_mask(const ExtraBuffers& extras) { return extras.mask || extras.transposed_mask; }

Status check_mask(const char* name, const std::optional<AnyBuffer>& buffer, bool masked,
                  const AttentionSizes& s, const std::optional<MapBlock>& block, bool transposed) {
  const bool needed = masked && block;
  if (buffer.has_value() != needed) {
    return invalid(std::string(name) + (needed ? " is missing" : " is there, and nobody reads it"));
  }
  if (!needed || block->queries < 1 || block->keys < 1) return {};  // the spec is refused
  std::int64_t rows = ceil_div(s.seqlen_q, block->queries) * block->queries;
  std::int64_t columns = ceil_div(s.seqlen_kv, block->keys) * block->keys;
  if (transposed) std::swap(rows, columns);
  return check_shared(name, buffer, xffi::DataType::U32,
                      {s.batch, s.num_heads, ceil_div(columns, 32), rows});
}

attention::MaskBits mask_bits(const std::optional<AnyBuffer>& buffer) {
  attention::MaskBits bits = {};
  if (!buffer) return bits;
  bits.words = static_cast<const unsigned*>(buffer->untyped_data());
  long* const strides[] = {&bits.batch_stride, &bits.head_stride, &bits.word_stride,
                           &bits.row_stride};
  set_strides(strides, *buffer);
  return bits;
}

attention::ScoreArray score_array(const std::optional<AnyBuffer>& buffer) {
  attention::ScoreArray array = {};
  if (!buffer) return array;
  array.data = buffer->untyped_data();
  long* const strides[] = {&array.batch_stride, &array.head_stride, &array.query_stride,
                           &array.key_stride};
  set_strides(strides, *buffer);
  return array;
}

Status check_map(const char* name, const std::optional<AnyBuffer>& buffer, bool needed,
                 const AttentionSizes& s, const MapBlock& block, bool transposed) {
  if (buffer.has_value() != needed) {
    return invalid(std::string(name) + (needed ? " is missing" : " is there") +
                   ": segment ids and masks come with block maps, and these with them");
  }
  if (block.queries < 1 || block.keys < 1) return {};  // the spec is refused
  std::int64_t rows = ceil_div(s.seqlen_q, block.queries);
  std::int64_t columns = ceil_div(s.seqlen_kv, block.keys);
  if (transposed) std::swap(rows, columns);
  return check_shared(name, buffer, xffi::DataType::S32,
                      {s.batch, s.num_heads, rows, ceil_div(columns, 32), 2});
}

attention::BlockMap block_map(const std::optional<AnyBuffer>& buffer) {
  attention::BlockMap map = {};
  if (!buffer) return map;
  map.words = static_cast<const attention::MapWord*>(buffer->untyped_data());
  map.row_stride = dim(*buffer, 3);
  const long head_size = dim(*buffer, 2) * map.row_stride;
  if (dim(*buffer, 1) != 1) map.head_stride = head_size;
  if (dim(*buffer, 0) != 1) map.batch_stride = dim(*buffer, 1) * head_size;
  return map;
}

int bias_bytes(const ExtraBuffers& extras) { return has_float_bias(extras) ? 4 : 2; }

}  // namespace

Result<ExtraBuffers> read_extras(const xffi::RemainingArgs& args) {
  ExtraBuffers extras;
  if (args.size() == 0) return extras;
  if (args.size() != std::size(kArguments)) {
    return invalid("there are " + std::to_string(args.size()) + " arrays beside q, k and v; " +
                   "expected 0 or " + std::to_string(std::size(kArguments)));
  }
  for (std::size_t i = 0; i < std::size(kArguments); ++i) {
    const auto buffer = args.get<AnyBuffer>(i);
    if (buffer.has_error()) return invalid(buffer.error().message());
    if (buffer->element_count() != 0) extras.*kArguments[i].member = *buffer;
  }
  return extras;
}

Status check_extras(const ExtraBuffers& extras, const AttentionSizes& s) {
  const auto dtype =
      s.dtype == runtime::DataType::kBFloat16 ? xffi::DataType::BF16 : xffi::DataType::F16;
  if (extras.q_segments.has_value() != extras.kv_segments.has_value()) {
    return invalid("segment ids of queries and of keys come together");
  }
  return first_error(
      {check_array("query_lengths", extras.query_lengths, xffi::DataType::S32, {s.batch}),
       check_array("kv_lengths", extras.kv_lengths, xffi::DataType::S32, {s.batch}),
       check_array("q_segments", extras.q_segments, xffi::DataType::S32, {s.batch, s.seqlen_q}),
       check_array("kv_segments", extras.kv_segments, xffi::DataType::S32, {s.batch, s.seqlen_kv}),
       check_shared("bias", extras.bias, has_float_bias(extras) ? xffi::DataType::F32 : dtype,
                    {s.batch, s.num_heads, s.seqlen_q, s.seqlen_kv}),
       check_shared("sinks", extras.sinks, xffi::DataType::F32, {s.batch, s.num_heads})});
}

bool has_float_bias(const ExtraBuffers& extras) {
  return extras.bias && extras.bias->element_type() == xffi::DataType::F32;
}

unsigned bias_reading(const ExtraBuffers& extras) {
  if (!extras.bias) return 0;
  const std::int64_t queries = dim(*extras.bias, 2), keys = dim(*extras.bias, 3);
  if (queries > 1 && keys * bias_bytes(extras) % 16 == 0) return attention::kTiledBias;
  return keys % 2 == 0 ? attention::kPairedBias : 0u;
}

Status encode_bias(TensorMap* map, const ExtraBuffers& extras, std::int64_t block_kv) {
  const AnyBuffer& bias = *extras.bias;
  const int bytes = bias_bytes(extras);
  const runtime::DataType dtype = has_float_bias(extras) ? runtime::DataType::kFloat32
                                  : bias.element_type() == xffi::DataType::BF16
                                      ? runtime::DataType::kBFloat16
                                      : runtime::DataType::kFloat16;
  const std::int64_t dims[] = {dim(bias, 3), dim(bias, 2), dim(bias, 1), dim(bias, 0)};
  const std::int64_t row = dims[0] * bytes, head = dims[1] * row;
  const std::int64_t strides[] = {row, head, dims[2] * head};
  const std::int64_t box[] = {panel_columns(static_cast<int>(block_kv), bytes), 64, 1, 1};
  return runtime::encode_tensor_map(
      map, bias.untyped_data(),
      {dtype, dims, strides, box, swizzle_bytes(static_cast<int>(block_kv), bytes)});
}

Status check_maps(const ExtraBuffers& extras, const AttentionSizes& s, const MapBlock& key_map,
                  const std::optional<MapBlock>& query_map) {
  const bool mapped = extras.q_segments || has_mask(extras);
  return first_error({check_map("key_map", extras.key_map, mapped, s, key_map, false),
                      check_map("query_map", extras.query_map, mapped && query_map, s,
                                query_map.value_or(MapBlock{}), true)});
}

Status check_masks(const ExtraBuffers& extras, const AttentionSizes& s,
                   const std::optional<MapBlock>& mask,
                   const std::optional<MapBlock>& transposed_mask) {
  const bool masked = has_mask(extras);
  return first_error(
      {check_mask("mask", extras.mask, masked, s, mask, false),
       check_mask("transposed_mask", extras.transposed_mask, masked, s, transposed_mask, true)});
}

void declare_arrays(std::initializer_list<CallArray> arrays, const ExtraBuffers& extras) {
  std::vector<CallArray> all(arrays);
  for (const auto& [name, member] : kArguments) {
    if (extras.*member) all.push_back({name, *(extras.*member), false});
  }
  declare_call_arrays(all);
}

unsigned features_of(const ExtraBuffers& extras, const attention::Options& options) {
  unsigned features = 0;
  if (extras.query_lengths || extras.kv_lengths) features |= attention::kLengths;
  if (extras.q_segments) features |= attention::kSegments;
  if (has_mask(extras)) features |= attention::kMaskArray;
  if (extras.bias) features |= attention::kBias;
  if (has_float_bias(extras)) features |= attention::kFloatBias;
  if (options.soft_cap != 0) features |= attention::kSoftCap;
  return features;
}

attention::Extras kernel_extras(const ExtraBuffers& extras, const AttentionSizes& sizes,
                                const attention::Options& options) {
  attention::Extras params = {};
  params.query_lengths = data_of<int>(extras.query_lengths);
  params.kv_lengths = data_of<int>(extras.kv_lengths);
  params.window_first = static_cast<int>(sizes.window_first(options));
  params.window_last = static_cast<int>(sizes.window_last(options));
  params.bottom_right = options.bottom_right;
  params.q_segments = data_of<int>(extras.q_segments);
  params.kv_segments = data_of<int>(extras.kv_segments);
  params.mask = mask_bits(extras.mask);
  params.transposed_mask = mask_bits(extras.transposed_mask);
  params.bias = score_array(extras.bias);
  params.key_map = block_map(extras.key_map);
  params.query_map = block_map(extras.query_map);
  params.sinks = data_of<float>(extras.sinks);
  if (extras.sinks && dim(*extras.sinks, 0) != 1) params.sinks_batch_stride = dim(*extras.sinks, 1);
  params.soft_cap = options.soft_cap;
  return params;
}

}  // namespace tk::ffi
