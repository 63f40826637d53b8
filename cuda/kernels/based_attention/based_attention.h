// What host and device agree on for Based attention: launch parameters and budgets.
//
// Plain C++: included by the FFI handlers and by the kernels.
//
//   S[t] = S[t - 1] + v[t] phi(k[t])^T      a state of V x F numbers for each head
//   out[t] = S[t] phi(scale q[t])
//
// where phi are the products of degree two and below, times what makes phi(a) . phi(b) equal to
// f(a b) = 1 + ab + (ab)^2 / 2, the Taylor series of exp (Arora et al., "Simple linear attention
// language models balance the recall-throughput tradeoff", 2024, section 4.1). Their order is
// tk/product_columns.h's. Features are formed from q and k on chip, chunk by chunk.
//
//   states         S at the starts of chunks, or dS at their ends; or what segments add to them
//   outputs        out, and S at the end: where S fits into a warpgroup's registers
//   chunk_outputs  out, chunk by chunk, from S at their starts: where it does not
//   gradients      dq, dk, dv, chunk by chunk, from S at their starts and dS at their ends: there
//   walked_gradients  dq beside S, or, reverse, dk and dv beside dS: where outputs are
//
// Shapes: q, k [B, T, G, d]; v, out [B, T, H, V], G dividing H. Values are taken in slices of 64
// columns. A segment is a run of chunks; a sequence's are walked side by side. What each but the
// last adds to the state, a first pass has found; every block sums those before its own.
#pragma once

#include "tk/product_columns.h"
#include "tk/tensor_map.h"

