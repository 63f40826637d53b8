// What host and device agree on for matmul: settings, launch parameters and budgets.
//
// Plain C++: included by the FFI handler and by the kernel.
#pragma once

#include "tk/tensor_map.h"

namespace tk::matmul {

// What is computed: c = op(a) @ op(b). Fields match tk_jax.ops.matmul.config.MatmulOptions.
struct Options {
  bool transpose_a;  // a is [batch, K, M] instead of [batch, M, K]
  bool transpose_b;  // b is [batch, N, K] instead of [batch, K, N]
};

// How. Fields match MatmulConfig.
struct Config {
  long block_m;    // rows of a tile: 128 or 256, half of them for each consumer warpgroup
  long block_n;    // columns of a tile, a multiple of 64 up to 256
  long block_k;    // depth of one step: 64
  long stages;     // depth of the operand ring
  long cluster_m;  // blocks along M that share b's tile by multicast: 1 or 2
  long group_m;    // tiles along M that are walked together, so that their operands stay in L2
};

constexpr int kThreads = 3 * 128;  // one producer and two consumer warpgroups
constexpr int kSharedSlack = 2048;

// Kernel: "kernels/matmul/kernel.cuh"
//   tk::matmul::multiply<tk::matmul::Traits<T, kTransposeA, kTransposeB, kBlockM, kBlockN, kBlockK,
//                                           kStages, kClusterM, kGroupM>>
// Grid: min(multiprocessors rounded down to a multiple of cluster_m, tiles) blocks, where
// tiles = round_up(ceil(M / block_m), cluster_m) * ceil(N / block_n) * batch.
struct Params {
  // Dimensions, innermost first: (columns, rows, batch) of the row-major array as stored. Every
  // inner stride is a multiple of 16 bytes. 128-byte swizzle.
  TensorMap a;  // box (64, block_m, 1); transposed: (64, block_k, 1)
  TensorMap b;  // box (64, block_k, 1); transposed: (64, block_n / cluster_m, 1)
  TensorMap c;  // box (64, 64, 1)
  int m, n, k, batch;
  int batch_a, batch_b;  // 1 where the operand is shared by the whole batch, otherwise batch
};

// stages of both operands, and for each consumer two 64 x 64 pieces of c on their way out.
constexpr int shared_bytes(const Config& config) {
  return static_cast<int>(2 * config.stages * config.block_k * (config.block_m + config.block_n) +
                          2 * 2 * 2 * 64 * 64) +
         kSharedSlack;
}

}  // namespace tk::matmul
