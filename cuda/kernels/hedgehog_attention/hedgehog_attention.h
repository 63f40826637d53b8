// What host and device agree on for Hedgehog attention: launch parameters and budgets.
//
// Plain C++: included by the FFI handlers and by the kernels.
//
//   phi(x) = [softmax(x W), softmax(-x W)]
//   near: the keys up to a query's own in its chunk and in the one before; far: all before them
//   m = max over near of scale q k
//   p = beta exp(scale q k - m) for near keys, alpha phi(q) phi(k) for far ones
//   out = sum p v / sum p
//
// (Zhang et al., "The Hedgehog & the Porcupine", 2024; "LoLCATs", 2024, section 3.2; the terraced
// window of Spector et al., "ThunderKittens", 2024.) Windows are chunks of kChunk tokens.
//
//   sums             sums of phi(k) v^T and of phi(k) over a run of chunks, a segment
//   outputs          out
//   queries          dq, and what depends on queries alone
//   keys             dk, dv
//   document_states  the sums before each tile or chunk, and their gradients
//   step             one token: the latest two windows, in place, and its out
//
// Packed documents. Windows begin wherever a document does, so chunks of the sequence are no longer
// windows. In their place are tiles: a tile is as many whole windows, in order, as have at most
// kChunk tokens. A document's windows but its last have kChunk tokens and so are tiles by
// themselves: what a tile's first window has before it is all of the tile before, near, and what
// is older, far; the other windows of a tile are documents of their own, and see nothing else. Any
// two tiles in a row have more than kChunk tokens, or they were one. A far tile is one whose first
// window is at least the third of its document: the tile before is full, so of far tiles and of
// those that they see from afar at most one begins in each chunk of kChunk tokens of the sequence,
// and states of tiles are kept by the chunk that a tile begins in.
//
// Shapes: q, out [B, T, H, D or V]; k, v [B, T, K, ..], K dividing H; maps [H or K, D, kMap];
// states [.., V, kFeatures], tokens of vectors [.., padded] where padded is T rounded up to whole
// chunks.
#pragma once

#include "tk/tensor_map.h"

