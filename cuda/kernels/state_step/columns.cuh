// One token's step of states [K, V], a column for each value: linear attention, and what puts
// features before it.
//
//   S <- decay S + k v^T,   out = scale S^T q
//   z <- decay z + k,       out = S^T q / z q          with kNormalize; and if they are given
//                           out = (scale S^T q + numerators) / (scale z q + divisors)
//
// (Katharopoulos et al., "Transformers are RNNs", 2020, section 3.3.) A state may have several
// queries, as Hedgehog's heads of keys do; or the kernel makes q's and k's features itself, Based's
// Taylor series, all of them in shared memory before the first rows of the state have come. Grid:
// kCols columns of the state of a head, or all of them one after another with kNormalize, to a
// block of one warpgroup without roles; a warp has 16 of every 64 rows. Shared memory: what each
// warp sums of its rows, and features, less than 11 KB. In flight and limit: as rows.cuh.
#pragma once

#include "kernels/state_step/step.cuh"

namespace tk::state_step {

template <typename TKey_, typename TValue_, int kCols_, bool kWhole_, bool kNormalize_,
          int kQueries_, bool kTaylor_>
struct ColumnsTraits {
  using TKey = TKey_;
  using TValue = TValue_;
  static constexpr int kCols = kCols_;
  static constexpr bool kWhole = kWhole_;
  static constexpr bool kNormalize = kNormalize_;
  static constexpr int kQueries = kQueries_;
  static constexpr bool kTaylor = kTaylor_;
  static_assert(!kTaylor || kQueries == 1, "features are those of one query");
  static_assert(kQueries >= 1 && kQueries <= kMaxQueries, "queries have accumulators each");
};

template <typename Traits>
struct Columns {
  using TKey = typename Traits::TKey;
  using TValue = typename Traits::TValue;
  static constexpr int kCols = Traits::kCols;
  static constexpr bool kWhole = Traits::kWhole;
  static constexpr int kQueries = Traits::kQueries;
  static constexpr bool kTaylor = Traits::kTaylor;
  static constexpr int kWarps = kThreads / 32;

  // Sixty-fours of rows of z that are asked for at once: all of Based with sixteen values, and all
  // of 128 keys, then with those and the query.
  static constexpr bool kInRegisters = Traits::kNormalize && !kTaylor && kQueries == 1;
  static constexpr int kAhead = kInRegisters ? 2 : 3;
  struct Ahead {
    PerRow<16> z[kAhead], keys[kAhead], queries[kAhead];
  };
  using Tile = RegTile<float, 16, kCols>;  // of the state
  struct Sums {
    SharedVec<float, 16> vec[kWarps][kQueries];
    SharedVec<float, 16> ahead[kAhead][kWarps];  // of z
  };
  // Of k and of q times the scale: sixteen values from each warp, and all features.
  struct Values {
    SharedVec<float, 16> values[kWarps];
    SharedVec<float, kMaxTaylorRows> features;
  };
  struct Features {
    Values keys, queries;
  };
  struct Nothing {};
  struct Shared {
    SharedVec<float, kCols> totals[kWarps][kQueries];
    Select<Traits::kNormalize, Sums, Nothing> sums;
    Select<kTaylor, Features, Nothing> features;
  };
  static_assert(sizeof(Shared) + 1024 <=
                    columns_shared_bytes(kCols, kQueries, Traits::kNormalize, kTaylor),
                "state_step.h's columns_shared_bytes covers the kernel's shared memory");

  const StepParams& params;
  const Place place;
  const int64 state;
  const float decay;

  __device__ __forceinline__ explicit Columns(const StepParams& params)
      : params(params),
        place(Place::of(params)),
        state(place.state(params)),
        decay(kTaylor ? 1.0f : place.value(params.decays, 1.0f)) {}

  __device__ __forceinline__ GlobalVec<const TKey> key() const {
    return place.shared_row<TKey>(params, params.k, params.key_heads, params.key_dim);
  }
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
    const int64 matrix = state * params.key_dim * params.value_dim;
    const GlobalView<float> view{params.state + matrix, params.key_dim, params.value_dim,
                                 params.value_dim};
    const int first = place.part * params.columns_of_part;
    const int end = min(first + params.columns_of_part, params.value_dim);
    // First of all what is large: whatever is computed from the rest waits for that.
    Tile tile;
    warpgroup::load_runs<kWhole>(tile, view, 0, first);
    Ahead ahead;
    if constexpr (kInRegisters) fetch(ahead);
#pragma unroll 1
    for (int col = first;;) {
      PerCol<kCols> values;
      warp::load_runs<kWhole>(
          values, place.shared_row<TValue>(params, params.v, params.num_heads, params.value_dim),
          col, 0.0f);
      if (col == first) begin(shared, ahead);
      walk(shared, tile, values, view, col, end);
      block::sync();
      for (int r = warp::index(); r < kQueries; r += kWarps) finish(shared, col, r);
      col += kCols;
      if (!Traits::kNormalize || col >= end) break;
      // What these columns have left in shared memory has been read.
      block::sync();
    }
  }

