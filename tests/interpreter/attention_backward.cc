// Runs attention's three backward kernels in the interpreter.
#include "kernels/attention/backward.cuh"
#include "kernels/attention/backward_finish.cuh"
#include "tests/interpreter/backward.h"

namespace tk::check {
namespace {

template <attention::Mask kMask, bool kDeterministic, int kDepth>
std::string check_backward(const Attention& s, std::uint64_t seed) {
  constexpr int kBlockQ = kDepth == 64 ? 128 : 64, kBlockKv = 128;
  using Traits =
      attention::BackwardTraits<bf16, kDepth, kMask, 0, kDeterministic, kBlockQ, kBlockKv, 2>;
  BackwardCall call(s, kDepth, seed);
  const bool zero_dq =
      !kDeterministic || s.last_offset < 0 || s.seqlen_q + s.first_offset > s.seqlen_kv;
  if (std::string fault = call.prepare<kDepth>(zero_dq ? kDepth : 0); !fault.empty()) return fault;
  {
    attention::BackwardParams params = {};
    params.q = rows_map(call.q, s, true, kBlockQ);
    params.dout = rows_map(call.dout, s, true, kBlockQ);
    params.k = rows_map(call.k, s, false, kBlockKv);
    params.v = rows_map(call.v, s, false, kBlockKv);
    params.dk = rows_map(call.dk, s, false, 64);
    params.dv = rows_map(call.dv, s, false, 64);
    call.set_problem(params);
    params.dq_acc = call.dq_acc.data();
    params.dq_order = call.dq_order.data();
    params.next_tile = reinterpret_cast<int*>(call.dq.data());
    const int key_blocks = ceil_div(s.seqlen_kv, kBlockKv);
    const int tiles = key_blocks * s.num_kv_heads * s.batch;
    params.q_blocks = ceil_div(s.seqlen_q, kBlockQ);
    params.kv_blocks = key_blocks;
    params.tiles = tiles;
    constexpr bool kInWaves = attention::causal_in_waves(kDepth, kMask, 0);
    params.turn_group = kInWaves ? 2 : min(key_blocks, kMultiprocessors);
    params.heads_of_group = s.num_heads / s.num_kv_heads;
    params.tile_rows = s.num_kv_heads * s.batch;
    params.rows_together = 1;
    params.phase_blocks = min(key_blocks, 4);
    const int whole_heads = max(key_blocks, kMultiprocessors / key_blocks * key_blocks);
    const int blocks =
        kMask != attention::Mask::kNone && !kInWaves
            ? tiles
            : min(tiles, kInWaves ? kMultiprocessors : min(kMultiprocessors, whole_heads));
    const std::string fault = call.run<attention::backward<Traits>>(
        "tk_attention_bwd", params, {blocks, 1, 1}, attention::backward_threads(kBlockKv),
        attention::backward_shared_bytes(kDepth, {kBlockQ, kBlockKv, 2}));
    if (!fault.empty()) return fault;
  }
  {
    attention::BackwardFinishParams params = {};
    params.dq = rows_map(call.dq, s, true, 64);
    params.dq_acc = call.dq_acc.data();
    params.seqlen_q = s.seqlen_q;
    params.num_heads = s.num_heads;
    params.scale = s.scale();
    const std::string fault = call.run<attention::backward_finish<bf16, kDepth>>(
        "tk_attention_bwd_finish", params, {ceil_div(s.seqlen_q, 64), s.num_heads, s.batch}, 128,
        attention::backward_finish_shared_bytes(kDepth));
    if (!fault.empty()) return fault;
  }
  return call.wrong(kDeterministic);
}

std::string check_all(std::uint64_t seed) {
  using attention::Mask;
  std::string wrong =
      check_backward<Mask::kCausal, true, 128>({1, 300, 400, 2, 1, 128, kNoFirst, 100}, seed);
  if (wrong.empty()) {
    wrong = check_backward<Mask::kNone, true, 64>({1, 200, 390, 2, 2, 64, kNoFirst, kNoLast}, seed);
  }
  if (wrong.empty()) {
    wrong = check_backward<Mask::kCausal, true, 64>({1, 200, 300, 2, 1, 64, kNoFirst, 100}, seed);
  }
  if (wrong.empty()) {
    wrong = check_backward<Mask::kBand, false, 64>({1, 300, 330, 1, 1, 64, -140, -70}, seed);
  }
  return wrong;
}

}  // namespace
}  // namespace tk::check

int main(int argc, char** argv) { return tk::check::explore(argc, argv, tk::check::check_all); }
