// Maps of a warpgroup's triangles, sums over them, and vectors in shared memory as a warpgroup
// reads them.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

struct TriangleShared {
  SharedVec<float, 64> rows, cols, more;
  SharedVec<float, 64> parts[2];
  Barrier full;
};
// Buffers 1 to 3 in shared memory.
__device__ __forceinline__ TriangleShared& load_vectors(const KernelParams& params) {
  TriangleShared& shared = shared_memory<TriangleShared>();
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
  return shared;
}

// Buffers: x (64 x 64), rows, cols, more (64 each). Then triangles of the type T.
template <typename T>
__device__ __forceinline__ void triangles(const KernelParams& params) {
  TriangleShared& shared = load_vectors(params);
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
  block::sync();
  if (first_thread()) store_element(shared.more, scalar(params, 0), element - 2.0f);
  block::sync();
  PerCol<64> cols;
  warp::load(cols, shared.more);
  warp::fill(y, 1.0f), warp::mul_cols(y, y, cols), put();
  block::sync();
  if (warp::index() == 1) warp::store_col_sum(shared.more, x);
  block::sync();
  warp::load(cols, shared.more);
  warp::fill(y, 1.0f), warp::mul_cols(y, y, cols), put();
  if (warp::index() >= 2) warp::store_col_sum(shared.parts[warp::index() - 2], x);
  block::sync();
  if (warp::index() == 0) warp::add_parts(shared.more, shared.rows, shared.parts);
  block::sync();
  warp::load(cols, shared.more);
  warp::fill(y, 1.0f), warp::mul_cols(y, y, cols), put();
}

// Buffers: x (64 x 64), rows, cols, more (64 each). Then tiles of the type T that sums over the
// lower and the upper triangle leave, the sums beside the diagonal and on it, and a tile's
// diagonal.
template <typename T>
__device__ __forceinline__ void folds(const KernelParams& params) {
  TriangleShared& shared = load_vectors(params);
  RegTile<T, 16, 64> x, y;
  RegTile<float, 16, 64> z;
  PerRow<16> rows, more, sums, on_diagonal;
  warpgroup::load(x, matrix<T>(params, 0), 0, 0);
  warp::map(z, x, [](float u) { return 2.0f * u - 1.0f; });
  warpgroup::load(rows, shared.rows);
  warpgroup::load(more, shared.more);
  int next = 0;
  const auto put = [&](PerRow<16>& vector) {
    warpgroup::store(GlobalVec<float>{data<float>(params, 5) + 64 * next++, 64}, vector, 0);
  };
  const auto start = [&] {
    warp::convert(y, x);
    warp::fill(sums, 1.0f);  // of four lanes' parts each
    warp::zero(on_diagonal);
  };
  const auto finish = [&](int triangle) {
    warp::finish_row_sum(sums);
    warp::finish_row_sum(on_diagonal);
    warpgroup::store(matrix<T>(params, 4, triangle), y, 0, 0);
    put(sums), put(on_diagonal);
  };
  const auto two = [](float& u, float v, float w, const float (&r)[2], const float (&c)[2]) {
    u += v - 2.0f * r[0] + c[0];
    return v * w + r[1] * c[1];
  };
  const auto one = [](float& u, float v, float w, const float (&r)[1], const float (&c)[1]) {
    u = v - c[0];
    return w - r[0];
  };
  start();
  warpgroup::fold_lower(y, sums, on_diagonal, x, z, {&rows, &more}, {&shared.cols, &shared.more},
                        two);
  finish(0);
  start();
  warpgroup::fold_upper(y, sums, on_diagonal, z, x, {&rows}, {&shared.cols}, one);
  finish(1);
  PerRow<16> values;
  warpgroup::diagonal(values, z), put(values);
}

}  // namespace tk::tile_test