  // Steps the columns from `col` on, whose first rows have been asked for, and leaves each warp's
  // sums over its rows. Then asks for the first rows of the next columns.
  __device__ __forceinline__ void walk(Shared& shared, Tile& tile, const PerCol<kCols>& values,
                                       const GlobalView<float>& view, int col, int end) const {
    const int key_dim = params.key_dim;
    PerCol<kCols> totals[kQueries];
#pragma unroll
    for (int r = 0; r < kQueries; ++r) warp::zero(totals[r]);
#pragma unroll 1
    for (int row = 0;;) {
      PerRow<16> keys;
      load_keys(keys, shared, row);
      step_on(tile, decay, keys, values);
      warpgroup::store_runs<kWhole>(view, tile, row, col);
      // Rows that are not there have no part in the sums, not even as infinity times zero.
      if (row + kRows > key_dim) warpgroup::keep_rows_before(tile, key_dim - row, 0.0f);
#pragma unroll
      for (int r = 0; r < kQueries; ++r) {
        PerRow<16> queries;
        RegTile<float, 16, kCols> products;
        load_queries(queries, shared, r, row);
        warp::mul_rows(products, tile, queries);
        warp::fold_col_sum(totals[r], products);
      }
      row += kRows;
      if (row >= key_dim) break;
      warpgroup::load_runs<kWhole>(tile, view, row, col);
    }
    if (Traits::kNormalize && col + kCols < end) {
      warpgroup::load_runs<kWhole>(tile, view, 0, col + kCols);
    }
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      warp::finish_col_sum(totals[r]);
      warp::store(shared.totals[warp::index()][r], totals[r]);
    }
  }

  // After the state is asked for and before it is stored: no load passes a store, for all that the
  // compiler knows.
  __device__ __forceinline__ void load_keys(PerRow<16>& keys, const Shared& shared, int row) const {
    if constexpr (kTaylor) {
      load_features(keys, shared.features.keys, row);
    } else {
      warpgroup::load(keys, key(), row, 0.0f);
    }
  }
  __device__ __forceinline__ void load_normalizer(PerRow<16>& z, int row) const {
    const int64 offset = state * params.key_dim;
    warpgroup::load(z, GlobalVec<const float>{params.normalizer + offset, params.key_dim}, row,
                    0.0f);
  }
  // After the state is stored: with them before, the compiler has twice the state in registers.
  __device__ __forceinline__ void load_queries(PerRow<16>& queries, const Shared& shared, int r,
                                               int row) const {
    if constexpr (kTaylor) {
      load_features(queries, shared.features.queries, row);
    } else {
      warpgroup::load(queries, query(r), row, 0.0f);
    }
  }

  // What z's step needs, of its first rows: asked for together with those of the state.
  __device__ __forceinline__ void fetch(Ahead& ahead) const {
    if constexpr (Traits::kNormalize) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_normalizer(ahead.z[i], kRows * i);
    }
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        warpgroup::load(ahead.keys[i], key(), kRows * i, 0.0f);
        warpgroup::load(ahead.queries[i], query(0), kRows * i, 0.0f);
      }
    }
  }
  // All threads, while the first rows of the state are under way: features, and z, which needs
  // nothing else.
  __device__ __forceinline__ void begin(Shared& shared, Ahead& ahead) const {
    if constexpr (!kInRegisters) fetch(ahead);
    if constexpr (kTaylor) share_values(shared.features);
    if constexpr (Traits::kNormalize && !kInRegisters) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) warp::store(shared.sums.ahead[i][warp::index()], ahead.z[i]);
      warp::sync();
    }
    if constexpr (kTaylor) {
      block::sync();
      if (warp::index() == 0) make_features(shared.features.keys, 1.0f);
      if (warp::index() == 1) make_features(shared.features.queries, 0.5f);
      block::sync();
    }
    if constexpr (Traits::kNormalize) step_normalizer(shared, ahead);
  }
  __device__ __forceinline__ void step_normalizer(Shared& shared, Ahead& ahead) const {
    PerRow<16> sums[kQueries];
#pragma unroll
    for (int r = 0; r < kQueries; ++r) warp::zero(sums[r]);
    int row = 0;
    if constexpr (kInRegisters) {
#pragma unroll
      for (; row < kRows * kAhead; row += kRows) {
        const int i = row / kRows;
        step_rows(ahead.z[i], ahead.keys[i], row);
        add_products(sums[0], ahead.queries[i], ahead.z[i]);
      }
    }
#pragma unroll 1
    for (; row < params.key_dim; row += kRows) {
      PerRow<16> z, keys;
      if (!kInRegisters && row < kRows * kAhead) {
        warp::load(z, shared.sums.ahead[row / kRows][warp::index()]);
      } else {
        load_normalizer(z, row);
      }
      load_keys(keys, shared, row);
      step_rows(z, keys, row);
#pragma unroll
      for (int r = 0; r < kQueries; ++r) {
        PerRow<16> queries;
        load_queries(queries, shared, r, row);
        add_products(sums[r], queries, z);
      }
    }
#pragma unroll
    for (int r = 0; r < kQueries; ++r) {
      store_sum(shared.sums.vec[warp::index()][r], sums[r]);
    }
  }
  // z(row..) <- decay z + k, which is 0 where there are no rows.
  __device__ __forceinline__ void step_rows(PerRow<16>& z, const PerRow<16>& keys, int row) const {
    warp::zip(z, z, keys, [this](float x, float added) { return stepped(decay, x, added); });
    warpgroup::for_each(z,
                        [=, this](int i, float x) { return row + i < params.key_dim ? x : 0.0f; });
    warp::sync();  // every thread has read before one writes
    const GlobalVec<float> normalizer{params.normalizer + state * params.key_dim, params.key_dim};
    warpgroup::store(normalizer, z, row);
  }
  __device__ __forceinline__ static void add_products(PerRow<16>& sum, const PerRow<16>& queries,
                                                      const PerRow<16>& z) {
    PerRow<16> products;
    warp::zip(products, queries, z, [](float q, float z) { return q * z; });
    warp::zip(sum, sum, products, [](float x, float y) { return x + y; });
  }
  __device__ __forceinline__ void share_values(Features& features) const {
    const int dim = params.taylor_dim, warp = warp::index();
    PerRow<16> k, q;
    warpgroup::load(k, place.shared_row<TKey>(params, params.k, params.key_heads, dim), 0, 0.0f);
    warpgroup::load(q, place.shared_row<TKey>(params, params.q, params.query_heads, dim), 0, 0.0f);
    warp::mul(q, q, params.taylor_scale);
    warp::store(features.keys.values[warp], k);
    warp::store(features.queries.values[warp], q);
  }
  // A warp: a one, the values, and the products of value a and of each from a on.
  __device__ __forceinline__ void make_features(Values& x, float factor_of_squares) const {
    const int dim = params.taylor_dim;
    if (warp::leader()) store_element(x.features, 0, 1.0f);
#pragma unroll 1
    for (int first = 0; first < dim; first += 16) {
      PerRow<16> rows;
      warp::load(rows, x.values[first / 16]);
      warp::for_each(rows, [&](int i, float value) {
        if (first + i < dim) store_element(x.features, 1 + first + i, value);
        return value;
      });
#pragma unroll 1
      for (int other = first; other < dim; other += 16) {
        PerCol<16> cols;
        RegTile<float, 16, 16> products;
        warp::load(cols, x.values[other / 16]);
        warp::outer(products, rows, cols, [](float a, float b) { return a * b; });
        warp::for_each(products, [&](int i, int j, float product) {
          const int a = first + i, b = other + j;
          const int of_a = 1 + dim + a * dim - a * (a - 1) / 2;  // the square of value a
          if (a <= b && b < dim) {
            store_element(x.features, of_a + b - a, a == b ? factor_of_squares * product : product);
          }
          return product;
        });
      }
    }
  }
  // Those of rows; 0 beyond the last.
  __device__ __forceinline__ void load_features(PerRow<16>& dst, const Values& x, int row) const {
    warp::zero(dst);
    warpgroup::for_each(dst, [&, this](int i, float) {
      return row + i < params.key_dim ? load_element(x.features, row + i) : 0.0f;
    });
  }

  // The sum of a warp's rows is that of any column of a tile that has them in each.
  __device__ __forceinline__ static void store_sum(SharedVec<float, 16>& dst,
                                                   const PerRow<16>& rows) {
    RegTile<float, 16, 16> tile;
    PerCol<16> sums;
    warp::zero(tile);
    warp::map_rows(tile, tile, rows, [](float, float x) { return x; });
    warp::col_sum(sums, tile);
    warp::store(dst, sums);
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
    // Found again: between, there is no register for it.
    const int64 row = Place::of(params).state(params) * kQueries + r;
    const float scale = params.scale;
    if constexpr (Traits::kNormalize) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += load_element(shared.sums.vec[w][r], 0);
      if (params.divisors == nullptr) {
        const float divisor = scale * sum;
        warp::map(total, total,
                  [=](float x) { return divisor == 0.0f ? 0.0f : scale * x / divisor; });
      } else {
        const GlobalVec<const float> numerators{params.numerators + row * params.value_dim,
                                                params.value_dim};
        const float divisor = scale * sum + load_scalar(params.divisors + row);
        warp::load_runs<kWhole>(part, numerators, col, 0.0f);
        warp::zip(total, total, part, [=](float x, float y) { return scale * x + y; });
        warp::map(total, total, [=](float x) { return divisor == 0.0f ? 0.0f : x / divisor; });
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
