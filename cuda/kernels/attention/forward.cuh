// out = softmax(scale q k^T + mask) v, and lse, the logarithm of the softmax's denominator.
//
// Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), scheduled as in
// FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2).
// Where all queries see a block, its weights are relative to the maximum of the blocks before it,
// which is not looked for again (FlashDecoding++, Hong et al. 2023, section 3): whether they grow
// large shows in their sums, in time to correct them, and a tile in which one overflowed is walked
// once more, each maximum looked for. Grid: persistent. A tile is kBlockQ queries of one head; it
// walks its keys from the last visible block to the first or, where a causal mask lets them end at
// the queries, up to it. Causal tiles are taken longest first, by sections of heads that share L2.
// Roles: a producer warp says what the next tile is and loads rings of q, k and v; kBlockQ / 64
// consumer warpgroups own 64 queries each, and give back the blocks at the diagonal's end that only
// the others' queries see. A consumer issues the next block's scores before this block's p v, so
// that its softmax runs beside the products; where shared memory has room for the next tile's q,
// across tiles too. The consumers take turns at issuing, so that one's softmax runs beside
// another's products. A tile's rows of out leave through the memory of its q, or, where it has but
// one stage, straight from the registers. Budget at D = 128, 128 x 128, 2 stages: 192 KB of shared
// memory (q and out 64, k and v 128); 160 registers of s, p and o a thread. Limit: tensor cores at
// D = 128; exp2 as much as they at D = 64.
#pragma once

#include "kernels/attention/forward_copies.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/online_softmax.cuh"
#include "tk/tk.cuh"

namespace tk::attention {

template <typename Traits>
struct Forward : ForwardCopies<Traits> {
  using Copies = ForwardCopies<Traits>;
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  static constexpr int kBlockKv = Traits::kBlockKv, kConsumers = Traits::kConsumers;
  static constexpr unsigned kFeatures = Traits::kFeatures;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kConsumers == 2 ? 24 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;

  using Copies::kKeepsMax;
  using Copies::kMapped;
  using Copies::kMasked;
  using Copies::kOutFromRegisters;
  using Copies::kQRings;
  using Copies::kQStages;
  using Copies::kWalksUp;
  using typename Copies::BiasRing;
  using typename Copies::Map;
  using typename Copies::OutTile;
  using typename Copies::QRing;
  using typename Copies::Ring;
  using typename Copies::Shared;
  using typename Copies::Tile;
  using typename Copies::Tiles;
  using typename Copies::Walk;
  using Blocks = typename Walk::Blocks;
  using Scores = RegTile<float, 16, kBlockKv>;
  using Weights = RegTile<T, 16, kBlockKv>;
  using Output = RegTile<float, 16, kHeadDimV>;
  using Softmax = OnlineSoftmax<Map::kAdds>;
  static constexpr bool kFewRegisters =
      is_wide(kHeadDim, kHeadDimV) && (Map::kAdds || (kFeatures & kMapFeatures) != 0);

  // Whether a bias is read where it is added. Pairs and numbers of fp32 are registers of a tile as
  // they come, and do so beside the scores' product; single ones of 16 bits would wait there to be
  // packed.
  static constexpr bool kLateBias =
      Map::kAdds && !Map::kTiles && !Map::kPairs && (kFeatures & kFloatBias) == 0;
  // When a tile of it is asked for. Three consumers have others' work to wait beside, and run more
  // evenly when they ask after their turn.
  enum BiasLoad { kBeforeTurn, kAfterTurn };
  static constexpr BiasLoad kBiasLoad = Map::kPairs && kConsumers <= 2 ? kBeforeTurn : kAfterTurn;

  // Whether a mask's bits are asked for before the scores' turn. Three consumers have no registers
  // for them to arrive in.
  static constexpr bool kEarlyBits = (kFeatures & kMaskArray) != 0 && kConsumers <= 2;

