// Named reductions over the rows and columns of a register tile.
//
// fold_row_sum and the like take what the vector already holds into the reduction, which is whole
// only after finish_row_sum.
#pragma once

#include "tk/backend.cuh"

namespace tk::warp {

namespace detail_ops {
struct Sum {
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};
struct Max {
  __device__ __forceinline__ float operator()(float x, float y) const { return math::max(x, y); }
};
struct Min {
  __device__ __forceinline__ float operator()(float x, float y) const { return math::min(x, y); }
};
struct Prod {
  __device__ __forceinline__ float operator()(float x, float y) const { return x * y; }
};
}  // namespace detail_ops

#define TK_REDUCTION(name, Op, start)                                                              \
  template <int kN, typename Src>                                                                  \
  __device__ __forceinline__ void row_##name(PerRow<kN>& rows, const Src& src, Location at = {}) { \
    reduce_rows(rows, src, start, detail_ops::Op(), at);                                           \
  }                                                                                                \
  template <int kN, typename Src>                                                                  \
  __device__ __forceinline__ void col_##name(PerCol<kN>& cols, const Src& src, Location at = {}) { \
    reduce_cols(cols, src, start, detail_ops::Op(), at);                                           \
  }                                                                                                \
  template <int kN, typename Src>                                                                  \
  __device__ __forceinline__ void fold_row_##name(PerRow<kN>& rows, const Src& src,                \
                                                  Location at = {}) {                              \
    fold_rows(rows, src, detail_ops::Op(), at);                                                    \
  }                                                                                                \
  template <int kN>                                                                                \
  __device__ __forceinline__ void finish_row_##name(PerRow<kN>& rows, Location at = {}) {          \
    finish_rows(rows, detail_ops::Op(), at);                                                       \
  }                                                                                                \
  template <int kN, typename Src>                                                                  \
  __device__ __forceinline__ void fold_col_##name(PerCol<kN>& cols, const Src& src,                \
                                                  Location at = {}) {                              \
    fold_cols(cols, src, detail_ops::Op(), at);                                                    \
  }                                                                                                \
  template <int kN>                                                                                \
  __device__ __forceinline__ void finish_col_##name(PerCol<kN>& cols, Location at = {}) {          \
    finish_cols(cols, detail_ops::Op(), at);                                                       \
  }

TK_REDUCTION(sum, Sum, 0.0f)
TK_REDUCTION(max, Max, -kInfinity)
TK_REDUCTION(min, Min, kInfinity)
TK_REDUCTION(prod, Prod, 1.0f)
#undef TK_REDUCTION

}  // namespace tk::warp
