// y = softmax(x) along the rows of a bf16 matrix of 128 columns.
//
// Grid: a block for each 64 rows. One warpgroup, whose four warps hold 16 rows each in registers;
// no shared memory. Limit: global memory, which is read and written once.
#pragma once

#include "tk/kernel_params.h"
#include "tk/tk.cuh"

namespace example {

__device__ __forceinline__ void softmax(const tk::KernelParams& params) {
  const tk::KernelBuffer& in = params.buffers[0];
  const tk::KernelBuffer& out = params.buffers[1];
  const int rows = in.shape[0], first_row = 64 * tk::grid::block_x();
  const tk::GlobalView<tk::bf16> x_gmem{static_cast<tk::bf16*>(in.data), rows, 128, 128};
  const tk::GlobalView<tk::bf16> y_gmem{static_cast<tk::bf16*>(out.data), rows, 128, 128};

  tk::RegTile<float, 16, 128> x;
  tk::PerRow<16> row;
  tk::warpgroup::load(x, x_gmem, first_row, 0);  // rows beyond the array read as zero
  tk::warp::row_max(row, x);
  tk::warp::sub_rows(x, x, row);
  tk::warp::exp(x, x);
  tk::warp::row_sum(row, x);
  tk::warp::div_rows(x, x, row);
  tk::warpgroup::store(y_gmem, x, first_row, 0);  // and are not written
}

}  // namespace example