  // Of a block that is weighed by an old maximum, the keys that are beside the product p v of the
  // block before. With three consumers the others' products are enough.
  static constexpr int kBesideOutput = kConsumers > 2 ? 0 : kBlockKv / 32 * 16;

  enum Turn : int { kTurn = kFirstKernelBarrier };  // one for each consumer

  __device__ __forceinline__ static void wait_turn(int consumer) {
    if constexpr (kConsumers > 1) named_sync(static_cast<Turn>(kTurn + consumer), 256);
  }
  __device__ __forceinline__ static void pass_turn(int consumer) {
    if constexpr (kConsumers > 1) {
      named_arrive(static_cast<Turn>(kTurn + (consumer + 1) % kConsumers), 256);
    }
  }

  __device__ __forceinline__ static void compute(const ForwardParams& params, Shared& shared,
                                                 int consumer) {
    typename QRing::State q_state, q_done;  // the tile at hand; the first that holds its memory
    typename Ring::State k_state, v_state;
    typename BiasRing::State bias_state;
    const Map score_map(params.scale, params.extras);
    const float unit_log2 = score_map.unit * kLog2E;
    if (consumer == kConsumers - 1) pass_turn(consumer);  // the first turn is the first consumer's
    Scores s_acc;
    Weights p;
    Output o_acc;
    typename Map::template BiasTile<kBlockKv> bias;
    TileBits<kFeatures, kBlockKv> bits;

    QRing& q_ring = shared.q_rings[kQRings == 1 ? 0 : consumer];
    const auto issue_scores = [&](int q_stage) {
      warpgroup::mm_ABt(s_acc, operand<kFewRegisters>(shared.rows[q_stage][consumer].q_smem),
                        shared.k_smem[k_state.stage]);
      warpgroup::mma_commit();
    };
    const auto load_early_bits = [&](const Tile& tile, const Blocks& keys) {
      if constexpr (kEarlyBits) {
        if (keys.is_whole()) return;
        load_bits<kFeatures>(bits, params.extras.mask, tile.batch, tile.head,
                             tile.first_query + 64 * consumer, keys.block() * kBlockKv);
      }
    };
    const auto load_bias = [&](BiasLoad now, const Tile& tile, const Blocks& keys) {
      if (!kLateBias && now == kBiasLoad) {
        Map::load_bias(bias, params, tile.batch, tile.head, tile.first_query + 64 * consumer,
                       keys.block() * kBlockKv);
      }
    };
    const auto release_bias = [&] {
      shared.bias_rings[consumer].release_read(bias_state);
      bias_state.advance();
    };
    const auto release_keys = [&] {
      shared.k_ring.release(k_state);
      k_state.advance();
    };
    const auto issue_output = [&](bool accumulate) {
      shared.v_ring.wait(v_state);
      warpgroup::mma_AB(o_acc, p, shared.v_smem[v_state.stage], accumulate);
      warpgroup::mma_commit();
    };
    const auto release_values = [&] {
      shared.v_ring.release(v_state);
      v_state.advance();
    };
    const auto is_masked = [](const Tile& tile, const Blocks& keys) {
      bool masked = keys.block() >= tile.unmasked_end;
      if constexpr (Traits::kMask == Mask::kBand) {
        masked = masked || keys.block() < tile.unmasked_first;
      }
      return masked;
    };
    const auto complete_scores = [&](const Tile& tile, const Blocks& keys) {
      const int block = keys.block(), first_query = tile.first_query + 64 * consumer;
      if constexpr (Map::kTiles) {
        shared.bias_rings[consumer].wait(bias_state);
        score_map.apply_shared(s_acc, shared.bias_smem.of[consumer]);
        release_bias();
      } else if constexpr (kLateBias) {
        score_map.apply_bias(s_acc, params, tile.batch, tile.head, tile.first_query + 64 * consumer,
                             keys.block() * kBlockKv);
      } else {
        score_map.apply(s_acc, bias);
      }
      if (is_masked(tile, keys)) {
        mask_scores<Traits::kMask>(s_acc, first_query, block * kBlockKv,
                                   bounds_of<kFeatures>(params, tile.batch));
      }
      if constexpr (kMapped) {
        if (!keys.is_whole()) {
          if constexpr (!kEarlyBits) {
            load_bits<kFeatures>(bits, params.extras.mask, tile.batch, tile.head, first_query,
                                 block * kBlockKv);
          }
          mask_by_arrays<kFeatures>(s_acc, bits, params, tile.batch, first_query, block * kBlockKv);
        }
      }
    };
    // Gives back the memory of the last tile's rows, once they have left.
    const auto release_rows = [&] {
      if (!kOutFromRegisters && q_done != q_state) {
        if (warpgroup::leader()) tma::wait_read<0>();
        q_ring.release(q_done);
        q_done.advance();
      }
    };
    const auto release_queries = [&] {
      if (kOutFromRegisters) q_ring.release(q_state);
    };

    typename Tiles::State tile_state;
    Walk walk(params);  // without a mask
    uint32 wanted = ~0u;
    bool repeats = false;
    const auto skip = [&] {
      if constexpr (kKeepsMax) {
        while (walk.valid() && (wanted & Walk::mark_of(walk.place())) == 0) walk.next();
      }
    };
    // The next tile, and whether there is one.
    const auto receive = [&](Tile& next) {
      if constexpr (kMasked) {
        int numbers[5];
        shared.tiles.receive(tile_state, numbers);
        if (numbers[4] < 0) return false;
        next = Walk::tile_at(params, {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]});
      } else {
        walk.next();
        if (repeats) skip();
        if (!walk.valid()) return false;
        next = Walk::tile_at(params, walk.place());
      }
      return true;
    };
    // Narrows a tile to the consumer's own queries, and gives the key block from which on they see
    // nothing. Not without a mask: that changes the order in which the compiler puts the softmax,
    // and cost 1%.
    const auto narrow = [&](Tile& tile) {
      const Bounds bounds = bounds_of<kFeatures>(params, tile.batch);
      if constexpr (!kMasked) return 0;
      const int first_query = tile.first_query + 64 * consumer;
      if (first_query < 0 || first_query >= bounds.seqlen_q) return 0;
      const VisibleKeys keys = visible_keys<Traits::kMask>(first_query, 64, bounds);
      tile.unmasked_first = ceil_div(keys.all_begin, kBlockKv);
      // On the way down, a query that sees nothing of the first blocks has a maximum after the
      // next.
      tile.unmasked_end = (kWalksUp ? keys.all_end : keys.all_end - 1) / kBlockKv;
      return ceil_div(keys.end, kBlockKv);
    };
    const auto skip_turn = [&] {
      wait_turn(consumer);
      pass_turn(consumer);
    };
    // A block that only others see: all take as many turns.
    const auto leave_block = [&](bool has_turn) {
      if (has_turn) skip_turn();
      shared.k_ring.wait(k_state);
      release_keys();
      if constexpr (Map::kTiles) {
        shared.bias_rings[consumer].wait(bias_state);
        release_bias();
      }
      shared.v_ring.wait(v_state);
      release_values();
    };
    const auto is_hidden = [](const Tile& tile, int own_end) {
      return kMasked && !tile.empty() && tile.keys.block() >= own_end;
    };

#pragma unroll 1
    for (;;) {
      Tile tile;
      bool valid = kMasked && receive(tile);
      while (kMasked ? valid : walk.valid()) {
        if constexpr (!kMasked) tile = Walk::tile_at(params, walk.place());
        const bool visited = !tile.empty();
        int own_end = narrow(tile);
        Softmax softmax(unit_log2);
        q_ring.wait(q_state);
        // The first block has a turn only beside the last product of the tile before.
        bool first = true;
        for (; is_hidden(tile, own_end);
             tile.keys.next(Walk::map_row(params, tile)), first = false) {
          leave_block(!first);
        }
        if (tile.empty()) {
          warp::zero(o_acc);
          finish(params, shared, consumer, q_state.stage, o_acc, softmax, tile);
          release_queries();
          q_state.advance();
          release_rows();
          valid = receive(tile);
          if (visited && kQStages > 1 && valid && !tile.empty()) skip_turn();
          continue;
        }
        load_early_bits(tile, tile.keys);
        load_bias(kBeforeTurn, tile, tile.keys);
        shared.k_ring.wait(k_state);
        if (!first) wait_turn(consumer);
        issue_scores(q_state.stage);
        if (!first) pass_turn(consumer);
        load_bias(kAfterTurn, tile, tile.keys);
        warpgroup::mma_wait<0>(s_acc);
        release_keys();
        complete_scores(tile, tile.keys);
        softmax.start(s_acc);
        warp::convert(p, s_acc);

        // As long as tiles follow each other without a gap: p holds the weights of a tile's first
        // visited block.
        for (bool chained = true; chained;) {
          bool accumulate = false;
          Blocks keys = tile.keys;
          for (keys.next(Walk::map_row(params, tile));
               keys.valid() && !(kWalksUp && keys.block() >= own_end);
               keys.next(Walk::map_row(params, tile))) {
            load_early_bits(tile, keys);
            load_bias(kBeforeTurn, tile, keys);
            shared.k_ring.wait(k_state);
            wait_turn(consumer);
            issue_scores(q_state.stage);
            issue_output(accumulate);
            pass_turn(consumer);
            accumulate = true;
            load_bias(kAfterTurn, tile, keys);
            warpgroup::mma_wait<1>(s_acc);
            release_keys();
            release_rows();
            const auto wait_output = [&] {
              warpgroup::mma_wait<0>(o_acc, p);
              release_values();
            };
            bool corrects;
            if (kKeepsMax && !repeats && !is_masked(tile, keys)) {
              const auto weigh = [&](const auto& unit) {
                return softmax.template weigh_by_old_max<kBesideOutput>(s_acc, p, unit,
                                                                        wait_output);
              };
              const auto of_scores = [=](float) { return unit_log2; };
              if constexpr (kKeepsMax && Map::kCaps) {
                const auto small_unit = score_map.small_unit();
                if (warp::all_within(s_acc, small_unit.limit)) {
                  corrects = weigh([=](float x) { return small_unit.factor_of(x); });
                } else {
                  score_map.apply_cap(s_acc);
                  corrects = weigh(of_scores);
                }
              } else {
                corrects = weigh(of_scores);
              }
            } else {
              if constexpr (kConsumers > 2) wait_output();
              if constexpr (kMasked || kFeatures != 0) complete_scores(tile, keys);
              corrects = softmax.weigh(s_acc);
              if constexpr (kConsumers <= 2) {
                warp::pin(softmax.row_sum);
                wait_output();
              }
              warp::convert(p, s_acc);
            }
            if (corrects) warp::mul_rows(o_acc, o_acc, softmax.correction);
          }

          release_rows();
          release_queries();
          Tile next = tile;
          valid = receive(next);
          const bool linked = kQStages > 1 && valid && !next.empty();
          const bool others_go_on = kWalksUp && keys.valid();
          if (!others_go_on && linked) own_end = narrow(next);
          chained = !others_go_on && linked && !is_hidden(next, own_end);
          auto q_next = q_state;
          q_next.advance();
          if (chained) {
            load_early_bits(next, next.keys);
            load_bias(kBeforeTurn, next, next.keys);
            q_ring.wait(q_next);
            shared.k_ring.wait(k_state);
            wait_turn(consumer);
            issue_scores(q_next.stage);
            issue_output(accumulate);
            pass_turn(consumer);
            load_bias(kAfterTurn, next, next.keys);
            warpgroup::mma_wait<1>(s_acc);
            release_keys();
            complete_scores(next, next.keys);
            Softmax next_softmax(unit_log2);
            next_softmax.start(s_acc);
            if constexpr (kConsumers <= 2) warp::pin(next_softmax.row_sum);
            warpgroup::mma_wait<0>(o_acc, p);
            release_values();
            finish(params, shared, consumer, q_state.stage, o_acc, softmax, tile);
            warp::convert(p, s_acc);
            softmax = next_softmax;
          } else {
            const bool takes_turn = linked || others_go_on;
            if (takes_turn) wait_turn(consumer);
            issue_output(accumulate);
            if (takes_turn) pass_turn(consumer);
            warpgroup::mma_wait<0>(o_acc, p);
            release_values();
            if (others_go_on) {
              // The first one's turn was the product's.
              for (bool has_turn = false; keys.valid();
                   keys.next(Walk::map_row(params, tile)), has_turn = true) {
                leave_block(has_turn);
              }
              if (linked) skip_turn();
            }
            finish(params, shared, consumer, q_state.stage, o_acc, softmax, tile);
          }
          tile = next;
          q_state = q_next;
        }
        release_rows();
      }
      if (!kKeepsMax || repeats) break;
      shared.marks.close();
      wanted = shared.marks.wait();
      if (wanted == 0) break;
      if (warpgroup::leader()) tma::wait<0>();  // the same rows are written once more
      repeats = true;
      walk.start();
      skip();
    }
  }

