// What host and device agree on for linear attention and the state-space dual: launch parameters
// and budgets.
//
// Plain C++: included by the FFI handlers and by the kernels.
//
//   S[t] = exp(g[t]) S[t - 1] + w[t] v[t] k[t]^T        a state of V x K numbers for each head
//   out[t] = scale S[t] q[t] + skip * v[t]
//
// in chunks of kChunk tokens (Yang et al., "Gated Linear Attention Transformers", 2023, section 3;
// Dao and Gu, "Transformers are SSMs", 2024, section 6). What is independent of its neighbours is
// what XLA can put between: each kernel is a target of its own, and arrays between them are XLA's.
//
//   chunk_sums       running sums of g within each chunk, in base 2, with tokens last
//   segment_sums     what segments add to S, or backwards to dS, and what they leave of it
//   segment_starts   from those, S or dS where each segment starts
//   states           S at the starts of pairs of chunks, or dS at their ends
//   outputs          out, and S at the ends of segments
//   spread           numbers that are none, into the states or out of all later segments
//   gradients        dq, dk, dv and what dg and dw are made of, chunk by chunk
//   gate_gradients   dg
//
// For steps of state-space models, w = dt and g = A dt, three stand for chunk_sums and
// gate_gradients:
//
//   step_gates       w and the running sums of g, from raw steps
//   step_gradients   the gradient of raw steps, and what those of A, dt's bias and skip are made of
//   head_sums        those
//
// Shapes: q, k [B, T, G, K]; v, out [B, T, H, V], G dividing H; gates float [B, H, padded] where
// padded is T rounded up to whole chunks. Values are taken in slices of 64 columns. A segment is a
// run of chunks: sequences are cut into segments that run side by side where there are few heads.
#pragma once

#include "tk/tensor_map.h"

