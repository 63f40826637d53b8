// c = op(a) @ op(b), fp32 accumulation, 16-bit operands and result.
//
// Grid: persistent, one block per multiprocessor, in clusters of kClusterM along M. Tiles are
// walked in groups of kGroupM tile rows, so that a wave's operands stay in L2. Roles: a producer
// warp fills a ring of kStages (a, b) steps of kBlockK; two consumer warpgroups each own kBlockM /
// 2 rows of the tile. The blocks of a cluster need the same columns of b: each loads a part and
// multicasts it. Epilogue: each consumer rounds its rows 64 columns at a time into two alternating
// pieces of shared memory that the copy engine writes out, while the producer already loads the
// next tile. Budget at 128x256x64, 4 stages: 224 KB of shared memory; 128 accumulator registers a
// thread. Limit: the tensor cores; per step wgmma reads 80 and the copies write 48 of 128 bytes a
// clock.
#pragma once

#include "kernels/matmul/matmul.h"
#include "tk/tk.cuh"

namespace tk::matmul {

template <typename T_, bool kTransposeA_, bool kTransposeB_, int kBlockM_, int kBlockN_,
          int kBlockK_, int kStages_, int kClusterM_, int kGroupM_>
struct Traits {
  using T = T_;
  static constexpr bool kTransposeA = kTransposeA_;
  static constexpr bool kTransposeB = kTransposeB_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockK = kBlockK_;
  static constexpr int kStages = kStages_;
  static constexpr int kClusterM = kClusterM_;
  static constexpr int kGroupM = kGroupM_;
  static constexpr int kConsumers = 2;
  static constexpr int kRowTiles = kBlockM / (64 * kConsumers);  // 64-row tiles of a consumer

  static_assert(kBlockM == 128 || kBlockM == 256, "a consumer owns one or two 64-row tiles");
  static_assert(kRowTiles * kBlockN <= 256, "a consumer's accumulators fit its registers");
  static_assert(kClusterM == 1 || kClusterM == 2, "b is shared by at most two blocks");
  static_assert(kGroupM % kClusterM == 0, "a cluster's tiles lie in one group");
};

template <typename Traits>
struct Multiply {
  using T = typename Traits::T;
  static constexpr int kConsumers = Traits::kConsumers;
  static constexpr int kClusterSize = Traits::kClusterM;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kBlockK = Traits::kBlockK;
  static constexpr int kRowTiles = Traits::kRowTiles;

  template <bool kTranspose, int kRows, int kCols>
  struct Stored {
    using Tile = SharedTile<T, kRows, kCols>;
  };
  template <int kRows, int kCols>
  struct Stored<true, kRows, kCols> {
    using Tile = SharedTile<T, kCols, kRows>;
  };
  using ATile = typename Stored<Traits::kTransposeA, kBlockM, kBlockK>::Tile;
  using BTile = typename Stored<Traits::kTransposeB, kBlockK, kBlockN>::Tile;
  using CPiece = SharedTile<T, 64, 64>;
  using Ring = Pipeline<Traits::kStages>;
  using Accumulator = RegTile<float, 16, kBlockN>;

  struct Shared {
    ATile a_smem[Traits::kStages];
    BTile b_smem[Traits::kStages];
    CPiece c_smem[kConsumers][2];
    Ring ring;
  };
  static_assert(sizeof(Shared) + 1024 <= shared_bytes({kBlockM, kBlockN, kBlockK, Traits::kStages,
                                                       Traits::kClusterM, Traits::kGroupM}),
                "matmul.h's shared_bytes covers the kernel's shared memory");

  // The walk over tiles, the same for every role. A cluster's tiles differ in the row only.
  struct Walk {
    grid::Rounds rounds;
    int rows, cols;

    __device__ __forceinline__ explicit Walk(const Params& p) {
      rows = ceil_div(ceil_div(p.m, kBlockM), kClusterSize);
      cols = ceil_div(p.n, kBlockN);
      rounds = {grid::block_x() / kClusterSize, grid::blocks_x() / kClusterSize,
                rows * cols * p.batch};
    }
    __device__ __forceinline__ grid::MatrixTile tile() const {
      grid::MatrixTile tile =
          grid::grouped_tile(rounds.index(), rows, cols, Traits::kGroupM / kClusterSize);
      tile.row = tile.row * kClusterSize + (kClusterSize > 1 ? cluster::rank() : 0);
      return tile;
    }
  };

  __device__ __forceinline__ static void init(const Params&, Shared& shared) {
    shared.ring.init(4 * kConsumers * kClusterSize);
  }

