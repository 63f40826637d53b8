// What gradients.cuh has in shared memory, and how it comes there and leaves.
#pragma once

#include "kernels/linear_attention/gates.cuh"
#include "tk/tk.cuh"

namespace tk::linear_attention {

template <typename T_, int kKeyDim_, unsigned kFeatures_, int kStages_, int kKeyStages_>
struct GradientsTraits {
  using T = T_;
  static constexpr int kKeyDim = kKeyDim_;
  static constexpr unsigned kFeatures = kFeatures_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeyStages = kKeyStages_;
};

template <typename Traits>
struct GradientsCopies {
  using T = typename Traits::T;
  static constexpr int kKeyDim = Traits::kKeyDim;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kConsumers = 2;
  // Whether a warp that has time for it finds the factors of the pair's other values. With
  // documents consumer 0 asks for tokens of which nothing is left, whatever is in them, and one
  // warp more that runs through code of its own was no help.
  static constexpr bool kFactorsAhead = (kFeatures & kCounts) == 0;
  static constexpr int kStorers = kFactorsAhead ? 2 : 3;  // of dv; of dq and dk, together or apart
  static constexpr int kColumns = gradients_columns(kKeyDim), kParts = gradients_parts(kKeyDim);

  using KeyTile = SharedTile<T, kChunk, kKeyDim>;
  using ValueTile = SharedTile<T, kChunk, kSlice>;
  using StateTile = SharedTile<T, kSlice, kKeyDim>;
  using Gates = ChunkGates<kFeatures>;
  using Keys = Pipeline<Traits::kKeyStages>;
  using Ring = Pipeline<Traits::kStages>;
  using DvRing = StorePipeline<1>;

  struct Step {
    ValueTile v_smem, dout_smem;
    StateTile state_smem, dstate_smem;
    ValueTile
        other_smem;  // of the pair's other chunk: v where it is before, dout where it is after
    Gates gates, other_gates;
    TokenVec factors;               // with kFactorsAhead: of the other chunk's values
    SharedVec<float, kSlice> skip;  // with kSkip
  };
  struct KeyTiles {
    KeyTile q_smem, k_smem;
    KeyTile other_smem;  // of the pair's other chunk: k where it is before, q where it is after

    // On its way from one consumer to the other, when nobody needs the other chunk's keys any more.
    __device__ __forceinline__ auto m_smem() const { return other_smem.template cols<64>(0); }
    // On their way out, when nobody needs what is there: k, and q.
    __device__ __forceinline__ auto dq_smem() const { return k_smem.template cols<kColumns>(0); }
    __device__ __forceinline__ auto dk_smem() const { return q_smem.template cols<kColumns>(0); }
  };
  struct Shared {
    KeyTiles key_tiles[Traits::kKeyStages];
    Step steps[Traits::kStages];
    ValueTile dv_smem;
    Keys keys;
    Ring ring;
    DvRing dv_ring;
    Barrier gates_full[Traits::kStages];    // with kFactorsAhead: of the other chunk
    Barrier factors_full[Traits::kStages];  // that are made of those
    Barrier stepped[Traits::kStages];       // both states of a stage are this chunk's
    Barrier m_full[Traits::kKeyStages];     // and q has been read by consumer 0
    Barrier k_read[Traits::kKeyStages];     // by consumer 1
    Barrier dq_full[Traits::kKeyStages], dk_full[Traits::kKeyStages];
  };
  static_assert(sizeof(Shared) + 1024 <=
                    gradients_shared_bytes(kKeyDim, Traits::kStages, Traits::kKeyStages),
                "linear_attention.h's gradients_shared_bytes covers the kernel's shared memory");
  static constexpr int kStepBytes =
      3 * ValueTile::kBytes + 2 * StateTile::kBytes + (kFactorsAhead ? 1 : 2) * Gates::kBytes +
      ((kFeatures & kSkip) != 0 ? SharedVec<float, kSlice>::kBytes : 0);

  // A part of a group's chunk, and its steps: slices of heads, one head after another.
  struct Place {
    int chunk, group, part, batch;
    int first_head, heads, slices;
    bool is_second, has_other;  // of its pair
    int other;

