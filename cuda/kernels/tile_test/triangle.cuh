// Maps of a warpgroup's triangles, and vectors in shared memory as a warpgroup reads them.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// Buffers: x (64 x 64), rows, cols, more (64 each). Then triangles of the type T.
template <typename T>
__device__ __forceinline__ void triangles(const KernelParams& params) {
  struct Shared {
    SharedVec<float, 64> rows, cols, more;
    Barrier full;
  };
  Shared& shared = shared_memory<Shared>();
  if (first_thread()) {
    shared.full.init(1);
    publish_barriers();
    shared.full.expect(3 * SharedVec<float, 64>::kBytes);
    tma::load(shared.rows, static_cast<const float*>(data<float>(params, 1)), shared.full);
    tma::load(shared.cols, static_cast<const float*>(data<float>(params, 2)), shared.full);
    tma::load(shared.more, static_cast<const float*>(data<float>(params, 3)), shared.full);
  }
  block::sync();
  shared.full.wait(0);

  RegTile<T, 16, 64> x, y;
  PerRow<16> rows;
  warpgroup::load(x, matrix<T>(params, 0), 0, 0);
  warpgroup::load(rows, shared.rows);
  int next = 0;
  const auto put = [&] { warpgroup::store(matrix<T>(params, 4, next++), y, 0, 0); };
  const auto one = [](float u, float r, float c) { return u + 2.0f * r - c; };
  const auto two = [](float u, float r, float c, float m) { return u * m + 2.0f * r - c; };
  warpgroup::map_lower(y, x, rows, shared.cols, one), put();
  warpgroup::map_lower(y, x, rows, shared.cols, shared.more, two), put();
  warpgroup::map_upper(y, x, rows, shared.cols, one), put();
  warp::convert(y, x), warpgroup::map_upper(y, y, rows, shared.cols, shared.more, two), put();
  const float element = load_element(shared.more, scalar(params, 0));
  warp::fill(y, element), put();
  const auto alone = [](float u) { return u + 3.0f; };
  warpgroup::map_lower(y, x, alone), put();
  warpgroup::map_upper(y, x, alone), put();
}

}  // namespace tk::tile_test
