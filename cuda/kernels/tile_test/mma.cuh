// Products of a warpgroup in every form, width, depth and view.
#pragma once

#include "kernels/tile_test/common.cuh"

namespace tk::tile_test {

// Completes the products that are under way.
template <int kN>
__device__ __forceinline__ void finish(RegTile<float, 16, kN>& acc) {
  warpgroup::mma_commit();
  warpgroup::mma_wait<0>(acc);
}

// A stack of products, 64 rows each, taken out through shared memory.
template <int kN>
struct Products {
  using Acc = RegTile<float, 16, kN>;
  using Tile = SharedTile<float, 64, kN>;
  const TensorMap& map;
  Tile& tile;
  int next = 0;

  __device__ __forceinline__ void put(const Acc& acc) {
    warpgroup::store(tile, acc);
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      tma::store(map, tile, 0, 0, next);
      tma::commit();
      tma::wait_read<0>();
    }
    warpgroup::sync();
    ++next;
  }
};

// Buffers: a, a^T, b, b^T; then for each form the product, and the product added to 3 (scalar 0 is
// 1) or in place of it (0).
template <typename T, int kN, int kK>
__device__ __forceinline__ void products(const KernelParams& params) {
  struct Shared {
    SharedTile<T, 64, kK> a;
    SharedTile<T, kK, 64> at;
    SharedTile<T, kK, kN> b;
    SharedTile<T, kN, kK> bt;
    SharedTile<float, 64, kN> acc;
    Barrier full;
  };
  Shared& shared = shared_memory<Shared>();
  if (warpgroup::leader()) {
    shared.full.init(1);
    publish_barriers();
    shared.full.expect(2 * (64 + kN) * kK * static_cast<int>(sizeof(T)));
    tma::load(shared.a, params.maps[0], shared.full, tma::Keep::kNormal, 0, 0);
    tma::load(shared.at, params.maps[1], shared.full, tma::Keep::kNormal, 0, 0);
    tma::load(shared.b, params.maps[2], shared.full, tma::Keep::kNormal, 0, 0);
    tma::load(shared.bt, params.maps[3], shared.full, tma::Keep::kNormal, 0, 0);
  }
  block::sync();
  shared.full.wait(0);

  const bool accumulate = params.scalars[0] != 0.0f;
  RegTile<T, 16, kK> a;
  warpgroup::load(a, shared.a);
  RegTile<float, 16, kN> acc;
  Products<kN> out{params.maps[4], shared.acc};
  // A loop, so that what fills acc and takes it out is there once.
#pragma unroll 1
  for (int form = 0; form < 12; ++form) {
    warp::fill(acc, 3.0f);
    switch (form) {
      case 0:
        warpgroup::mm_AB(acc, shared.a, shared.b), finish(acc);
        break;
      case 1:
        warpgroup::mma_AB(acc, shared.a, shared.b, accumulate), finish(acc);
        break;
      case 2:
        warpgroup::mm_ABt(acc, warpgroup::afresh(shared.a), warpgroup::afresh(shared.bt)),
            finish(acc);
        break;
      case 3:
        warpgroup::mma_ABt(acc, shared.a, shared.bt, accumulate), finish(acc);
        break;
      case 4:
        warpgroup::mm_AtB(acc, shared.at, shared.b), finish(acc);
        break;
      case 5:
        warpgroup::mma_AtB(acc, shared.at, shared.b, accumulate), finish(acc);
        break;
      case 6:
        warpgroup::mm_AtBt(acc, shared.at, shared.bt), finish(acc);
        break;
      case 7:
        warpgroup::mma_AtBt(acc, shared.at, shared.bt, accumulate), finish(acc);
        break;
      case 8:
        warpgroup::mm_AB(acc, a, shared.b), finish(acc);
        break;
      case 9:
        warpgroup::mma_AB(acc, a, shared.b, accumulate), finish(acc);
        break;
      case 10:
        warpgroup::mm_ABt(acc, a, shared.bt), finish(acc);
        break;
      case 11:
        warpgroup::mma_ABt(acc, a, shared.bt, accumulate), finish(acc);
        break;
    }
    out.put(acc);
  }
}

