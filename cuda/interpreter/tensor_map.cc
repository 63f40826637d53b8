#include "interpreter/tensor_map.h"

#include <cstring>

namespace tk::interpreter {
namespace {

std::string list(std::span<const std::int64_t> values) {
  std::string text;
  for (const std::int64_t value : values) {
    text += (text.empty() ? "" : ", ") + std::to_string(value);
  }
  return "(" + text + ")";
}

}  // namespace

std::string encode(TensorMap* map, void* address, ElementType type,
                   std::span<const std::int64_t> dims, std::span<const std::int64_t> strides,
                   std::span<const std::int64_t> box, int swizzle_bytes) {
  const std::size_t rank = dims.size();
  if (rank < 1 || rank > BoxMap::kMaxRank || strides.size() != rank - 1 || box.size() != rank) {
    return "a tensor map has 1 to 5 dimensions, a box side for each and a stride for all but the "
           "innermost";
  }
  BoxMap description = {};
  description.magic = BoxMap::kMagic;
  description.rank = static_cast<std::int16_t>(rank);
  description.swizzle = static_cast<std::int16_t>(swizzle_bytes);
  description.type = type;
  description.address = address;
  const int element_bytes = description.element_bytes();
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) {
    return "the array's address is not a multiple of 16 bytes";
  }
  for (std::size_t i = 0; i < rank; ++i) {
    const std::int64_t stride = i == 0 ? element_bytes : strides[i - 1];
    if (dims[i] < 1 || dims[i] > (std::int64_t{1} << 32)) {
      return "dimensions " + list(dims) + " are not all from 1 to 2^32";
    }
    if (i > 0 && (stride % 16 != 0 || stride < 0 || stride >= (std::int64_t{1} << 40))) {
      return "byte strides " + list(strides) + " are not all multiples of 16 below 2^40";
    }
    if (box[i] < 1 || box[i] > 256) return "box " + list(box) + " has a side outside of 1 to 256";
    description.dims[i] = dims[i];
    description.strides[i] = stride;
    description.box[i] = static_cast<std::int32_t>(box[i]);
  }
  if (box[0] * element_bytes % 16 != 0) {
    return "the box's innermost side is not a multiple of 16 bytes";
  }
  if (swizzle_bytes != 0 && box[0] * element_bytes > swizzle_bytes) {
    return "the box's innermost side, " + std::to_string(box[0] * element_bytes) +
           " bytes, is wider than the swizzle's " + std::to_string(swizzle_bytes);
  }
  std::memcpy(map, &description, sizeof(description));
  return "";
}

BoxMap decode(const TensorMap& map) {
  BoxMap description;
  std::memcpy(&description, &map, sizeof(description));
  return description;
}

}  // namespace tk::interpreter