  __device__ __forceinline__ static void load(const Params& params, Shared& shared) {
    tma::prefetch(params.a);
    tma::prefetch(params.b);
    typename Ring::State state;
    const int steps = ceil_div(params.k, kBlockK);
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      const grid::MatrixTile tile = walk.tile();
      const int batch_a = params.batch_a == 1 ? 0 : tile.batch;
      const int batch_b = params.batch_b == 1 ? 0 : tile.batch;
      for (int step = 0; step < steps; ++step, state.advance()) {
        shared.ring.acquire(state, ATile::kBytes + BTile::kBytes);
        Barrier& full = shared.ring.full(state);
        load_a(shared.a_smem[state.stage], params.a, full, step * kBlockK, tile.row * kBlockM,
               batch_a);
        load_b(shared.b_smem[state.stage], params.b, full, step * kBlockK, tile.col * kBlockN,
               batch_b);
      }
    }
  }

  __device__ __forceinline__ static void load_a(const ATile& a_smem, const TensorMap& map,
                                                Barrier& full, int depth, int row, int batch) {
    if constexpr (Traits::kTransposeA) {
      tma::load(a_smem, map, full, tma::Keep::kNormal, row, depth, batch);
    } else {
      tma::load(a_smem, map, full, tma::Keep::kNormal, depth, row, batch);
    }
  }

  __device__ __forceinline__ static void load_b(const BTile& b_smem, const TensorMap& map,
                                                Barrier& full, int depth, int col, int batch) {
    constexpr int kPart = kBlockN / kClusterSize;
    const auto copy = [&](const auto& part, int x, int y) {
      if constexpr (kClusterSize == 1) {
        tma::load(part, map, full, tma::Keep::kNormal, x, y, batch);
      } else {
        tma::load_multicast(part, map, full, tma::Keep::kNormal, (1 << kClusterSize) - 1, x, y,
                            batch);
      }
    };
    const int rank = kClusterSize > 1 ? cluster::rank() : 0;
    if constexpr (Traits::kTransposeB) {
      copy(b_smem.template rows<kPart>(rank), depth, col + rank * kPart);
    } else {
      copy(b_smem.template cols<kPart>(rank), col + rank * kPart, depth);
    }
  }

  __device__ __forceinline__ static void release(Ring& ring, const typename Ring::State& state) {
    ring.release(state);
    if constexpr (kClusterSize > 1) ring.release(state, cluster::rank() ^ 1);
  }

  __device__ __forceinline__ static void compute(const Params& params, Shared& shared,
                                                 int consumer) {
    typename Ring::State state, previous;
    const int steps = ceil_div(params.k, kBlockK);
    Accumulator acc[kRowTiles];
    for (Walk walk(params); walk.rounds.valid(); walk.rounds.next()) {
      for (int step = 0; step < steps; ++step) {
        shared.ring.wait(state);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply(acc[r], shared.a_smem[state.stage], shared.b_smem[state.stage],
                   consumer * kRowTiles + r, step > 0);
        }
        warpgroup::mma_commit();
        if (step > 0) {
          // One step stays in flight while the one before it gives its stage back.
          warpgroup::mma_wait<1>();
          release(shared.ring, previous);
        }
        previous = state;
        state.advance();
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) warpgroup::mma_wait<0>(acc[r]);
      release(shared.ring, previous);
      const grid::MatrixTile tile = walk.tile();
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        store(params, shared.c_smem[consumer], acc[r],
              tile.row * kBlockM + (consumer * kRowTiles + r) * 64, tile.col * kBlockN, tile.batch);
      }
    }
    if (warpgroup::leader()) tma::wait_read<0>();
  }

  __device__ __forceinline__ static void multiply(Accumulator& acc, const ATile& a_smem,
                                                  const BTile& b_smem, int row_tile,
                                                  bool accumulate) {
    if constexpr (Traits::kTransposeA) {
      const auto a = a_smem.template cols<64>(row_tile);
      if constexpr (Traits::kTransposeB) {
        warpgroup::mma_AtBt(acc, a, b_smem, accumulate);
      } else {
        warpgroup::mma_AtB(acc, a, b_smem, accumulate);
      }
    } else {
      const auto a = a_smem.template rows<64>(row_tile);
      if constexpr (Traits::kTransposeB) {
        warpgroup::mma_ABt(acc, a, b_smem, accumulate);
      } else {
        warpgroup::mma_AB(acc, a, b_smem, accumulate);
      }
    }
  }

  __device__ __forceinline__ static void store(const Params& params, CPiece (&c_smem)[2],
                                               const Accumulator& acc, int row, int col,
                                               int batch) {
#pragma unroll
    for (int piece = 0; piece < kBlockN / 64; ++piece) {
      CPiece& out = c_smem[piece % 2];
      if (warpgroup::leader()) tma::wait_read<1>();  // the piece before last has left `out`
      warpgroup::sync();
      warpgroup::store(out, warp::cols<64>(acc, piece));
      publish_shared();
      warpgroup::sync();
      if (warpgroup::leader()) {
        tma::store(params.c, out, col + piece * 64, row, batch);
        tma::commit();
      }
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void multiply(const Params& params) {
  block::run<Multiply<Traits>>(params);
}

}  // namespace tk::matmul