namespace tk::hedgehog_attention {

constexpr int kChunk = 64;           // tokens of a chunk and of a window
constexpr int kMap = 64;             // columns of a map
constexpr int kFeatures = 2 * kMap;  // of a token
constexpr int kSlice = 64;           // columns of v and out that one consumer has
constexpr long kMaxDim = 128;        // of q, k, v
constexpr int kSharedSlack = 2048;

// The dimension of tiles.
constexpr long tile_dim(long dim) { return (dim + 63) / 64 * 64; }
constexpr long slices(long value_dim) { return tile_dim(value_dim) / kSlice; }
constexpr long padded_tokens(long seqlen) { return (seqlen + kChunk - 1) / kChunk * kChunk; }
constexpr long larger(long a, long b) { return a > b ? a : b; }

// Tiles of a sequence of so many tokens, at most.
constexpr long most_tiles(long seqlen) { return 2 * (seqlen / (kChunk + 1)) + 1; }

// Bits of a tile's flags.
enum TileFlag : int {
  kFarTile = 1,   // its first window sees keys from afar
  kOneWindow = 2  // it has no other one, and kChunk tokens
};
constexpr int kTileNumbers = 4;  // first token, tokens, rows that continue the tile before, flags

// Which tiles there are, and which of them blocks have: all tiles of a batch element are dealt out
// in `shares` of equal size. Pointers are null where documents are not packed.
struct Documents {
  const int* tiles;      // [B, most + 2, kTileNumbers], and zeros beyond the last
  const int* counts;     // [B]: of tiles
  const float* windows;  // [B, most * kChunk]: the row that each row's window begins at; -1 beyond
  int most;              // tiles
  int shares, shares_of_segment;
};
// An array [B, T, heads, dim] as threads write it: rows of tiles that are not full.
struct TokenRows {
  void* data;
  int heads, dim;
};

// -- sums -----------------------------------------------------------------------------------------
// Kernel: "kernels/hedgehog_attention/sums.cuh"
//   tk::hedgehog_attention::sums<tk::hedgehog_attention::SumsTraits<T, kKeyDim, kConsumers>>
// Grid: K, segments, B. What each of the first segments adds for those after it: chunks from the
// one before its first to the last but one of it.
struct SumsParams {
  TensorMap k;        // [B, T, K, D]: dimensions (D, T, K, B), box (64, 64, 1, 1)
  TensorMap v;        // [B, T, K, V]: the same
  TensorMap k_map;    // [K, D, kMap]: dimensions (kMap, D, K), box (64, kKeyDim, 1)
  const int* first;   // [B]: the first token that is one; or null where all are
  float* sums;        // [B, K, segments, V, kFeatures]
  float* normalizer;  // [B, K, segments, kFeatures]
  int seqlen, num_kv_heads, value_dim;
  int chunks, chunks_of_segment, segments;
};

// -- outputs --------------------------------------------------------------------------------------
// Kernel: "kernels/hedgehog_attention/outputs.cuh"
//   tk::hedgehog_attention::outputs<tk::hedgehog_attention::OutputsTraits<T, kKeyDim, kConsumers,
//                                                                         kDocuments>>
// and of 128 columns of values, of sequences that are not packed, the same of "paired_outputs.cuh":
//   tk::hedgehog_attention::paired_outputs<tk::hedgehog_attention::PairedOutputsTraits<T, kKeyDim>>
// Grid: H, segments, B.
struct OutputsParams {
  TensorMap q;             // [B, T, H, D]: dimensions (D, T, H, B), box (64, 64, 1, 1)
  TensorMap k, v;          // [B, T, K, ..]: the same
  TensorMap out;           // [B, T, H, V]: the same
  TensorMap q_map, k_map;  // [H or K, D, kMap]: dimensions (kMap, D, H or K), box (64, kKeyDim, 1)
  const int* first;        // [B]: the first token that is one; or null where all are
  const float* alpha;      // [H]
  const float* beta;       // [H]
  // What precedes the chunk before each segment's first: of packed documents a state for each
  // segment; otherwise the sum of the first states, start_states and states_of_segment for each
  // segment before.
  const float* sums;        // [B, K, states, V, kFeatures], or null for zeros
  const float* normalizer;  // [B, K, states, kFeatures], or null for zeros
  int states, start_states, states_of_segment;
  int seqlen, num_heads, num_kv_heads, value_dim;
  int chunks, chunks_of_segment;
  float scale;
  Documents documents;  // whose segments are shares_of_segment shares of tiles
  TokenRows out_rows;
};

// Both have a consumer for each slice of values.
constexpr int walk_threads(long consumers) { return static_cast<int>(128 * (1 + consumers)); }
constexpr int kKeyStages = 3;       // of the ring of k and v: two are in use
constexpr int kQueryStages = 2;     // of q, whose place out takes
constexpr int kStateStages = 3;     // of the ring of keys and values
constexpr int kWindowBytes = 1024;  // Documents' windows, at most
constexpr int kNormalizerBytes = (4 + 1) * kFeatures * 4;
constexpr int sums_shared_bytes(long key_dim, long consumers) {
  return static_cast<int>(2 *
                          (key_dim * kMap + kKeyStages * kChunk * (key_dim + consumers * kSlice) +
                           2 * kChunk * kFeatures)) +
         kNormalizerBytes + kSharedSlack;
}
constexpr int outputs_shared_bytes(long key_dim, long consumers, bool documents) {
  return static_cast<int>(2 * (2 * key_dim * kMap +
                               kQueryStages * kChunk * larger(key_dim, consumers * kSlice) +
                               kKeyStages * kChunk * (key_dim + consumers * kSlice) +
                               kChunk * kFeatures + consumers * kSlice * kFeatures)) +
         kNormalizerBytes + 4 * kChunk * 4 + (documents ? kWindowBytes : 0) + kSharedSlack;
}
constexpr int kPairedOutputsThreads = 128 * 4;  // two consumers have a slice each, a third helps
constexpr int paired_outputs_shared_bytes(long key_dim) {
  return static_cast<int>(2 * (2 * key_dim * kMap + kQueryStages * kChunk * key_dim +
                               kKeyStages * kChunk * (key_dim + 2 * kSlice) +
                               2 * kChunk * kFeatures + 2 * kChunk * kChunk)) +
         2 * 16 * kFeatures * 2 + (2 * 4 + 2) * kFeatures * 4 + kChunk * 4 + kSharedSlack;
}

// -- queries --------------------------------------------------------------------------------------
// Kernel: "kernels/hedgehog_attention/queries.cuh"
//   tk::hedgehog_attention::queries<tk::hedgehog_attention::GradientsTraits<T, kKeyDim, kValueDim,
//                                                                           kDocuments>>
// Grid: chunks, H, B. Of packed documents: tiles at most, H, B, and padded is kChunk for each tile.
struct QueriesParams {
  TensorMap q, dq;     // as OutputsParams
  TensorMap k, v;      // as OutputsParams
  TensorMap dout;      // as OutputsParams' out
  TensorMap q_map;     // as OutputsParams
  TensorMap states;    // [rows, kFeatures] where rows are (b, kv head, chunk, v): S as each chunk's
                       // queries see it; dimensions (kFeatures, B * K * chunks * slices * 64), box
                       // (64, 64)
  TensorMap features;  // [B, T, H, kFeatures]: alpha phi(q) / Z; as q
  TensorMap dscores;   // [B, T, H, kMap]: the gradient of q W; as q
  const int* first;    // [B], or null
  const float* alpha;  // [H]
  const float* beta;   // [H]
  const float* normalizers;  // [B, K, chunks, kFeatures]: z, as states
  float* divisors;           // [B, H, padded]: Z
  float* delta;              // [B, H, padded]: dout out
  float* largest;            // [B, H, padded]: m / ln 2
  float* peaks;              // [B, H, padded]: the gradient of m, over how many keys have it
  float* dbeta;              // [B, H, padded]: to be summed over tokens
  float* dalpha;             // [B, H, padded]: the same
  int seqlen, num_heads, num_kv_heads, value_dim, chunks;
  float scale;
  Documents documents;
  TokenRows dq_rows, features_rows, dscores_rows;
};

// -- keys -----------------------------------------------------------------------------------------
// Kernel: "kernels/hedgehog_attention/keys.cuh"
//   tk::hedgehog_attention::keys<tk::hedgehog_attention::GradientsTraits<T, kKeyDim, kValueDim,
//                                                                        kDocuments>>
// Grid: chunks, K, B (of packed documents: tiles at most, K, B). A block walks the query heads that
// share its keys.
struct KeysParams {
  TensorMap q;                // as OutputsParams
  TensorMap k, v;             // as OutputsParams
  TensorMap dk, dv;           // as k, v
  TensorMap dout;             // as OutputsParams' out
  TensorMap k_map;            // as OutputsParams
  TensorMap dstates;          // as QueriesParams' states: of S with each chunk's keys
  TensorMap dscores;          // [B, T, K, kMap]: the gradient of k W; as k
  const int* first;           // [B], or null
  const float* beta;          // [H]
  const float* dnormalizers;  // [B, K, chunks, kFeatures]: of z, as dstates
  const float* divisors;      // [B, H, padded]
  const float* delta;         // [B, H, padded]
  const float* largest;       // [B, H, padded]
  const float* peaks;         // [B, H, padded]
  int seqlen, num_heads, num_kv_heads, value_dim, chunks;
  float scale;
  Documents documents;
  TokenRows dk_rows, dv_rows, dscores_rows;
};
constexpr int kQueriesThreads = 2 * 128;
constexpr int kKeysThreads = 3 * 128;
constexpr int kTokenStages = 2;  // of the ring of q and dout
constexpr int queries_shared_bytes(long key_dim, long value_dim, bool documents) {
  return static_cast<int>(2 * (kChunk * (3 * key_dim + 3 * value_dim + kFeatures + kMap) +
                               key_dim * kMap + value_dim * kFeatures)) +
         (2 * kChunk * kMap + kFeatures) * 4 + (documents ? kWindowBytes : 0) + kSharedSlack;
}
constexpr int keys_shared_bytes(long key_dim, long value_dim, bool documents) {
  return static_cast<int>(2 * (kChunk * ((2 + kTokenStages) * (key_dim + value_dim) + 2 * kChunk) +
                               key_dim * kMap + value_dim * kFeatures)) +
         (kFeatures + kTokenStages * 4 * kChunk) * 4 + (documents ? kWindowBytes : 0) +
         kSharedSlack;
}

// -- document_states ------------------------------------------------------------------------------
// Kernel: "kernels/hedgehog_attention/document_states.cuh"
//   tk::hedgehog_attention::document_states<tk::hedgehog_attention::DocumentStatesTraits<T,
//   kKeyDim,
//                                                                         kConsumers, kReverse>>
// Grid: K (reverse: H), shares of tiles or the first of them, B.
// Chunks of sequences that are not packed are tiles too, all of them far: keys that are not there
// have no features.
// Forward: S and z before each far tile, from k and v; a share has the tiles after its first one to
// the first of the next share, as outputs.cuh takes them up there. Reverse: the gradients of both
// after the tile that a far tile comes two tiles after, from alpha phi(q) / Z, dout and delta.
struct DocumentStatesParams {
  TensorMap keys;                // forward: k; reverse: QueriesParams' features
  TensorMap values;              // forward: v; reverse: dout
  TensorMap k_map;               // as SumsParams; forward only
  TensorMap stored;              // as QueriesParams' states, where `normalizers` is given
  float* normalizers;            // [B, K or H, chunks, kFeatures], or null
  const int* first;              // [B], or null
  const float* delta;            // [B, H, tiles * kChunk]; reverse only
  const float* from;             // [B, K or H, shares, V, kFeatures], or null for zeros
  const float* from_normalizer;  // [B, K or H, shares, kFeatures], or null for zeros
  float* to;                     // as `from`, or null
  float* to_normalizer;          // as `from_normalizer`, or null
  int num_heads, value_dim;      // of keys and values here
  int chunks;
  int states;  // along the axis of shares in `from` and `to`
  Documents documents;
};
constexpr int document_states_shared_bytes(long key_dim, long consumers, bool reverse) {
  const long keys = reverse ? kFeatures : key_dim;
  return static_cast<int>(2 * (kStateStages * kChunk * (keys + consumers * kSlice) +
                               (reverse ? 0 : key_dim * kMap + kChunk * kFeatures) +
                               consumers * kSlice * kFeatures)) +
         kNormalizerBytes + kStateStages * kChunk * 4 + kSharedSlack;
}

// -- step -----------------------------------------------------------------------------------------
// Kernel: "kernels/hedgehog_attention/step.cuh"
//   tk::hedgehog_attention::step<tk::hedgehog_attention::StepTraits<T, kKeyDim, kValueDim>>
// Grid: K, 1, B.
struct StepParams {
  TensorMap keys, values;  // [B, 2 kChunk, K, ..], before and after: as OutputsParams' k, v
  TensorMap q_map, k_map;  // as OutputsParams
  const void* old_keys;    // where `keys` begins
  const void* old_values;
  const void* query;        // [B, H, D]
  const void* token_key;    // [B, K, D]
  const void* token_value;  // [B, K, V]
  const float* alpha;       // [H]
  const float* beta;        // [H]
  const int* length;        // [B]: of the sequence before the token
  // What the sums' step takes: as its queries, keys, values and decays, and what the windows add.
  float* features;      // [B, H, kFeatures]: alpha phi(q)
  float* key_features;  // [B, K, kFeatures]: of the key that leaves the windows; or zeros
  void* value;          // [B, K, V]: its value; or zeros
  float* decays;        // [B, K]: 0 where nothing has left them before
  float* numerators;    // [B, H, V]: of weights times values
  float* divisors;      // [B, H]: of weights
  int num_heads, num_kv_heads, key_dim, value_dim;
  float scale;
};
constexpr int kStepThreads = 256;  // a warpgroup for each window
constexpr int kStepBlocks = 2;     // that share a multiprocessor
constexpr int step_shared_bytes(long key_dim, long value_dim) {
  return static_cast<int>(2 * (2 * kChunk * (key_dim + value_dim) + 2 * key_dim * kMap) +
                          4 * (3 * key_dim + value_dim + kFeatures + 8 * value_dim) +
                          2 * 2 * kChunk * 4) +
         kSharedSlack;
}

}  // namespace tk::hedgehog_attention
