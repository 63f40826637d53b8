// One token's step of states [K, V], a column for each value: linear attention, and what puts
// features before it.
//
//   S <- decay S + k v^T,   out = scale S^T q
//   z <- decay z + k,       out = S^T q / z q          with kNormalize
//
// (Katharopoulos et al., "Transformers are RNNs", 2020, section 3.3.) A state may have several
// queries, as Hedgehog's heads of keys do. Grid: kCols columns of the state of a head, or all of
// them one after another with kNormalize, to a block of one warpgroup without roles; a warp has 16
// of every 64 rows. Shared memory: what each warp sums of its rows, less than 11 KB. In flight and
// limit: as rows.cuh.
#pragma once

#include "kernels/state_step/step.cuh"

namespace tk::state_step {

template <typename TKey_, typename TValue_, int kCols_, bool kWhole_, bool kNormalize_,
          int kQueries_>
struct ColumnsTraits {
  using TKey = TKey_;
  using TValue = TValue_;
  static constexpr int kCols = kCols_;
  static constexpr bool kWhole = kWhole_;
  static constexpr bool kNormalize = kNormalize_;
  static constexpr int kQueries = kQueries_;
  static_assert(kQueries >= 1 && kQueries <= kMaxQueries, "queries have accumulators each");
};

template <typename Traits>
struct Columns {
  using TKey = typename Traits::TKey;
  using TValue = typename Traits::TValue;
  static constexpr int kCols = Traits::kCols;
  static constexpr bool kWhole = Traits::kWhole;
  static constexpr int kQueries = Traits::kQueries;
  static constexpr int kWarps = kThreads / 32;

  // A sum of numbers of rows is that of any column of the tile that has them in each.
  using SumCols = PerCol<16>;
  struct Sums {
    SharedVec<float, 16> vec[kWarps][kQueries];
  };
  struct Nothing {};
  struct Shared {
    SharedVec<float, kCols> totals[kWarps][kQueries];
    Select<Traits::kNormalize, Sums, Nothing> sums;
  };
  static_assert(sizeof(Shared) + 1024 <= columns_shared_bytes(kCols, kQueries, Traits::kNormalize),
                "state_step.h's columns_shared_bytes covers the kernel's shared memory");

  const StepParams& params;
  const Place place;
  const int64 state;
  const float decay;

  __device__ __forceinline__ explicit Columns(const StepParams& params)
      : params(params),
        place(Place::of(params)),
        state(place.state(params)),
        decay(place.value(params.decays, 1.0f)) {}

  // A row of q: that of a group of heads, or one of the head's own.
  __device__ __forceinline__ GlobalVec<const TKey> query(int r) const {
    if constexpr (kQueries == 1) {
      return place.shared_row<TKey>(params, params.q, params.query_heads, params.key_dim);
    } else {
      return {static_cast<const TKey*>(params.q) + (state * kQueries + r) * params.key_dim,
              params.key_dim};
    }
  }

  __device__ __forceinline__ void run(Shared& shared) const {
    const int first = place.part * params.columns_of_part;
    const int end = min(first + params.columns_of_part, params.value_dim);
#pragma unroll 1
    for (int col = first; col < end; col += kCols) {
      // What the columns before have left in shared memory has been read.
      if (col > first) block::sync();
      walk(shared, col);
      block::sync();
      for (int r = warp::index(); r < kQueries; r += kWarps) finish(shared, col, r);
    }
  }

