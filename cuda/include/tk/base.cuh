// The vocabulary every other header uses: integer names, 16-bit floats, constants.
#pragma once

#include "tk/location.h"

#ifdef TK_INTERPRETER
#define __device__
#define __forceinline__ inline
#endif

namespace tk {

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int32 = int;
using int64 = long long;

// The two 16-bit formats. Storage only: arithmetic happens in fp32, conversions round to nearest
// even.
struct bf16 {
  uint16 bits;
};
struct fp16 {
  uint16 bits;
};

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// A where kCondition holds, otherwise B.
template <bool kCondition, typename A, typename B>
struct Selection {
  using Type = A;
};
template <typename A, typename B>
struct Selection<false, A, B> {
  using Type = B;
};
template <bool kCondition, typename A, typename B>
using Select = typename Selection<kCondition, A, B>::Type;

template <typename T>
constexpr bool kIsHalf = kSame<T, bf16> || kSame<T, fp16>;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <typename T>
constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}
template <typename T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
constexpr T max(T a, T b) {
  return a > b ? a : b;
}

}  // namespace tk
