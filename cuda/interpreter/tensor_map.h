// Tensor maps as the interpreter encodes them: the description itself, in the opaque bytes.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "tk/tensor_map.h"

namespace tk::interpreter {

enum class ElementType : std::int32_t { kBFloat16, kFloat16, kFloat32, kInt32 };

struct BoxMap {
  static constexpr int kMaxRank = 5;
  static constexpr std::uint32_t kMagic = 0x746b6d70;

  std::uint32_t magic;
  std::int16_t rank;
  std::int16_t swizzle;  // bytes: 0, 32, 64 or 128
  ElementType type;
  std::int32_t box[kMaxRank];      // elements
  std::int64_t dims[kMaxRank];     // elements
  std::int64_t strides[kMaxRank];  // bytes; the innermost is that of an element
  void* address;
  int element_bytes() const {
    return type == ElementType::kBFloat16 || type == ElementType::kFloat16 ? 2 : 4;
  }
};
static_assert(sizeof(BoxMap) <= sizeof(TensorMap));

// The map, or what the copy engine would refuse about it. Lists innermost first; strides in bytes,
// of every dimension but the innermost.
std::string encode(TensorMap* map, void* address, ElementType type,
                   std::span<const std::int64_t> dims, std::span<const std::int64_t> strides,
                   std::span<const std::int64_t> box, int swizzle_bytes);

BoxMap decode(const TensorMap& map);

}  // namespace tk::interpreter