namespace tk::based_attention {

constexpr int kChunk = 64;  // tokens
constexpr int kSlice = 64;  // columns of v and out that a block has
constexpr int kSharedSlack = 2048;

constexpr bool is_feature_dim(long dim) { return dim == 8 || dim == 16 || dim == 24 || dim == 32; }
// Columns of tiles of q and k.
constexpr int tile_columns(int dim) { return dim <= 16 ? 16 : 32; }
// States are taken in pieces of columns: in how many, and of how many each. Columns beyond the
// products' are zero.
constexpr int state_pieces(int dim) { return dim <= 16 ? 1 : dim == 24 ? 2 : 6; }
constexpr int piece_columns(int dim) {
  return (product_columns(dim) / state_pieces(dim) + 15) / 16 * 16;
}
constexpr int state_columns(int dim) { return state_pieces(dim) * piece_columns(dim); }
// Whether `outputs` offers it.
constexpr bool walks(int dim) { return state_pieces(dim) == 1; }

constexpr long padded_tokens(long seqlen) { return (seqlen + kChunk - 1) / kChunk * kChunk; }

constexpr int key_tile_bytes(int dim) { return 2 * kChunk * tile_columns(dim); }
constexpr int value_tile_bytes() { return 2 * kChunk * kSlice; }
constexpr int piece_bytes(int dim) { return 2 * 64 * piece_columns(dim); }
constexpr int kCountBytes = 4 * kChunk;

// Documents: counts [B, padded] is how many have started in the chunk so far; or null.

// -- states ---------------------------------------------------------------------------------------
// Kernel: "kernels/based_attention/states.cuh"
//   tk::based_attention::states<tk::based_attention::Traits<T, kDim, kDocuments, kStages>>
// Grid: H * slices * state_pieces, segments (one less where `adds` is given), B.
// Forward: from each segment's start on, through its chunks, with keys k and values v.
// Reverse: from each segment's end on, back through its chunks: the gradient of the state, with
// keys q and values dout.
struct StatesParams {
  TensorMap keys;    // [B, T, G, d]: dimensions (d, T, G, B), box (panel, 64, 1, 1)
  TensorMap values;  // [B, T, H, V]: (V, T, H, B), box (64, 64, 1, 1)
  // [B, H, chunks, V, F]: at the start of each chunk (reverse: at its end), in the type of the
  // inputs; dimensions (F, V, B * H * chunks), box (panel, 64, 1). If stores.
  TensorMap chunk_states;
  bool stores, reverse;
  const float* counts;
  const float* from;   // [B, H, V, F] before the first token (reverse: after the last), or null
  const float* added;  // [B, H, slices, pieces, segments - 1, 64, piece_columns]: by each, or null
  // [B, segments]: the first segment of which something is left where each starts, or -1: of `from`
  // too. Or null: of all. Segments are numbered as they are walked.
  const int* since;
  float* adds;  // as added; then segments start from zero, and nothing else is stored. Or null
  float* to;    // [B, H, V, F] after the last token (reverse: before the first), or null
  int seqlen, num_heads, num_groups, value_dim;
  int chunks, chunks_of_segment;
  ProductFactors factors;  // of the features of keys
};
constexpr int kWalkThreads = 2 * 128;
constexpr int kWalkBlocks = 2;  // that share a multiprocessor
constexpr int kLeastWalkStages = 2;
constexpr int states_shared_bytes(int dim, long stages) {
  return static_cast<int>(stages * (key_tile_bytes(dim) + value_tile_bytes() + kCountBytes)) +
         3 * piece_bytes(dim) + kSharedSlack;
}

// -- outputs --------------------------------------------------------------------------------------
// Kernel: "kernels/based_attention/outputs.cuh"
//   tk::based_attention::outputs<tk::based_attention::Traits<T, kDim, kDocuments, kStages>,
//                                kNormalize>
// Grid: H * slices, segments, B.
// Normalized, from sums at the starts of segments too (normalizer.cuh); those at their ends are
// small sums over tokens that XLA makes.
constexpr int kSums = 18 * 16;
struct OutputsParams {
  TensorMap q, k;    // (d, T, G, B), box (panel, 64, 1, 1)
  TensorMap v, out;  // (V, T, H, B), box (64, 64, 1, 1)
  const float* counts;
  const float* from;  // as StatesParams'
  const float* added;
  const int* since;
  float* to;
  const float* sums;  // [B, H, segments, 18, 16], or null for zeros
  float* divisors;    // [B, H, padded]: what outputs are divided by, where they are; or null
  int seqlen, num_heads, num_groups, value_dim;
  int chunks, chunks_of_segment;
  float scale;              // of the scores
  ProductFactors factors;   // of the features of queries
  bool factors_are_powers;  // of two: where they are not, bf16's states have them
};
constexpr int kSumsBytes = 2048;  // copies of sums, and what aligns them
constexpr int outputs_shared_bytes(int dim, long stages) {
  return static_cast<int>(stages * (2 * key_tile_bytes(dim) + value_tile_bytes() + kCountBytes)) +
         3 * piece_bytes(dim) + value_tile_bytes() + kSumsBytes + kSharedSlack;
}

// -- chunk_outputs --------------------------------------------------------------------------------
// Kernel: "kernels/based_attention/chunk_outputs.cuh"
//   tk::based_attention::chunk_outputs<tk::based_attention::Traits<T, kDim, kDocuments, kStages>>
// Grid: chunks, G, B. A block walks the heads of its group, and of each the slices of its values.
struct ChunkOutputsParams {
  TensorMap q, k, v, out;  // as OutputsParams'
  TensorMap states;        // as StatesParams' chunk_states
  const float* counts;
  int seqlen, num_heads, num_groups, value_dim, chunks;
  float scale;
  ProductFactors factors;
};
constexpr int chunk_outputs_shared_bytes(int dim, long stages) {
  return static_cast<int>(stages * (value_tile_bytes() + state_pieces(dim) * piece_bytes(dim))) +
         2 * key_tile_bytes(dim) + value_tile_bytes() + kCountBytes + kSharedSlack;
}
constexpr int kChunkOutputsThreads = 2 * 128;

// -- walked_gradients -----------------------------------------------------------------------------
// Kernel: "kernels/based_attention/walked_gradients.cuh"
//   tk::based_attention::walked_gradients<
//       tk::based_attention::Traits<T, kDim, kDocuments, kStages>, kReverse, kNormalize>
// Grid: H * slices, segments, B.
// Normalized, dout is the gradient of what is divided.
struct WalkedGradientsParams {
  TensorMap q, k, v, dout;  // as OutputsParams'
  TensorMap dv;             // as v; in reverse
  // dq, or in reverse dk: as q where a group has one head of one slice, else in parts, of every
  // slice of every head: fp32 [B, T, H, slices, d].
  void* dkeys;
  bool in_parts;
  TensorMap dkeys_map;  // as q, where it is not in parts
  const float* counts;
  const float* from;  // as StatesParams'
  const float* added;
  const int* since;
  float* to;
  const float* changes;  // [B, H, slices, padded]: gradients of the divisors, in the first slice
  const float* sums;     // as OutputsParams'; in reverse, normalizer_gradients.cuh's; or null
  int seqlen, num_heads, num_groups, value_dim;
  int chunks, chunks_of_segment;
  float scale;
  ProductFactors factors;   // of the features of queries
  bool factors_are_powers;  // of two
};
constexpr int walked_gradients_shared_bytes(int dim, long stages) {
  return static_cast<int>(stages *
                          (2 * key_tile_bytes(dim) + 2 * value_tile_bytes() + 2 * kCountBytes)) +
         3 * piece_bytes(dim) + key_tile_bytes(dim) + value_tile_bytes() + kSharedSlack;
}

// -- gradients ------------------------------------------------------------------------------------
// Kernel: "kernels/based_attention/gradients.cuh"
//   tk::based_attention::gradients<tk::based_attention::Traits<T, kDim, kDocuments, kStages>>
// Grid: as many blocks as there are multiprocessors, or fewer. A tile is a chunk of a group; a
// block walks the heads of the group, and of each the slices of its values, then those of its next
// tile.
struct GradientsParams {
  TensorMap q, k;             // (d, T, G, B), box (panel, 64, 1, 1)
  TensorMap v, dout;          // (V, T, H, B), box (64, 64, 1, 1)
  TensorMap dq, dk;           // as q
  TensorMap dv;               // as v
  TensorMap states, dstates;  // as StatesParams' chunk_states
  const float* counts;
  int seqlen, num_heads, num_groups, value_dim, chunks;
  int tiles;  // chunks * G * B
  float scale;
  ProductFactors factors;
};
constexpr int kGradientsThreads = 3 * 128;
constexpr int gradients_shared_bytes(int dim, long stages) {
  return static_cast<int>(stages *
                          (2 * value_tile_bytes() + 2 * state_pieces(dim) * piece_bytes(dim) +
                           2 * key_tile_bytes(dim) + kCountBytes)) +
         2 * key_tile_bytes(dim) + value_tile_bytes() + kSharedSlack;
}

}  // namespace tk::based_attention
