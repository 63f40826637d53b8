// The bytes of a CUtensorMap, as host code encodes them and kernels receive them by value.
//
// Plain C++: included by the host compiler and by the device compiler alike.
#pragma once

namespace tk {

// Opaque to everyone but the driver that encoded it and the copy engine that reads it.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// How many bytes of a row one tensor-map box spans, which is also the swizzle of the shared tile
// that the box lands in: the widest of 128, 64 and 32 that divides the row.
constexpr int swizzle_bytes(int columns, int element_bytes) {
  const int row_bytes = columns * element_bytes;
  return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32;
}

// Columns of one box: a shared tile is stored as panels of this many columns.
constexpr int panel_columns(int columns, int element_bytes) {
  return swizzle_bytes(columns, element_bytes) / element_bytes;
}

}  // namespace tk