  // Completes a tile: its rows are written while the consumer goes on.
  __device__ __forceinline__ static void finish(const ForwardParams& params, Shared& shared,
                                                int consumer, int q_stage, Output& o_acc,
                                                Softmax& softmax, const Tile& tile) {
    const int first_query = tile.first_query + 64 * consumer;
    if (kMasked && first_query < 0) return;  // of a first tile's lead
    if constexpr ((kFeatures & kLengths) != 0) {
      hide_queries(o_acc, softmax, bounds_of<kFeatures>(params, tile.batch).seqlen_q - first_query);
    }
    PerRow<16> lse = softmax.finish(Map(params.scale, params.extras).unit);
    PerRow<16> inverse_sum = softmax.inverse_sum();
    join_sink(softmax, lse, inverse_sum, params.extras, tile.batch, tile.head);
    const auto store_rows = [&](float* values, const PerRow<16>& rows) {
      const int64 row = static_cast<int64>(tile.batch) * params.seqlen_q * params.num_heads;
      warpgroup::store(
          GlobalVec<float>{values + row + tile.head, params.seqlen_q, params.num_heads}, rows,
          first_query);
    };
    // Beside a bias before everything else: later, loops of D = 128 took up to 1.1 times as long.
    if constexpr (Map::kAdds) {
      store_rows(params.lse_rest, softmax.lse_rest(lse));
      store_rows(params.lse, lse);
    }
    warp::mul_rows(o_acc, o_acc, inverse_sum);
    if constexpr (kOutFromRegisters) {
      const int64 row = static_cast<int64>(tile.batch) * params.seqlen_q * params.num_heads;
      T* rows = static_cast<T*>(params.out_rows) + (row + tile.head) * params.head_dim_v;
      warpgroup::store_rounded(
          GlobalView<T>{rows, params.seqlen_q, params.head_dim_v,
                        static_cast<int64>(params.num_heads) * params.head_dim_v},
          o_acc, first_query, 0);
    } else {
      OutTile& out_smem = shared.rows[q_stage][consumer].out_smem;
      warpgroup::sync();  // the products of all its warps have read q
      warpgroup::store_afresh(out_smem, o_acc);
      publish_shared();
      warpgroup::sync();
      if (warpgroup::leader()) {
        tma::store(params.out, out_smem, 0, first_query, tile.head, tile.batch);
        tma::commit();
      }
    }
    if constexpr (!Map::kAdds) store_rows(params.lse, lse);
    // What does not hold when it is repeated, being no number, did not before.
    if (kKeepsMax && !softmax.holds()) shared.marks.set(consumer, Walk::mark_of(tile));
  }
};

template <typename Traits>
__device__ __forceinline__ void forward(const ForwardParams& params) {
  block::run<Forward<Traits>>(params);
}

}  // namespace tk::attention
