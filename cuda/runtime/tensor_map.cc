#include "runtime/tensor_map.h"

#include <string>

#include "runtime/driver.h"

namespace tk::runtime {
namespace {

// Values of the driver's enums.
constexpr int kInterleaveNone = 0;
constexpr int kPromoteToL2Lines256 = 3;
constexpr int kFillWithZeros = 0;

int driver_type(DataType type) {
  switch (type) {
    case DataType::kBFloat16:
      return 9;
    case DataType::kFloat16:
      return 6;
    case DataType::kFloat32:
      return 7;
    case DataType::kInt32:
      return 3;
  }
  return -1;
}

int driver_swizzle(int bytes) { return bytes == 128 ? 3 : bytes == 64 ? 2 : bytes == 32 ? 1 : 0; }

std::string list(std::span<const std::int64_t> values) {
  std::string text;
  for (const std::int64_t value : values)
    text += (text.empty() ? "" : ", ") + std::to_string(value);
  return "(" + text + ")";
}

}  // namespace

Status encode_tensor_map(TensorMap* map, void* address, const TensorMapShape& shape) {
  const auto opened = driver();
  if (!opened.ok()) return opened.error();
  const std::size_t rank = shape.dims.size();
  if (rank < 1 || rank > kMaxTensorMapRank || shape.strides.size() != rank - 1 ||
      shape.box.size() != rank) {
    return Error{ErrorKind::kInternal, "tensor map of rank " + std::to_string(rank)};
  }
  std::uint64_t dims[kMaxTensorMapRank];
  std::uint64_t strides[kMaxTensorMapRank] = {};
  std::uint32_t box[kMaxTensorMapRank];
  const std::uint32_t steps[kMaxTensorMapRank] = {1, 1, 1, 1, 1};
  for (std::size_t i = 0; i < rank; ++i) {
    dims[i] = static_cast<std::uint64_t>(shape.dims[i]);
    box[i] = static_cast<std::uint32_t>(shape.box[i]);
    if (i > 0) strides[i - 1] = static_cast<std::uint64_t>(shape.strides[i - 1]);
  }
  const int code = (*opened)->tensor_map_encode(
      map, driver_type(shape.type), static_cast<std::uint32_t>(rank), address, dims, strides, box,
      steps, kInterleaveNone, driver_swizzle(shape.swizzle_bytes), kPromoteToL2Lines256,
      kFillWithZeros);
  if (code == 0) return {};
  return Error{ErrorKind::kInvalidArgument,
               driver_error(**opened, "cuTensorMapEncodeTiled", code) + " for dims " +
                   list(shape.dims) + ", byte strides " + list(shape.strides) + ", box " +
                   list(shape.box) +
                   ". Addresses and strides must be multiples of 16 bytes, box sides at most 256."};
}

}  // namespace tk::runtime
