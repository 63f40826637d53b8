// Tensor maps: how the copy engine sees an array.
#pragma once

#include <cstdint>
#include <span>

#include "runtime/status.h"
#include "tk/tensor_map.h"

namespace tk::runtime {

enum class DataType { kBFloat16, kFloat16, kFloat32, kInt32 };

constexpr int element_bytes(DataType type) {
  return type == DataType::kBFloat16 || type == DataType::kFloat16 ? 2 : 4;
}

constexpr int kMaxTensorMapRank = 5;

// All lists innermost first. A box that reaches over an edge reads zeros and writes nothing there.
struct TensorMapShape {
  DataType type;
  std::span<const std::int64_t> dims;     // elements
  std::span<const std::int64_t> strides;  // bytes, of every dimension but the innermost
  std::span<const std::int64_t> box;      // elements
  int swizzle_bytes;                      // 0 (none), 32, 64 or 128
};

Status encode_tensor_map(TensorMap* map, void* address, const TensorMapShape& shape);

}  // namespace tk::runtime
