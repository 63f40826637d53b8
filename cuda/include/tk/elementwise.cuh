// Named elementwise operations on register tiles and vectors, spelled with map and zip.
#pragma once

#include "tk/backend.cuh"

namespace tk::warp {

// Named maps of one operand.
template <typename Dst, typename Src>
__device__ __forceinline__ void exp2(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::exp2(x); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void exp(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::exp2(x * kLog2E); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void log2(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::log2(x); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void log(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::log2(x) * kLn2; }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void abs(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::abs(x); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void neg(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return -x; }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void relu(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::max_nan(x, 0.0f); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void tanh(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::tanh(x); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void rsqrt(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::rsqrt(x); }, at);
}
template <typename Dst, typename Src>
__device__ __forceinline__ void reciprocal(Dst& dst, const Src& src, Location at = {}) {
  map(dst, src, [](float x) { return math::reciprocal(x); }, at);
}

// The two-operand operations, against a tile, a number, a value per row and a value per column.
#define TK_BINARY(name, expression)                                                          \
  template <typename Dst, typename A, typename B>                                            \
  __device__ __forceinline__ void name(Dst& dst, const A& a, const B& b, Location at = {}) { \
    zip(dst, a, b, [](float x, float y) { return expression; }, at);                         \
  }                                                                                          \
  template <typename Dst, typename A>                                                        \
  __device__ __forceinline__ void name(Dst& dst, const A& a, float y, Location at = {}) {    \
    map(dst, a, [y](float x) { return expression; }, at);                                    \
  }                                                                                          \
  template <typename Dst, typename A, int kN>                                                \
  __device__ __forceinline__ void name##_rows(Dst& dst, const A& a, const PerRow<kN>& rows,  \
                                              Location at = {}) {                            \
    map_rows(dst, a, rows, [](float x, float y) { return expression; }, at);                 \
  }                                                                                          \
  template <typename Dst, typename A, int kN>                                                \
  __device__ __forceinline__ void name##_cols(Dst& dst, const A& a, const PerCol<kN>& cols,  \
                                              Location at = {}) {                            \
    map_cols(dst, a, cols, [](float x, float y) { return expression; }, at);                 \
  }

TK_BINARY(add, x + y)
TK_BINARY(sub, x - y)
TK_BINARY(mul, x* y)
TK_BINARY(div, x / y)
TK_BINARY(max, math::max(x, y))
TK_BINARY(min, math::min(x, y))
#undef TK_BINARY

// A tile or a vector.
template <typename Dst>
__device__ __forceinline__ void zero(Dst& dst, Location at = {}) {
  fill(dst, 0.0f, at);
}

}  // namespace tk::warp
