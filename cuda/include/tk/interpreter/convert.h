// Conversions as the hardware rounds, and the functions of single values that kernels may use.
#pragma once

#include <cfloat>
#include <cmath>

#include "tk/base.cuh"

namespace tk::interpreter {

inline float bf16_to_float(uint16 bits) {
  return __builtin_bit_cast(float, static_cast<uint32>(bits) << 16);
}
// To nearest even; every NaN becomes the one that the hardware makes.
inline uint16 float_to_bf16(float x) {
  const uint32 bits = __builtin_bit_cast(uint32, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16 bits) {
  const uint32 sign = static_cast<uint32>(bits & 0x8000u) << 16;
  const uint32 exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
  if (exponent == 31u) {
    return __builtin_bit_cast(float, sign | 0x7f800000u | mantissa << 13);
  }
  if (exponent == 0u) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return __builtin_bit_cast(float, sign | (exponent + 112u) << 23 | mantissa << 13);
}
inline uint16 float_to_fp16(float x) {
  const uint32 bits = __builtin_bit_cast(uint32, x);
  const uint16 sign = static_cast<uint16>((bits >> 16) & 0x8000u);
  const uint32 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                        // below the smallest normal number
    // In units of 2^-24, which fp32 addition rounds to nearest even.
    const float units = __builtin_bit_cast(float, magnitude) * 0x1p24f;
    return sign | static_cast<uint16>(std::nearbyintf(units));
  }
  const uint32 rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16>((rounded - 0x38000000u) >> 13);
}

template <typename T>
inline float to_float(T x) {
  if constexpr (kSame<T, float>) {
    return x;
  } else if constexpr (kSame<T, bf16>) {
    return bf16_to_float(x.bits);
  } else {
    return fp16_to_float(x.bits);
  }
}
template <typename T>
inline T from_float(float x) {
  if constexpr (kSame<T, float>) {
    return x;
  } else if constexpr (kSame<T, bf16>) {
    return T{float_to_bf16(x)};
  } else {
    return T{float_to_fp16(x)};
  }
}

// Results below the normal numbers become zero, as the special-function unit has it.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

}  // namespace tk::interpreter

namespace tk::math {

inline float exp2(float x) { return interpreter::flushed(std::exp2(interpreter::flushed(x))); }
inline float log2(float x) { return std::log2(interpreter::flushed(x)); }
inline float log(float x) { return std::log(x); }
inline float reciprocal(float x) { return interpreter::flushed(1.0f / interpreter::flushed(x)); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(interpreter::flushed(x)); }
inline float tanh(float x) { return std::tanh(x); }
inline float fma(float x, float y, float z) { return std::fma(x, y, z); }
inline float mul(float x, float y) { return x * y; }
// A number if either is one.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float abs(float x) { return std::fabs(x); }
// NaN if either is.
inline float max_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? __builtin_nanf("") : std::fmax(a, b);
}

inline int highest_bit(uint32 x) { return 31 - __builtin_clz(x); }
inline int lowest_bit(uint32 x) { return __builtin_ctz(x); }
inline int count_bits(uint32 x) { return __builtin_popcount(x); }

}  // namespace tk::math
