// Stores of several values to global memory that stay one instruction each.
#pragma once

#include "tk/base.cuh"

namespace tk::ptx {

// As a float4 the compiler may store its values one by one, where registers are not in a row.
__device__ __forceinline__ void store_global_f32x4(float* address, const float4& x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_global_u32x2(void* address, uint32 x, uint32 y) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void store_global_u32x4(void* address, const uint32 (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace tk::ptx
