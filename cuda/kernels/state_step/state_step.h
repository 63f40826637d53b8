// What host and device agree on for steps of one token: launch parameters and budgets.
//
// Plain C++: included by the FFI handlers and by the kernels.
//
//   S <- exp(g) S + w v k^T,   out = scale S q + skip * v        for each head
//
// The state is read once and written once, in place, and everything else is small beside it. Two
// layouts: in "rows" a row of S is one value's, [V, K] (the state-space dual); in "columns" a
// column is, [K, V] (linear attention and what puts features before it).
//
// Shapes: k [B, Gk, K], q [B, Gq, K], v [B, H, V], out [B, Ho, V]. Head h of the states reads key
// h / (H / Gk). In columns it may have several queries, which are then its own: Ho = Gq = R H; with
// one, Ho = H and it is query h / (H / Gq).
#pragma once

namespace tk::state_step {

constexpr int kThreads = 128;
constexpr int kRows = 64;       // of a state, that a block has at once
constexpr int kMaxQueries = 8;  // of a state
constexpr int kMaxTaylorDim = 32;
// Features of a Taylor series: a one, d values, and their products, each once.
constexpr long taylor_features(long dim) { return 1 + dim + dim * (dim + 1) / 2; }
constexpr int kMaxTaylorRows =
    static_cast<int>(taylor_features(kMaxTaylorDim) + kRows - 1) / kRows * kRows;
// Blocks that share a multiprocessor, at least: as many as nothing is spilled with.
constexpr int resident_blocks(bool values_last, bool whole, bool normalize, long queries,
                              bool taylor) {
  if (!whole) return queries > 1 ? 2 : 3;
  if (queries > 1) return queries == 4 ? 4 : 3;
  return values_last && !(normalize && taylor) ? 4 : 5;
}

// An array [B, H, ..] of which some axes may be there for all: strides of those are 0.
struct Gate {
  const float* data;  // or null
  long batch_stride, head_stride, value_stride;
};

// Kernels: "kernels/state_step/rows.cuh"
//   tk::state_step::rows<tk::state_step::Traits<TKey, TValue, kCols, kWhole>>
// "kernels/state_step/columns.cuh"
//   tk::state_step::columns<tk::state_step::ColumnsTraits<TKey, TValue, kCols, kWhole, kNormalize,
//   kQueries, kTaylor>>
// with tiles of kCols columns of the state; kWhole where a row is whole runs of sixteen bytes. With
// kTaylor q and k are values of which the kernel makes the K features: a one, the values, for each
// a the products of value a and of each from a on; those of q, scaled, with a half for squares.
// Grid: B * H * parts blocks of kThreads. Parts are runs of rows ("rows") or columns of the state.
struct StepParams {
  const void* q;
  const void* k;
  const void* v;
  Gate decays;        // exp(g), [B, H]; 0 forgets whatever the state is, NaN too; not with kTaylor
  Gate weights;       // w, [B, H]; rows alone
  Gate skip;          // [B, H, V]; rows alone
  float* state;       // [B, H, V, K] or [B, H, K, V], before and after
  float* normalizer;  // with kNormalize z <- exp(g) z + k, [B, H, K]
  void* out;
  // With kNormalize out is divided by scale z q, and 0 where that is; after these have been added
  // to both, or null.
  const float* numerators;  // [B, Ho, V]
  const float* divisors;    // [B, Ho]
  int num_heads, key_heads, query_heads;
  int key_dim, value_dim;
  int taylor_dim;       // with kTaylor, of q and k
  float taylor_scale;   // of q
  int parts;            // of a state
  int columns_of_part;  // with kNormalize all: z is one block's
  float scale;
};

// Of columns: what each warp sums of its rows, and features.
constexpr int columns_shared_bytes(long columns, long queries, bool normalize, bool taylor) {
  return static_cast<int>(kThreads / 32 * 4 * queries * (columns + (normalize ? 16 : 0))) +
         (normalize ? 4 * 3 * kRows : 0) + (taylor ? 4 * 2 * (kRows + kMaxTaylorRows) : 0) + 16 +
         1024;
}

}  // namespace tk::state_step