  // Steps the columns on from `col` on, and leaves each warp's sums over its rows.
  __device__ __forceinline__ void walk(Shared& shared, int col) const {
    const int key_dim = params.key_dim, value_dim = params.value_dim;
    const int64 matrix = state * key_dim * value_dim;
    const GlobalView<const float> from{params.from + matrix, key_dim, value_dim, value_dim};
    const GlobalView<float> to{params.to + matrix, key_dim, value_dim, value_dim};
    const auto k = place.shared_row<TKey>(params, params.k, params.key_heads, key_dim);

    PerCol<kCols> values, totals[kQueries];
    SumCols sums[kQueries];
    warp::load_runs<kWhole>(
        values, place.shared_row<TValue>(params, params.v, params.num_heads, value_dim), col, 0.0f);
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      warp::zero(totals[r]);
      warp::zero(sums[r]);
    }
#pragma unroll 1
    for (int row = 0; row < key_dim; row += kRows) {
      RegTile<float, 16, kCols> tile;
      PerRow<16> keys;
      warpgroup::load_runs<kWhole>(tile, from, row, col);
      warpgroup::load(keys, k, row, 0.0f);
      step_on(tile, decay, keys, values);
      warpgroup::store_runs<kWhole>(to, tile, row, col);
      // Rows that are not there have no part in the sums, not even as infinity times zero.
      if (row + kRows > key_dim) warpgroup::keep_rows_before(tile, key_dim - row, 0.0f);
      if constexpr (Traits::kNormalize) {
        if (col == 0) step_normalizer(keys, row);
      }
#pragma unroll
      for (int r = 0; r < kQueries; ++r) {
        PerRow<16> queries;
        RegTile<float, 16, kCols> products;
        warpgroup::load(queries, query(r), row, 0.0f);
        warp::mul_rows(products, tile, queries);
        warp::fold_col_sum(totals[r], products);
        if constexpr (Traits::kNormalize) {
          if (col == 0) fold_sum(sums[r], queries, keys);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      warp::finish_col_sum(totals[r]);
      warp::store(shared.totals[warp::index()][r], totals[r]);
      if constexpr (Traits::kNormalize) {
        if (col == 0) {
          warp::finish_col_sum(sums[r]);
          warp::store(shared.sums.vec[warp::index()][r], sums[r]);
        }
      }
    }
  }

  // Keys become those of z, which are stored; 0 beyond its end.
  __device__ __forceinline__ void step_normalizer(PerRow<16>& keys, int row) const {
    PerRow<16> z;
    const int64 offset = state * params.key_dim;
    warpgroup::load(z, GlobalVec<const float>{params.normalizer_from + offset, params.key_dim}, row,
                    0.0f);
    warp::zip(keys, z, keys, [=, this](float x, float added) { return stepped(decay, x, added); });
    warpgroup::for_each(keys,
                        [=, this](int i, float x) { return row + i < params.key_dim ? x : 0.0f; });
    warp::sync();  // every thread has read before one writes
    warpgroup::store(GlobalVec<float>{params.normalizer_to + offset, params.key_dim}, keys, row);
  }
  // sums += rows of x times rows of y.
  __device__ __forceinline__ static void fold_sum(SumCols& sums, const PerRow<16>& x,
                                                  const PerRow<16>& y) {
    PerRow<16> product;
    warp::zip(product, x, y, [](float a, float b) { return a * b; });
    RegTile<float, 16, 16> tile;
    warp::zero(tile);
    warp::map_rows(tile, tile, product, [](float, float z) { return z; });
    warp::fold_col_sum(sums, tile);
  }

  // A warp: one query's outputs.
  __device__ __forceinline__ void finish(Shared& shared, int col, int r) const {
    PerCol<kCols> total, part;
    warp::load(total, shared.totals[0][r]);
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      warp::load(part, shared.totals[w][r]);
      warp::add(total, total, part);
    }
    const int64 row = state * kQueries + r;
    const float scale = params.scale;
    if constexpr (Traits::kNormalize) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += load_element(shared.sums.vec[w][r], 0);
      if (params.sums == nullptr) {
        const float divisor = scale * sum;
        warp::map(total, total,
                  [=](float x) { return divisor == 0.0f ? 0.0f : scale * x / divisor; });
      } else {
        warp::mul(total, total, scale);
        if (col == 0) {
          PerCol<16> sums;
          warp::fill(sums, scale * sum);
          warp::store_runs<false>(GlobalVec<float>{params.sums + row, 1}, sums, 0);
        }
      }
    } else {
      warp::mul(total, total, scale);
    }
    TValue* out = static_cast<TValue*>(params.out) + row * params.value_dim;
    warp::store_runs<kWhole>(GlobalVec<TValue>{out, params.value_dim}, total, col);
  }
};

template <typename Traits>
__device__ __forceinline__ void columns(const StepParams& params) {
  using Kernel = Columns<Traits>;
  typename Kernel::Shared& shared = block::shared_memory<typename Kernel::Shared>();
  Kernel(params).run(shared);
}

}  // namespace tk::state_step