// Buffers: a, a^T, b, b^T (all 128 x 128); then products of 64 rows (scalar 0) and 64 columns
// (scalar 1) of them: by each form, with the depth in two halves, and two in
// flight at once.
template <typename T>
__device__ __forceinline__ void products_of_views(const KernelParams& params) {
  using Tile = SharedTile<T, 128, 128>;
  struct Shared {
    Tile a, at, b, bt;
    SharedTile<float, 64, 64> acc;
    Barrier full;
  };
  Shared& shared = shared_memory<Shared>();
  if (warpgroup::leader()) {
    shared.full.init(1);
    publish_barriers();
    shared.full.expect(4 * Tile::kBytes);
    tma::load(shared.a, params.maps[0], shared.full, tma::Keep::kNormal, 0, 0);
    tma::load(shared.at, params.maps[1], shared.full, tma::Keep::kNormal, 0, 0);
    tma::load(shared.b, params.maps[2], shared.full, tma::Keep::kNormal, 0, 0);
    tma::load(shared.bt, params.maps[3], shared.full, tma::Keep::kNormal, 0, 0);
  }
  block::sync();
  shared.full.wait(0);

  const int row = scalar(params, 0), col = scalar(params, 1);
  const auto a = shared.a.template rows<64>(row);
  const auto at = shared.at.template cols<64>(row);
  const auto b = shared.b.template cols<64>(col);
  const auto bt = shared.bt.template rows<64>(col);
  RegTile<float, 16, 64> acc, second;
  Products<64> out{params.maps[4], shared.acc};
  warpgroup::mm_AB(acc, a, b), finish(acc), out.put(acc);
  warpgroup::mm_ABt(acc, a, bt), finish(acc), out.put(acc);
  warpgroup::mm_AtB(acc, at, b), finish(acc), out.put(acc);
  warpgroup::mm_AtBt(acc, at, bt), finish(acc), out.put(acc);

  warpgroup::mm_AB(acc, a.template cols<64>(0), b.template rows<64>(0));
  warpgroup::mma_AB(acc, a.template cols_from<64>(64), b.template rows<64>(1)), finish(acc),
      out.put(acc);
  warpgroup::mm_AtBt(acc, at.template rows<64>(0), bt.template cols<64>(0));
  warpgroup::mma_AtBt(acc, at.template rows<64>(1), bt.template cols<64>(1)), finish(acc),
      out.put(acc);
  RegTile<T, 16, 64> half;
  warpgroup::load(half, a.template cols<64>(0));
  warpgroup::mm_ABt(acc, half, bt.template cols<64>(0));
  warpgroup::mma_commit();
  warpgroup::mm_AB(second, a, b);
  warpgroup::mma_commit();
  warpgroup::mma_wait<1>(acc, half);
  out.put(acc);
  warpgroup::mma_wait<0>(second);
  out.put(second);
}

// One width: b's first kN rows come through registers, so that one array serves every width.
template <typename T, int kN, typename Shared>
__device__ __forceinline__ void widths_from(const KernelParams& params, Shared& shared,
                                            const RegTile<T, 16, 16>& a, int col) {
  auto& b_smem = reinterpret_cast<SharedTile<T, kN, 16>&>(shared.bt);
  if (warp::index() == 0) {
    for (int i = 0; i < kN / 16; ++i) {
      RegTile<T, 16, 16> b;
      warp::load(b, matrix<T>(params, 1), 16 * i, 0);
      warp::store(b_smem.template rows<16>(i), b);
    }
    publish_shared();
  }
  warpgroup::sync();
  RegTile<float, 16, kN> acc;
#pragma unroll 1
  for (int form = 0; form < 2; ++form) {
    if (form == 0) {
      warpgroup::mm_ABt(acc, shared.a, b_smem), finish(acc);
    } else {
      warpgroup::mm_ABt(acc, a, b_smem), finish(acc);
    }
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) warpgroup::store(shared.acc[i], warp::cols<16>(acc, i));
    publish_shared();
    warpgroup::sync();
    if (warpgroup::leader()) {
      for (int i = 0; i < kN / 16; ++i) {
        tma::store(params.maps[2], shared.acc[i], col + 16 * i, 0, form);
      }
      tma::commit();
      tma::wait_read<0>();
    }
    warpgroup::sync();
  }
  if constexpr (kN < 256) widths_from<T, kN + 16>(params, shared, a, col + kN);
}

// Buffers: a (64 x 16), b^T (256 x 16); then a b^T for every width from 16 to 256 side by side,
// with a in shared memory and with a in registers.
template <typename T>
__device__ __forceinline__ void every_width(const KernelParams& params) {
  struct Shared {
    SharedTile<T, 64, 16> a;
    SharedTile<T, 256, 16> bt;
    SharedTile<float, 64, 16> acc[16];
  };
  Shared& shared = shared_memory<Shared>();
  RegTile<T, 16, 16> a;
  warpgroup::load(a, matrix<T>(params, 0), 0, 0);
  warpgroup::store(shared.a, a);
  publish_shared();
  widths_from<T, 16>(params, shared, a, 0);
}

}  // namespace tk::tile_test