namespace tk::linear_attention {

constexpr int kChunk = 64;  // tokens
constexpr int kSlice = 64;  // columns of v and out that one consumer has
// Chunks that share a stored state: half the bytes for one more product in every second chunk.
constexpr int kPair = 2;
constexpr int kSharedSlack = 2048;
constexpr int kMaxKeyDim = 256;

// What a call has beside q, k, v and sums.
enum Feature : unsigned {
  kWeights = 1,  // w
  kCounts = 2,   // packed documents: counts
  kSkip = 4,     // skip
};
constexpr unsigned kAllFeatures = 7;

// The dimension of tiles: K rounded up to whole panels.
constexpr long tile_dim(long dim) { return (dim + 63) / 64 * 64; }
constexpr long padded_tokens(long seqlen) { return (seqlen + kChunk - 1) / kChunk * kChunk; }

// Arrays of all tokens: every pointer but sums may be null.
struct Gates {
  const float* sums;     // [B, H, padded]: of g over the tokens of the chunk so far, in base 2
  const float* weights;  // [B, H, padded]: w
  const float* counts;   // [B, padded]: documents that have started in the chunk so far
};

// -- chunk_sums -----------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/chunk_sums.cuh"
//   tk::linear_attention::chunk_sums
// Grid: chunks, ceil(H / 16), B blocks of 128 threads.
// sums[b, h, t] = scale * (x[b, s, h] + ... + x[b, t, h]), s being the start of the chunk, where an
// x below `least` counts as that, and as 0 beyond T.
struct ChunkSumsParams {
  const float* x;
  float* sums;  // [B, H, padded]
  int batch, seqlen, num_heads;
  // Of x, in elements: 0 along axes that it does not have.
  long x_batch_stride, x_token_stride, x_head_stride;
  float scale, least;
};
constexpr int kGateThreads = 128;
constexpr int kHeadsOfBlock = 16;
// Of all kernels of gates: up to six numbers of each head that four warps found.
constexpr int kGateSharedBytes = 6 * 4 * kHeadsOfBlock * 4 + kSharedSlack;
// Blocks on a multiprocessor, and with them warps to hide what memory takes.
constexpr int kGateBlocks = 8;

// -- step_gates -----------------------------------------------------------------------------------
// What steps are made of: steps.cuh says how.
struct Steps {
  const void* raw;                   // [B, T, H]
  const float* rates;                // [H] or [B, H]
  const float* biases;               // the same, or null
  long rates_stride, biases_stride;  // from one of the batch to the next; 0 if all share them
  bool softplus;
  float least, most;
  float least_log_decay;
};

// Kernel: "kernels/linear_attention/step_gates.cuh"
//   tk::linear_attention::step_gates<T>
// Grid and threads: as chunk_sums.
struct StepGatesParams {
  Steps steps;
  const float* skip;    // [H], or null
  float* sums;          // [B, H, padded]: as chunk_sums', of rates times steps, in base 2
  float* weights;       // [B, H, padded]: steps, 0 beyond T
  float* skip_columns;  // [H, columns] where there is skip
  int batch, seqlen, num_heads, columns;
};

// -- states ---------------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/states.cuh"
//   tk::linear_attention::states<tk::linear_attention::StatesTraits<T, kKeyDim, kReverse,
//   kFeatures,
//                                                                   kConsumers, kStages>>
// Grid: H * slices / consumers, segments, B.
// Forward: from each segment's start state on, through its chunks, with keys k and values v.
// Reverse: from each segment's end on, back through its chunks: the gradient of the state, with
// keys q and values dout. Features: kWeights (forward only) and kCounts.
struct StatesParams {
  TensorMap keys;    // [B, T, G, K]: dimensions (K, T, G, B), box (64, 64, 1, 1)
  TensorMap values;  // [B, T, H, V]: the same
  // [rows, K] where rows are (b, run, h, v): at the start of each run of stored_every chunks
  // (reverse: at its end), in the type of the inputs; dimensions (K, B * runs * H * 64 * slices),
  // box (64, 64).
  TensorMap stored;
  int stored_every;
  Gates gates;
  // [B, H, segments, V, K] at the starts, or null for zeros; reverse: at the ends, the last segment
  // first, as the gradient goes.
  const float* from;
  float* to;     // the same at the ends (reverse: starts), or null
  float* marks;  // [B, H, segments, 4 * slices], or null: Ends says what they are
  int seqlen, num_heads, num_groups, key_dim, value_dim;
  int chunks, chunks_of_segment;
  float scale;  // of the keys (reverse)
};
// Which of the stored matrices of 64 rows is a slice's. Heads lie next to each other: they walk
// side by side, and who reads them takes one head of a run after another.
template <typename Int>
constexpr Int stored_matrix(Int batch, Int run, Int runs, Int head, Int heads, Int slice,
                            Int slices) {
  return ((batch * runs + run) * heads + head) * slices + slice;
}
// Of several segments, `to` holds the end of the last one, and wherever 16 rows of another end are
// not all finite, those rows; which marks say by 1, else by 0. Both are in the order of `from`.
constexpr int kMarkedRows = 16;

// -- segment_sums ---------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/segment_sums.cuh"
//   tk::linear_attention::segment_sums<tk::linear_attention::StatesTraits<
//       T, kKeyDim, kReverse, kFeatures, kConsumers, kStages>>
// Grid: H * slices / consumers, segments - left_out, B.
// Forward: of segments, from keys k and values v; the last may be left out. Reverse: from keys q
// and values dout; the first may be. Features: as states.
struct SegmentSumsParams {
  TensorMap keys, values;  // as StatesParams'
  Gates gates;
  float* to;     // [B, H, segments - left_out, V, K]; reverse: the last segment first
  float* kept;   // [B, H, segments - left_out]: of the state before, what is left after
  int left_out;  // 0 or 1
  int seqlen, num_heads, num_groups, key_dim, value_dim;
  int chunks, chunks_of_segment;
  float scale;  // of the keys (reverse)
};

// -- segment_starts -------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/segment_starts.cuh"
//   tk::linear_attention::segment_starts
// Grid: B * H, ceil(size / kStartsElements) blocks of kStartsThreads threads.
struct SegmentStartsParams {
  const float* first;  // [B, H, size], or null for zeros
  const float* kept;   // [B, H, segments - 1]
  const float* added;  // [B, H, segments - 1, size]
  float* starts;       // [B, H, segments, size]
  int segments, size;  // size: V * K, of which kStartsColumns are a row
};
constexpr int kStartsThreads = 128;
constexpr int kStartsColumns = 64;  // V and K are multiples of 8
constexpr int kStartsElements = 16 * 64;
constexpr int kStartsSharedBytes = kSharedSlack;

// -- spread ---------------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/spread.cuh"
//   tk::linear_attention::spread<tk::linear_attention::SpreadTraits<T, kOfStates>>
// Grid: H * slices, segments - 1, B blocks of kSpreadThreads threads.
struct SpreadParams {
  const float* marks;  // as StatesParams'
  float* ends;         // as its `to`
  void* results;       // out, [B, T, H, V]; or states as they are stored, of reverse or not
  bool reverse;
  int seqlen, num_heads, key_dim, value_dim;
  int chunks, chunks_of_segment, stored_every;
};
constexpr int kSpreadThreads = 128;
constexpr int kSpreadSharedBytes = 4 * kMarkedRows * 4 + kSharedSlack;

// -- outputs --------------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/outputs.cuh"
//   tk::linear_attention::outputs<tk::linear_attention::OutputsTraits<T, kKeyDim, kFeatures,
//                                                                     kStages>>
// and with a helper, up to 128 dimensions of keys, the same of "helped_outputs.cuh":
//   tk::linear_attention::helped_outputs<tk::linear_attention::HelpedOutputsTraits<.., kSlices>>
// Grid: H * slices / consumers, segments, B.
struct OutputsParams {
  TensorMap q, k;    // (K, T, G, B), box (64, 64, 1, 1)
  TensorMap v, out;  // (V, T, H, B), the same
  Gates gates;
  const float* skip;  // [H, 64 * slices], 0 beyond V; or null
  const float* from;  // [B, H, segments, V, K], or null for zeros
  float* to;          // the same, or null
  float* marks;       // both as StatesParams'
  int seqlen, num_heads, num_groups, key_dim, value_dim;
  int chunks, chunks_of_segment;
  float scale;
};

// They walk with one consumer warpgroup for each of `consumers` slices that share keys: there must
// be a multiple of that many slices in a group. One consumer leaves room for two blocks. Outputs
// may have a helper, a warpgroup that makes their scores, and those of two slices do.
struct WalkConfig {
  long consumers;  // 1 or 2
  long stages;     // of the ring of chunks
  long helpers;    // 1 or 0
};
constexpr int walk_threads(const WalkConfig& config) {
  return static_cast<int>(128 * (1 + config.consumers + config.helpers));
}
constexpr long kHelpedKeyDim = 128;  // the largest that a helper leaves registers for
// Blocks that share a multiprocessor.
constexpr int walk_blocks(long key_dim, long consumers, long helpers = 0) {
  return consumers == 1 && helpers == 0 && key_dim <= 128 ? 2 : 1;
}
constexpr int kGateBytes = 3 * kChunk * 4;  // of a chunk and a consumer
// Tiles of weights and of out on its way: two of each spare a barrier, where they fit.
constexpr long outputs_tiles(long key_dim) { return key_dim <= 64 ? 2 : 1; }
constexpr int states_shared_bytes(long key_dim, const WalkConfig& c) {
  return static_cast<int>(2 * kChunk * (c.stages * (key_dim + c.consumers * kSlice)) +
                          c.consumers * (2 * kSlice * key_dim + c.stages * kGateBytes)) +
         kSharedSlack;
}
constexpr int segment_sums_shared_bytes(long key_dim, const WalkConfig& c) {
  return static_cast<int>(2 * kChunk * c.stages * (key_dim + c.consumers * kSlice) +
                          c.consumers * c.stages * kGateBytes) +
         kSharedSlack;
}
// One slice or two, and what a helper hands over.
constexpr int helped_outputs_shared_bytes(long key_dim, long stages, long slices) {
  return static_cast<int>(2 * kChunk * stages * (2 * key_dim + slices * kSlice) +
                          slices * (2 * 2 * kChunk * (kSlice + kChunk) + 4 * 4 * kChunk +
                                    stages * kGateBytes + 4 * kSlice)) +
         kSharedSlack;
}
constexpr int outputs_shared_bytes(long key_dim, long stages) {
  return static_cast<int>(2 * kChunk * stages * (2 * key_dim + kSlice) +
                          outputs_tiles(key_dim) * 2 * kChunk * (kSlice + kChunk) +
                          stages * kGateBytes + 4 * kSlice) +
         kSharedSlack;
}

// -- gradients ------------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/gradients.cuh"
//   tk::linear_attention::gradients<tk::linear_attention::GradientsTraits<T, kKeyDim, kFeatures,
//                                                                         kStages, kKeyStages>>
// Grid: as many blocks as shall walk. Each walks every so many of all places: B * G * chunks, times
// parts, which cut the columns of dq and dk; of each the heads of the group, and the slices of
// their values.
struct GradientsParams {
  TensorMap q, k;             // (K, T, G, B), box (64, 64, 1, 1)
  TensorMap v, dout;          // (V, T, H, B), the same
  TensorMap dq, dk;           // as q
  TensorMap dv;               // as v
  TensorMap states, dstates;  // as StatesParams' stored, of pairs
  Gates gates;
  const float* skip;  // [H, 64 * slices], or null
  // Parts of the gradients of gates, [B, H, padded]: gate_gradients.cuh says what they are.
  float* as_query;
  float* as_key;
  float* to_state;
  float* through;
  float* dweights;  // [B, H, padded], or null
  float* dskip;     // [B, H, chunks, 64 * slices], or null: to be summed over B and chunks
  int seqlen, num_heads, num_groups, key_dim, value_dim, chunks;
  int group_heads;  // num_heads / num_groups
  int places;
  float scale;
};
constexpr int kGradientsThreads = 3 * 128;
// Columns of dq and dk that one block has room for, and how many blocks cut a tile of K columns.
constexpr long gradients_columns(long key_dim) { return key_dim <= 128 ? key_dim : 64; }
constexpr long gradients_parts(long key_dim) { return key_dim / gradients_columns(key_dim); }
constexpr int gradients_shared_bytes(long key_dim, long stages, long key_stages) {
  // q, k and the pair's other keys; of a stage v, dout and the pair's other values, both states and
  // gates, aligned; dv on its way out.
  return static_cast<int>(2 * kChunk * 3 * key_dim * key_stages +
                          stages * (2 * kChunk * 3 * kSlice + 2 * kSlice * 2 * key_dim + 2048) +
                          2 * kChunk * kSlice) +
         kSharedSlack;
}

// -- gate_gradients -------------------------------------------------------------------------------
// Of which dg is made, [B, H, padded]: gate_gradients.cuh says how.
struct GateParts {
  const float* as_query;
  const float* as_key;
  const float* to_state;
  const float* through;
};

// Kernel: "kernels/linear_attention/gate_gradients.cuh"
//   tk::linear_attention::gate_gradients
// Grid and threads: as chunk_sums.
struct GateGradientsParams {
  GateParts parts;
  float* dgates;  // [B, T, H]
  int batch, seqlen, num_heads;
};

// -- step_gradients -------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/step_gradients.cuh"
//   tk::linear_attention::step_gradients<T>
// Grid and threads: as chunk_sums.
struct StepGradientsParams {
  Steps steps;
  GateParts parts;
  const float* dweights;  // [B, H, padded]
  const float* dskip;     // [B, H, chunks, columns], of which sums are wanted; or null
  void* draw;             // [B, T, H], as raw
  // [B, chunks, kHeadParts, H]: sums over a chunk's tokens of the gradients of the rates, of the
  // biases, and of skip where there is dskip.
  float* head_parts;
  int batch, seqlen, num_heads, columns;
};
constexpr int kHeadParts = 3;

// -- head_sums ------------------------------------------------------------------------------------
// Kernel: "kernels/linear_attention/head_sums.cuh"
//   tk::linear_attention::head_sums
// Grid: ceil(H / 16), kHeadParts, batch; threads as chunk_sums.
struct HeadSumsParams {
  const float* head_parts;  // [batch, rows, kHeadParts, H]
  float* sums[kHeadParts];  // [batch, H] each, over rows; or null
  int rows, num_heads;
};

}  // namespace tk::linear_attention
