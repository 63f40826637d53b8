// What host and device agree on for attention: settings, launch parameters and budgets.
//
// Plain C++: included by the FFI handler and by the kernels. Shape comments use B (batch),
// T (seqlen_q), S (seqlen_kv), H (num_heads), K (num_kv_heads), D (head_dim).
#pragma once

#include "tk/tensor_map.h"

namespace tk::attention {

// What is computed. Fields match tk_jax.ops.attention.config.KernelOptions.
struct Options {
  float scale;         // positive; multiplies the scores before the softmax
  bool is_causal;      // query i sees key j only if j <= i + offset
  bool bottom_right;   // offset is S - T if set, otherwise 0
  bool deterministic;  // dq is summed over key blocks in a fixed order
  // Query i sees key j only if i + offset - left <= j <= i + offset + right; negative: no such end.
  long window_left, window_right;
  float soft_cap;  // scaled scores s become soft_cap tanh(s / soft_cap); 0: they stay
};

// Which keys a query may see: all; those up to one that moves with it; those between two.
enum class Mask { kNone, kCausal, kBand };

constexpr Mask mask_of(const Options& options) {
  if (options.window_left >= 0) return Mask::kBand;
  return options.is_causal || options.window_right >= 0 ? Mask::kCausal : Mask::kNone;
}

// What a kernel is compiled for beyond its mask, as bits.
enum Feature : unsigned {
  kLengths = 1,     // Extras::query_lengths, kv_lengths
  kSegments = 2,    // Extras::q_segments, kv_segments
  kMaskArray = 4,   // Extras::mask, transposed_mask
  kBias = 8,        // Extras::bias
  kSoftCap = 16,    // Extras::soft_cap
  kFloatBias = 32,  // with kBias: it is of fp32, not of q's type
  // With kBias, of the forward pass, one of them at most: the copy engine brings it, as rows of
  // whole 16 bytes that queries do not share; or its rows are whole pairs of keys.
  kTiledBias = 64,
  kPairedBias = 128,
};
// Those that may leave a query without a key, wherever its diagonals are.
constexpr unsigned kHidingFeatures = kLengths | kSegments | kMaskArray;
// Those with block maps.
constexpr unsigned kMapFeatures = kSegments | kMaskArray;

// An array [B, H, T, S] of which any axis may be shared: its stride is 0 there.
struct ScoreArray {
  const void* data;
  long batch_stride, head_stride, query_stride, key_stride;  // in elements
};

// Bits of a mask: an array [B, H, words, rows], whose bit c % 32 of word c / 32 says whether a row
// sees column c. It is as large as whole tiles are, zero beyond its own; shared along an axis whose
// stride is 0.
struct MaskBits {
  const unsigned* words;
  long batch_stride, head_stride, word_stride, row_stride;  // in words
};

// Which blocks of queries and keys meet, for segments and a mask. A word is 32 blocks of a row, the
// lowest bit first: those in which some query may see some key, and those in which all see all, as
// far as segments and mask are concerned.
struct alignas(8) MapWord {
  unsigned visited, whole;
};
// An array [B, H, rows, ceil(columns / 32)], shared along an axis whose stride is 0.
struct BlockMap {
  const MapWord* words;
  long batch_stride, head_stride, row_stride;  // in words
};

// What a call has beside q, k and v; null, or 0, where there is none.
struct Extras {
  const int* query_lengths;  // [B]
  const int* kv_lengths;     // [B]
  // With lengths, what the offsets of Params are at position 0, and whether lengths move positions.
  int window_first, window_last;
  bool bottom_right;
  const int* q_segments;     // [B, T]
  const int* kv_segments;    // [B, S]
  MaskBits mask;             // of queries over keys, for kernels whose scores have these rows
  MaskBits transposed_mask;  // of keys over queries, the same
  BlockMap key_map;          // of query blocks over key blocks, with segments or a mask
  BlockMap query_map;        // of key blocks over query blocks, the same in the backward pass
                             // (wide: of the tiles of dq's kernel and of the other one)
  ScoreArray bias;
  const float* sinks;       // [B, H] or [H]
  long sinks_batch_stride;  // H or 0
  float soft_cap;
};

// How the forward pass is computed. Fields match AttentionForwardConfig.
struct ForwardConfig {
  long block_q;   // query rows of a tile: 64 for each consumer warpgroup
  long block_kv;  // keys of one step, a multiple of 16
  long stages;    // depth of the key/value ring
};

// How the backward pass is computed. Fields match AttentionBackwardConfig.
struct BackwardConfig {
  long block_q;  // query rows of one step: 64 or 128
  // Keys of a tile: 64 for each consumer warpgroup, or, in the wide kernels, for each block of a
  // cluster of one or two.
  long block_kv;
  long stages;  // depth of the query/dout ring
  // Of the wide kernels, where dq has a kernel of its own; elsewhere 0.
  long dq_block_kv = 0;  // keys of one step, a multiple of 16
  long dq_stages = 0;    // depth of its key/value ring
};

constexpr int kWarpgroupThreads = 128;
// Barriers, and the slack that aligns the first tile to 1024 bytes.
constexpr int kSharedSlack = 2048;
// Rows of the workspace arrays are padded to this, so that every tile of queries is whole.
constexpr int kQueryPadding = 128;
// dq is accumulated in square fragments of this many rows and columns.
constexpr int kFragmentRows = 64;

// Head dims of tiles: the copy engine fills the columns beyond an array's own with zeros, and
// stores none of them.
constexpr int kHeadDimStep = 64, kMaxHeadDim = 256;
constexpr long tile_head_dim(long head_dim) {
  return (head_dim + kHeadDimStep - 1) / kHeadDimStep * kHeadDimStep;
}

constexpr long padded_queries(long seqlen_q) {
  return (seqlen_q + kQueryPadding - 1) / kQueryPadding * kQueryPadding;
}

// -- Forward ------------------------------------------------------------------------------------
// Kernel: "kernels/attention/forward.cuh"
//   tk::attention::forward<tk::attention::ForwardTraits<T, kHeadDim, kHeadDimV, kMask, kFeatures,
//                                                       kBlockQ, kBlockKv, kStages>>
// with T one of tk::bf16, tk::fp16 and the head dims of tiles. Grid: min(multiprocessors, tiles)
// blocks, where tiles = ceil(T / block_q) * H * B.
struct ForwardParams {
  // Dimensions of every map, innermost first: (D or Dv, T or S, H or K, B), with the strides of the
  // row-major array [B, T or S, H or K, D or Dv]. Boxes: (64, rows, 1, 1), 128-byte swizzle.
  TensorMap q;    // rows = 64
  TensorMap k;    // rows = block_kv
  TensorMap v;    // rows = block_kv
  TensorMap out;  // rows = 64
  float* lse;     // [B, T, H], natural log
  int batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads;
  int first_offset, last_offset;  // query i sees keys from i + first_offset to i + last_offset
  int section;  // with a mask: heads, over all batch entries, that are dealt out together
  float scale;
  Extras extras;
  void* out_rows;  // out itself, [B, T, H, Dv], to be stored to where there is one stage of q
  int head_dim_v;  // out's own, not a tile's
  // [B, T, H], with a bias: what rounding took off lse. Weights made from lse alone are too large
  // by its exponential, which matters where all keys of a query have a bias of -1e5 or less, as
  // masks that are added have.
  float* lse_rest;
  // With kTiledBias: dimensions (S, T, H or 1, B or 1) of the row-major array. Boxes: 64 rows of as
  // many columns as a panel of a shared tile has that is block_kv wide.
  TensorMap bias;
};

// Queries that the first tile starts before the first one. A tile that is cut costs nearly what a
// whole one does: better the first, which a mask lets see the least keys, than the last. Lengths
// and maps count tiles from the first query.
constexpr int forward_lead(long seqlen_q, long block_q, Mask mask, unsigned features) {
  if (mask == Mask::kNone || (features & (kLengths | kMapFeatures)) != 0) return 0;
  return static_cast<int>(((seqlen_q + block_q - 1) / block_q * block_q - seqlen_q) / 64 * 64);
}
constexpr int forward_threads(long block_q) {
  return static_cast<int>((block_q / 64 + 1) * kWarpgroupThreads);
}
// Shared memory that a block can have.
constexpr long kMaxSharedBytes = 227 * 1024;
// Head dims of tiles. Stages of k and v, of q, through whose memory out leaves, and one of a bias.
constexpr int forward_shared_bytes(long head_dim, long head_dim_v, const ForwardConfig& config,
                                   unsigned features, int q_stages) {
  const long rows = q_stages * config.block_q;
  const long bias_bytes = (features & kTiledBias) == 0 ? 0 : (features & kFloatBias) != 0 ? 4 : 2;
  return static_cast<int>(2 * (rows * (head_dim > head_dim_v ? head_dim : head_dim_v) +
                               config.stages * config.block_kv * (head_dim + head_dim_v)) +
                          bias_bytes * config.block_q * config.block_kv) +
         kSharedSlack;
}
// With two, a tile's last product runs beside the next tile's first.
constexpr int forward_q_stages(long head_dim, long head_dim_v, const ForwardConfig& config,
                               unsigned features) {
  return forward_shared_bytes(head_dim, head_dim_v, config, features, 2) <= kMaxSharedBytes ? 2 : 1;
}
constexpr int forward_shared_bytes(long head_dim, long head_dim_v, const ForwardConfig& config,
                                   unsigned features) {
  return forward_shared_bytes(head_dim, head_dim_v, config, features,
                              forward_q_stages(head_dim, head_dim_v, config, features));
}

// -- Backward -------------------------------------------------------------------------------------
// On one stream, in this order, with the head dims of tiles:
//   prepare, main, finish   up to 128, with D and Dv rounded up alike (narrow_head_dim)
//   prepare, wide, wide dq  where either is beyond
// Workspaces, all written before they are read:
//   delta, scaled_lse  fp32 [B, H, padded_queries(T)]
//   dq_acc             fp32 [B, H, padded_queries(T), D], as 64x64 fragments; wide: D is 0
//   dq_order           int32 [B, H, padded_queries(T) / 64]
constexpr bool is_wide(long head_dim, long head_dim_v) {
  return head_dim > 128 || head_dim_v > 128;
}
constexpr long narrow_head_dim(long head_dim, long head_dim_v) {
  return head_dim > head_dim_v ? head_dim : head_dim_v;
}

// Kernel: "kernels/attention/backward_prepare.cuh"
//   tk::attention::backward_prepare<T, kHeadDimV>
// Grid: (padded_queries(T) / 64, H, B) blocks of 128 threads.
struct BackwardPrepareParams {
  TensorMap out, dout;  // as ForwardParams::out
  const float* lse;     // [B, T, H]
  const float* dlse;    // [B, T, H], or null where nothing flows into lse
  float* delta;         // rowsum(out * dout) - dlse; 0 beyond T
  float* scaled_lse;    // lse_factor lse; +inf beyond T and for rows without a key
  float* dq_acc;        // zeroed here, or not
  int* dq_order;        // zeroed here
  int* next_tile;       // zeroed here; null where tiles are not dealt out
  float lse_factor;     // 1 / ln 2, or 1 where there is a bias (scores.cuh)
  int batch, seqlen_q, num_heads;
  // Columns of dq_acc that are zeroed here, all or none of them: where no block is the first to
  // write a query's dq, as there is no order and every block adds, or as some queries may see no
  // key.
  int zeroed_columns;
};
constexpr int backward_prepare_shared_bytes(long head_dim_v) {
  return static_cast<int>(2 * 64 * head_dim_v * 2) + kSharedSlack;
}

// Kernel: "kernels/attention/backward.cuh"
//   tk::attention::backward<tk::attention::BackwardTraits<T, kHeadDim, kMask, kFeatures,
//                                                         kDeterministic, kBlockQ, kBlockKv,
//                                                         kStages>>
// Grid: with key_blocks = ceil(S / block_kv), tiles = key_blocks * K * B and SMs multiprocessors,
//   or twice as many where two blocks share one (backward_resident_blocks),
//   in waves (causal)             min(tiles, SMs)
//   another mask or a block map   tiles: blocks start in index order as multiprocessors become free
//   otherwise, not deterministic  min(tiles, SMs)
//   otherwise                     min(tiles, max(key_blocks, SMs / key_blocks * key_blocks)), at
//                                 most SMs: all key blocks of a head run at once, since each waits
//                                 for others to add to dq
struct BackwardParams {
  // Dimensions and strides as in ForwardParams. Boxes: (64, rows, 1, 1), 128-byte swizzle.
  TensorMap q, dout;  // rows = block_q
  TensorMap k, v;     // rows = block_kv
  TensorMap dk, dv;   // rows = 64
  const float* delta;
  const float* scaled_lse;
  float* dq_acc;
  int* dq_order;
  int batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads;
  int first_offset, last_offset;
  // What follows from the sizes comes ready made: the copying warps have few registers.
  int padded_q;  // padded_queries(T)
  int q_blocks, kv_blocks;
  int heads_of_group;  // H / K
  int tiles;           // kv_blocks * K * B
  // Key blocks of a head that take turns at dq among themselves: min(key_blocks, SMs), as many as
  // surely run at once. In waves: the tiles of one, which run at once too.
  int turn_group;
  // In waves: K * B, how many of these have their key blocks side by side (causal_rows_together),
  // and the key blocks of a phase: as many as two waves hold.
  int tile_rows, rows_together, phase_blocks;
  // In waves: how many tiles have been dealt out. In dq's memory, which finish writes.
  int* next_tile;
  float scale;
  Extras extras;
};
// Whether causal key blocks are dealt out in turns.cuh's waves. A cap beside a bias leaves no
// registers for it.
constexpr bool causal_in_waves(long head_dim, Mask mask, unsigned features) {
  return mask == Mask::kCausal && head_dim <= 128 && (features & kMapFeatures) == 0 &&
         (features & (kSoftCap | kBias)) != (kSoftCap | kBias);
}
// Of how many of `rows` key/value heads key blocks are then walked side by side. With few, a wave
// has many key blocks of a head, the last of which starts that many turns late; with many, there
// are more phases, each of which reads q and dout again. Short sequences have as many as two waves
// hold whole, unless their queries do not fit into L2. Where there is more than one phase, other
// heads have to come between two of a head's. Measured: docs/kernels/attention.md.
constexpr long kHeadsTogether = 8;
constexpr long kQueryColumnsTogether = 64 * 128, kKeyColumnsTogether = 32 * 128;
constexpr long causal_rows_together(long key_blocks, long rows, long heads_of_group, long head_dim,
                                    long resident_tiles) {
  const auto larger = [](long x, long y) { return x > y ? x : y; };
  const auto smaller = [](long x, long y) { return x < y ? x : y; };
  const long whole = 2 * resident_tiles / key_blocks;  // heads that two waves hold
  const long in_l2 = kQueryColumnsTogether / (heads_of_group * head_dim);
  const long eights = smaller(whole, kKeyColumnsTogether / head_dim) / kHeadsTogether;
  long together = kHeadsTogether * larger(1, eights);
  if (together > in_l2) together = larger(kHeadsTogether, in_l2 / 2);
  if (together > whole && together > rows / 2) together = larger(whole, rows / 2);
  return larger(1, smaller(together, rows));
}
// How many steps' dq can be on their way out, each with a storing warp of its own where the order
// is fixed. A second one fits at D = 128 alone.
constexpr int backward_dq_stages(long head_dim) { return head_dim == 128 ? 2 : 1; }
constexpr int backward_threads(long block_kv) {
  return static_cast<int>((block_kv / 64 + 1) * kWarpgroupThreads);
}
// Blocks with one consumer share a multiprocessor, where there is room for two.
constexpr int backward_resident_blocks(long head_dim, long block_kv) {
  return head_dim == 64 && block_kv == 64 ? 2 : 1;
}
// k and v, stages of q and dout with their lse and delta, two of ds, and of dq in fp32.
constexpr int backward_shared_bytes(long head_dim, const BackwardConfig& config) {
  return static_cast<int>(2 * head_dim * 2 * config.block_kv +
                          config.stages * config.block_q * (2 * 2 * head_dim + 2 * 4) +
                          2 * 2 * config.block_q * config.block_kv +
                          backward_dq_stages(head_dim) * 4 * config.block_q * head_dim) +
         kSharedSlack;
}

// -- The gradient of a bias, after the backward pass ---------------------------------------------
// A tile of the bias is as large whatever the head dims are.
constexpr int kBiasBlockQ = 128, kBiasBlockKv = 64;
// Kernel: "kernels/attention/backward_bias.cuh"
//   tk::attention::backward_bias<tk::attention::BackwardBiasTraits<T, kHeadDim, kHeadDimV, kMask,
//                                                                  kFeatures>>
// Grid: min(multiprocessors, tiles) blocks; a tile is kBiasBlockQ x kBiasBlockKv of the gradient.
struct BackwardBiasParams {
  TensorMap q, dout;  // as ForwardParams::q
  TensorMap k, v;     // rows = kBiasBlockKv
  const float* delta;
  const float* scaled_lse;
  // [bias_batches, bias_heads, T or kBiasBlockQ, S or kBiasBlockKv]: where all queries share a
  // bias, the sum over those that are apart by a multiple of kBiasBlockQ; keys likewise. Of fp32,
  // or where it is not float_result, of the bias's type.
  void* dbias;
  bool shares_queries, shares_keys, float_result;
  int bias_batches, bias_heads;  // 1, or all
  int batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads;
  int first_offset, last_offset;
  int padded_q;
  float scale;
  Extras extras;
};
// As many as fit.
constexpr int backward_bias_stages(long head_dim, long head_dim_v) {
  return head_dim + head_dim_v <= 256 ? 2 : 1;
}
constexpr int backward_bias_shared_bytes(long head_dim, long head_dim_v) {
  return static_cast<int>(2 * (head_dim + head_dim_v) * (kBiasBlockQ + kBiasBlockKv) *
                          backward_bias_stages(head_dim, head_dim_v)) +
         kSharedSlack;
}

// Kernel: "kernels/attention/backward_finish.cuh"
//   tk::attention::backward_finish<T, D>
// Grid: (ceil(T / 64), H, B) blocks of 128 threads.
struct BackwardFinishParams {
  TensorMap dq;  // as ForwardParams::out
  const float* dq_acc;
  int seqlen_q, num_heads;
  float scale;
};
constexpr int backward_finish_shared_bytes(long head_dim) {
  return static_cast<int>(64 * head_dim * 2) + kSharedSlack;
}

// Kernel: "kernels/attention/backward_wide.cuh"
//   tk::attention::backward_wide<tk::attention::BackwardWideTraits<
//       T, kHeadDim, kHeadDimV, kMask, kFeatures, kBlockQ, kBlockKv, kStages>>
// Grid: clusters of block_kv / 64 blocks; with tiles as in BackwardParams,
//   a mask or a block map  tiles clusters: in index order as multiprocessors become free
//   otherwise              min(tiles, as many clusters as multiprocessors hold)
// Params: BackwardParams, with k and v in boxes of 64 rows, without dq_acc and dq_order, and with a
// turn_group of 1: all key blocks start at the same queries, which they then find in L2.
constexpr int backward_wide_cluster(const BackwardConfig& config) {
  return static_cast<int>(config.block_kv / 64);
}
constexpr int backward_wide_threads() { return 3 * kWarpgroupThreads; }
// k and v, stages of q and dout with their lse and delta, and p.
constexpr int backward_wide_shared_bytes(long head_dim, long head_dim_v,
                                         const BackwardConfig& config) {
  const long row = 2 * (head_dim + head_dim_v);
  return static_cast<int>(64 * row + config.stages * config.block_q * (row + 2 * 4) +
                          2 * 64 * config.block_q) +
         kSharedSlack;
}

// Kernel: "kernels/attention/backward_wide_dq.cuh"
//   tk::attention::backward_wide_dq<tk::attention::BackwardWideDqTraits<
//       T, kHeadDim, kHeadDimV, kMask, kFeatures, kBlockKv, kStages>>
// Grid: min(multiprocessors, tiles) blocks, where tiles = ceil(T / kWideDqBlockQ) * H * B.
struct BackwardWideDqParams {
  // As in BackwardParams.
  TensorMap q, dout, dq;  // rows = 64
  TensorMap k, v;         // rows = dq_block_kv
  const float* delta;
  const float* scaled_lse;
  int batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads;
  int first_offset, last_offset;
  int padded_q;
  float scale;
  Extras extras;
};
constexpr int kWideDqBlockQ = 128;
constexpr int backward_wide_dq_threads() { return 3 * kWarpgroupThreads; }
// q and dout, and stages of k and v.
constexpr int backward_wide_dq_shared_bytes(long head_dim, long head_dim_v,
                                            const BackwardConfig& config) {
  return static_cast<int>(2 * (head_dim + head_dim_v) *
                          (kWideDqBlockQ + config.dq_stages * config.dq_block_kv)) +
         kSharedSlack;
}

}  // namespace tk::attention