    // Parts, then chunks are next to each other, which read much that is the same.
    __device__ __forceinline__ Place(const GradientsParams& params, int index) {
      part = index % kParts;
      index /= kParts;
      chunk = index % params.chunks;
      index /= params.chunks;
      group = index % params.num_groups;
      batch = index / params.num_groups;
      heads = params.group_heads;
      first_head = group * heads;
      slices = ceil_div(params.value_dim, kSlice);
      is_second = chunk % kPair == 1;
      other = is_second ? chunk - 1 : chunk + 1;
      has_other = other < params.chunks;
    }
    __device__ __forceinline__ int row(const GradientsParams& params, int head) const {
      return batch * params.num_heads + head;
    }
    // Which of all heads' chunks, [B, H, chunks], a head's is: of them, B * H * T is below 2^31.
    __device__ __forceinline__ int index(const GradientsParams& params, int head) const {
      return row(params, head) * params.chunks + chunk;
    }
    // Of parts, the first does what all would do alike.
    __device__ __forceinline__ bool leads() const { return kParts == 1 || part == 0; }
  };

  __device__ __forceinline__ static void init(const GradientsParams&, Shared& shared) {
    shared.keys.init(kStorers - 1);  // who store dq and dk
    shared.ring.init(4 * kConsumers);
    shared.dv_ring.init(4);
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) {
      shared.gates_full[i].init(1);
      shared.factors_full[i].init(1);
      shared.stepped[i].init(1);
    }
#pragma unroll
    for (int i = 0; i < Traits::kKeyStages; ++i) {
      shared.m_full[i].init(1);
      shared.k_read[i].init(4);
      shared.dq_full[i].init(4);
      shared.dk_full[i].init(4);
    }
  }

  // Calls f with each place of the block, and where it stands among keys.
  template <typename F>
  __device__ __forceinline__ static void walk(const GradientsParams& params, F&& f) {
    typename Keys::State keys;
    for (int index = grid::block_x(); index < params.places; index += grid::blocks_x()) {
      f(Place(params, index), keys);
      keys.advance();
    }
  }

  __device__ __forceinline__ static void load(const GradientsParams& params, Shared& shared) {
    typename Ring::State state;
    walk(params, [&](const Place& place, const typename Keys::State& keys) {
      int left = place.heads * place.slices;
      const int left_after_keys = left - steps_before_keys(left);
      int head = place.first_head, slice = 0;
      for (;; --left, state.advance()) {
        if (left == left_after_keys) load_keys(params, shared, place, keys);
        if (left == 0) break;
        load_step(params, shared, place, state, head, slice);
        if (++slice == place.slices) ++head, slice = 0;
      }
    });
  }

  // Of a place's steps, those that there is room for before there is any for its keys.
  __device__ __forceinline__ static int steps_before_keys(int steps) {
    if (Traits::kKeyStages == 1) return min(Traits::kStages, steps);
    return steps > 1 ? 0 : 1;
  }

  // Of a chunk that has no other, tokens beyond the last one take its place, which are zeros.
  __device__ __forceinline__ static void load_keys(const GradientsParams& params, Shared& shared,
                                                   const Place& place,
                                                   const typename Keys::State& keys) {
    shared.keys.acquire(keys, 3 * KeyTile::kBytes);
    Barrier& full = shared.keys.full(keys);
    KeyTiles& tiles = shared.key_tiles[keys.stage];
    const int token = place.chunk * kChunk;
    tma::load(tiles.q_smem, params.q, full, tma::Keep::kNormal, 0, token, place.group, place.batch);
    tma::load(tiles.k_smem, params.k, full, tma::Keep::kNormal, 0, token, place.group, place.batch);
    tma::load(tiles.other_smem, place.is_second ? params.k : params.q, full, tma::Keep::kNormal, 0,
              place.other * kChunk, place.group, place.batch);
  }

