// Moves between registers and a warpgroup's tile in shared memory in the order of its registers.
#pragma once

#include "tk/sm90/copy.cuh"

namespace tk::warpgroup {

namespace detail_fragments {
// Runs of four values, a run of every thread after another.
__device__ __forceinline__ int offset(int run) {
  return 4 * (128 * run + (ptx::thread_index() & 127));
}
}  // namespace detail_fragments

template <int kCols>
__device__ __forceinline__ void store(Fragments<kCols>& dst, const RegTile<float, 16, kCols>& src,
                                      Location = {}) {
  const uint32 base = ptx::shared_address(dst.data);
#pragma unroll
  for (int run = 0; run < kCols / 8; ++run) {
    const float* x = &src.data[0][4 * run];
    ptx::store_shared_f32x4(base + 4 * detail_fragments::offset(run), x[0], x[1], x[2], x[3]);
  }
}
// `src` is a Fragments that was moved to global memory.
template <int kCols>
__device__ __forceinline__ void load_fragments(RegTile<float, 16, kCols>& dst, const float* src,
                                               Location = {}) {
#pragma unroll
  for (int run = 0; run < kCols / 8; ++run) {
    const float4 x = *reinterpret_cast<const float4*>(src + detail_fragments::offset(run));
    dst.data[0][4 * run] = x.x;
    dst.data[0][4 * run + 1] = x.y;
    dst.data[0][4 * run + 2] = x.z;
    dst.data[0][4 * run + 3] = x.w;
  }
}
template <int kCols>
__device__ __forceinline__ void store_fragments(float* dst, const RegTile<float, 16, kCols>& src,
                                                Location = {}) {
#pragma unroll
  for (int run = 0; run < kCols / 8; ++run) {
    const float* x = &src.data[0][4 * run];
    *reinterpret_cast<float4*>(dst + detail_fragments::offset(run)) =
        make_float4(x[0], x[1], x[2], x[3]);
  }
}

}  // namespace tk::warpgroup
