// Runs the backward kernels of attention for head dims beyond 128 in the interpreter.
#include "kernels/attention/backward_wide.cuh"
#include "kernels/attention/backward_wide_dq.cuh"
#include "tests/interpreter/backward.h"

namespace tk::check {
namespace {

// kDepth and kDepthV are those of tiles; kBlockKv is 64 for each block of a cluster.
template <attention::Mask kMask, int kDepth, int kDepthV, int kBlockQ, int kBlockKv, int kStages,
          int kDqBlockKv, int kDqStages>
std::string check_wide(const Attention& s, std::uint64_t seed) {
  constexpr attention::BackwardConfig kConfig = {kBlockQ, kBlockKv, kStages, kDqBlockKv, kDqStages};
  BackwardCall call(s, 0, seed);
  if (std::string fault = call.prepare<kDepthV>(0); !fault.empty()) return fault;
  {
    using Traits =
        attention::BackwardWideTraits<bf16, kDepth, kDepthV, kMask, 0, kBlockQ, kBlockKv, kStages>;
    attention::BackwardParams params = {};
    params.q = rows_map(call.q, s, true, kBlockQ);
    params.dout = rows_map(call.dout, s, true, kBlockQ);
    params.k = rows_map(call.k, s, false, 64);
    params.v = rows_map(call.v, s, false, 64);
    params.dk = rows_map(call.dk, s, false, 64);
    params.dv = rows_map(call.dv, s, false, 64);
    call.set_problem(params);
    params.q_blocks = ceil_div(s.seqlen_q, kBlockQ);
    params.kv_blocks = ceil_div(s.seqlen_kv, kBlockKv);
    params.heads_of_group = s.num_heads / s.num_kv_heads;
    params.tiles = params.kv_blocks * s.num_kv_heads * s.batch;
    params.turn_group = 1;
    const int cluster = attention::backward_wide_cluster(kConfig);
    const int clusters = kMask != attention::Mask::kNone
                             ? params.tiles
                             : min(params.tiles, kMultiprocessors / cluster);
    const std::string fault = call.run<attention::backward_wide<Traits>>(
        "tk_attention_bwd", params, {clusters * cluster, 1, 1}, attention::backward_wide_threads(),
        attention::backward_wide_shared_bytes(kDepth, kDepthV, kConfig), cluster);
    if (!fault.empty()) return fault;
  }
  {
    using Traits =
        attention::BackwardWideDqTraits<bf16, kDepth, kDepthV, kMask, 0, kDqBlockKv, kDqStages>;
    attention::BackwardWideDqParams params = {};
    params.q = rows_map(call.q, s, true, 64);
    params.dout = rows_map(call.dout, s, true, 64);
    params.dq = rows_map(call.dq, s, true, 64);
    params.k = rows_map(call.k, s, false, kDqBlockKv);
    params.v = rows_map(call.v, s, false, kDqBlockKv);
    call.set_problem(params);
    const int tiles = ceil_div(s.seqlen_q, attention::kWideDqBlockQ) * s.num_heads * s.batch;
    // Fewer blocks than tiles, so that some take several.
    const std::string fault = call.run<attention::backward_wide_dq<Traits>>(
        "tk_attention_bwd_dq", params, {min(tiles, 2), 1, 1}, attention::backward_wide_dq_threads(),
        attention::backward_wide_dq_shared_bytes(kDepth, kDepthV, kConfig));
    if (!fault.empty()) return fault;
  }
  return call.wrong(true);
}

// Head dims that fill their tiles and that do not, clusters of two blocks and of one, odd lengths,
// grouped heads, more keys than a tile's, blocks without a key.
std::string check_all(std::uint64_t seed) {
  using attention::Mask;
  std::string wrong = check_wide<Mask::kCausal, 192, 128, 64, 128, 3, 64, 3>(
      {1, 150, 200, 2, 1, 192, kNoFirst, 50, 128}, seed);
  if (wrong.empty()) {
    wrong = check_wide<Mask::kNone, 256, 256, 64, 128, 2, 48, 2>(
        {2, 70, 150, 1, 1, 256, kNoFirst, kNoLast}, seed);
  }
  if (wrong.empty()) {
    wrong = check_wide<Mask::kBand, 192, 128, 128, 64, 2, 80, 2>(
        {1, 200, 190, 1, 1, 136, -90, -40, 72}, seed);
  }
  if (wrong.empty()) {
    wrong = check_wide<Mask::kCausal, 64, 256, 64, 128, 2, 64, 2>(
        {1, 130, 65, 2, 2, 40, kNoFirst, -65, 200}, seed);
  }
  return wrong;
}

}  // namespace
}  // namespace tk::check

int main(int argc, char** argv) { return tk::check::explore(argc, argv, tk::check::check_all); }