  __device__ __forceinline__ static void load_step(const GradientsParams& params, Shared& shared,
                                                   const Place& place,
                                                   const typename Ring::State& state, int head,
                                                   int slice) {
    shared.ring.acquire(state, kStepBytes);
    Barrier& full = shared.ring.full(state);
    Step& step = shared.steps[state.stage];
    const int row = place.row(params, head), column = slice * kSlice;
    const int token = place.chunk * kChunk;
    Barrier& gates_full = kFactorsAhead ? shared.gates_full[state.stage] : full;
    if constexpr (kFactorsAhead) gates_full.expect(Gates::kBytes);
    step.other_gates.load(params.gates, gates_full, row, place.batch,
                          place.has_other ? place.other : place.chunk, params.chunks);
    tma::load(step.v_smem, params.v, full, tma::Keep::kNormal, column, token, head, place.batch);
    tma::load(step.dout_smem, params.dout, full, tma::Keep::kNormal, column, token, head,
              place.batch);
    const int pairs = ceil_div(params.chunks, kPair);
    const int matrix = stored_matrix(place.batch, place.chunk / kPair, pairs, head,
                                     params.num_heads, slice, place.slices);
    tma::load(step.state_smem, params.states, full, tma::Keep::kNormal, 0, matrix * kSlice);
    tma::load(step.dstate_smem, params.dstates, full, tma::Keep::kNormal, 0, matrix * kSlice);
    step.gates.load(params.gates, full, row, place.batch, place.chunk, params.chunks);
    tma::load(step.other_smem, place.is_second ? params.v : params.dout, full, tma::Keep::kNormal,
              column, place.other * kChunk, head, place.batch);
    if constexpr ((kFeatures & kSkip) != 0) {
      tma::load(step.skip, params.skip + (head * place.slices + slice) * kSlice, full);
    }
  }

  __device__ __forceinline__ static void store(const GradientsParams& params, Shared& shared,
                                               int storer) {
    typename DvRing::State state;
    walk(params, [&](const Place& place, const typename Keys::State& keys) {
      if (storer == 0) {
        if (place.leads()) store_dv(params, shared, place, state);
        return;
      }
      const KeyTiles& tiles = shared.key_tiles[keys.stage];
      if (storer == 1) {
        shared.dq_full[keys.stage].wait(keys.phase);
        store_columns(params.dq, tiles.dq_smem(), place);
      }
      if (storer == kStorers - 1) {
        shared.dk_full[keys.stage].wait(keys.phase);
        store_columns(params.dk, tiles.dk_smem(), place);
      }
      tma::wait_read<0>();
      shared.keys.release_by_thread(keys);
    });
  }

  __device__ __forceinline__ static void store_dv(const GradientsParams& params, Shared& shared,
                                                  const Place& place,
                                                  typename DvRing::State& state) {
    for (int head = place.first_head; head < place.first_head + place.heads; ++head) {
      for (int slice = 0; slice < place.slices; ++slice, state.advance()) {
        shared.dv_ring.wait(state);
        tma::store(params.dv, shared.dv_smem, slice * kSlice, place.chunk * kChunk, head,
                   place.batch);
        tma::commit();
        tma::wait_read<0>();
        shared.dv_ring.release(state);
      }
    }
  }
  // dq or dk, in whose place the keys of another place may come when it has left.
  template <typename Columns>
  __device__ __forceinline__ static void store_columns(const TensorMap& map, const Columns& smem,
                                                       const Place& place) {
    publish_shared();
    tma::store(map, smem, place.part * kColumns, place.chunk * kChunk, place.group, place.batch);
    tma::commit();
  }

  // The factors of the pair's other values, before consumer 0, for which all wait, needs them: of
  // every token one, which each thread of that consumer would find for sixteen.
  __device__ __forceinline__ static void tally(const GradientsParams& params, Shared& shared)
    requires(kFactorsAhead)
  {
    typename Ring::State state;
    walk(params, [&](const Place& place, const typename Keys::State&) {
#pragma unroll 1
      for (int left = place.heads * place.slices; left > 0; --left, state.advance()) {
        shared.gates_full[state.stage].wait(state.phase);
        find_factors(params, place, shared.steps[state.stage]);
        warp::sync();
        if (warp::leader()) shared.factors_full[state.stage].arrive();
      }
    });
  }
  __device__ __forceinline__ static void find_factors(const GradientsParams& params,
                                                      const Place& place, Step& step) {
#pragma unroll 1
    for (int i = 0; i < kChunk / 16; ++i) {
      PerRow<16> factors;
      if (place.is_second) {
        step.other_gates.factors_after(factors, i);
      } else {
        step.other_gates.factors_before(factors, i, params.scale);
      }
      warp::store(part<16>(step.factors, i), factors);
    }
  }
};

}  // namespace tk::linear_attention
