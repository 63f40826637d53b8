// Products of the values of rows, and the gradients of the values.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// Buffers: x (64 x kWidth), dproducts (64 x kCols); then products in fp32, in T, without factors
// (64 x 2 kCols: from registers, and from shared memory), with factors as if they were powers of
// two, dproducts times factors, and gradients: columns first.. of those of the first kDim values,
// where `first` is kPart * kCols. Scalars: factors.
template <typename T, int kDim, int kWidth, int kCols, int kPart>
__device__ __forceinline__ void products(const KernelParams& params) {
  struct Shared {
    SharedTile<T, 64, kWidth> x;
    SharedTile<T, 64, kCols> products;
  };
  Shared& shared = shared_memory<Shared>();
  RegTile<T, 16, kWidth> x;
  warpgroup::load(x, matrix<T>(params, 0), 0, 0);
  warpgroup::store(shared.x, x);
  warpgroup::sync();

  const ProductFactors factors = {static_cast<float>(scalar(params, 0)),
                                  static_cast<float>(scalar(params, 1)),
                                  static_cast<float>(scalar(params, 2))};
  RegTile<float, 16, kCols> wide;
  RegTile<T, 16, kCols> narrow;
  warpgroup::load_products<kDim>(wide, shared.x, kPart * kCols, factors);
  warpgroup::store(matrix<float>(params, 2), wide, 0, 0);
  warpgroup::load_products<kDim>(narrow, shared.x, kPart * kCols, factors);
  warpgroup::store(matrix<T>(params, 3), narrow, 0, 0);
  warpgroup::load_products<kDim>(narrow, shared.x, kPart * kCols);
  warpgroup::store(matrix<T>(params, 4), narrow, 0, 0);
  warpgroup::store_products<kDim>(shared.products, shared.x, kPart * kCols);
  warpgroup::sync();
  warpgroup::load(narrow, shared.products);
  warpgroup::store(matrix<T>(params, 4), narrow, 0, kCols);
  warpgroup::load_products<kDim>(narrow, shared.x, kPart * kCols, PowerFactors{factors});
  warpgroup::store(matrix<T>(params, 5), narrow, 0, 0);

  RegTile<float, 16, kWidth> dx;
  warpgroup::load(wide, matrix<float>(params, 1), 0, 0);
  warp::fill(dx, 1.0f);
  warpgroup::fold_products<kDim>(dx, wide, shared.x, kPart * kCols, factors);
  RegTile<float, 16, kCols> scaled;
  warpgroup::scale_products<kDim>(scaled, wide, kPart * kCols, factors);
  warpgroup::store(matrix<float>(params, 6), scaled, 0, 0);
  warpgroup::store(matrix<float>(params, 7), dx, 0, 0);
}

}  // namespace tk::tile_test
