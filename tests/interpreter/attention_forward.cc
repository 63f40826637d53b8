// Runs attention's forward kernel in the interpreter: odd lengths, grouped heads, every mask.
#include "interpreter/launch.h"
#include "kernels/attention/forward.cuh"
#include "tests/interpreter/attention.h"

namespace tk::check {
namespace {

template <attention::Mask kMask, int kBlockQ, int kBlockKv, int kStages = 2>
std::string check_forward(const Attention& s, int blocks, float gain, std::uint64_t seed,
                          float value = 1.0f, float step = 0.0f) {
  using Traits = attention::ForwardTraits<bf16, 64, 64, kMask, 0, kBlockQ, kBlockKv, kStages>;
  Array<bf16> q("q", s.q_size()), k("k", s.kv_size()), v("v", s.kv_size()), out("out", s.q_size());
  Array<float> lse("lse", s.rows());
  q.fill_normal(1);
  k.fill_normal(2, gain);
  v.fill_normal(3, value);
  // Scores of the first half of the keys are larger by this many powers of two.
  if (step != 0.0f) {
    const std::size_t depth = s.head_dim, keys = k.size() / depth;
    for (std::size_t i = 0; i < q.size(); i += depth)
      q.data()[i] = interpreter::from_float<bf16>(1);
    for (std::size_t i = 0; i < keys; ++i) {
      const float score = i < keys / 2 ? step * kLn2 / s.scale() : 0.0f;
      k.data()[i * depth] = interpreter::from_float<bf16>(score);
    }
  }
  attention::ForwardParams params = {};
  params.q = rows_map(q, s, true, 64);
  params.k = rows_map(k, s, false, kBlockKv);
  params.v = rows_map(v, s, false, kBlockKv);
  params.out = rows_map(out, s, true, 64);
  params.out_rows = out.data();
  params.head_dim_v = s.head_dim;
  params.lse = lse.data();
  params.batch = s.batch;
  params.seqlen_q = s.seqlen_q;
  params.seqlen_kv = s.seqlen_kv;
  params.num_heads = s.num_heads;
  params.num_kv_heads = s.num_kv_heads;
  params.first_offset = s.first_offset;
  params.last_offset = s.last_offset;
  params.section = 2;
  params.scale = s.scale();

  interpreter::Memory memory;
  q.give(memory, true);
  k.give(memory, true);
  v.give(memory, true);
  out.give(memory, false);
  lse.give(memory, false);
  interpreter::Launch launch = {};
  launch.kernel = "tk_attention_fwd";
  launch.entry = entry<attention::forward<Traits>, attention::ForwardParams>;
  launch.params = &params;
  launch.grid[0] = blocks;
  launch.threads = attention::forward_threads(kBlockQ);
  launch.shared_bytes = attention::forward_shared_bytes(64, 64, {kBlockQ, kBlockKv, kStages}, 0);
  launch.seed = seed;
  if (const auto report = interpreter::run(launch, memory)) return report->text();

  // Each shape has an instance of this function to itself.
  static const ExactAttention exact = exact_attention<bf16>(s, q, k, v, nullptr, nullptr);
  const std::string wrong = compare(out, exact.out, 0.006);
  return wrong.empty() ? compare(lse, exact.lse, 1e-4) : wrong;
}

constexpr int kManyStages = 13;
static_assert(attention::forward_q_stages(64, 64, {128, 64, kManyStages}, 0) == 1,
              "of q one stage");

// The gain makes scores large enough for running sums to need corrections.
std::string check_all(std::uint64_t seed) {
  using attention::Mask;
  std::string wrong =
      check_forward<Mask::kCausal, 128, 64>({1, 200, 200, 2, 1, 64, kNoFirst, 0}, 2, 10, seed);
  if (wrong.empty()) {
    wrong =
        check_forward<Mask::kNone, 128, 64>({2, 70, 210, 2, 2, 64, kNoFirst, kNoLast}, 1, 1, seed);
  }
  // The same walked down: with the blocks to leave out first.
  if (wrong.empty()) {
    wrong = check_forward<Mask::kBand, 128, 64>({1, 200, 200, 2, 1, 64, -200, 0}, 2, 10, seed);
  }
  // Several blocks that only the second consumer's queries see.
  if (wrong.empty()) {
    wrong =
        check_forward<Mask::kCausal, 128, 16>({1, 150, 150, 2, 1, 64, kNoFirst, 0}, 1, 10, seed);
  }
  // Consumers before the first query, with queries that see no key, and with blocks to leave out.
  if (wrong.empty()) {
    wrong =
        check_forward<Mask::kCausal, 192, 64>({1, 310, 310, 2, 1, 64, kNoFirst, -70}, 1, 10, seed);
  }
  if (wrong.empty()) {
    wrong = check_forward<Mask::kBand, 192, 128>({1, 210, 301, 1, 1, 64, -113, -73}, 1, 1, seed);
  }
  // So many stages of k and v that there is room for one of q: out leaves from registers.
  if (wrong.empty()) {
    wrong = check_forward<Mask::kCausal, 128, 64, kManyStages>(
        {1, 310, 310, 2, 1, 64, kNoFirst, -70}, 1, 10, seed);
  }
  if (wrong.empty()) {
    wrong = check_forward<Mask::kNone, 128, 64, kManyStages>(
        {2, 70, 210, 2, 2, 64, kNoFirst, kNoLast}, 1, 60, seed);
  }
  // Scores so far apart that weights overflow or nearly do, and values that large weights would
  // carry beyond what accumulators hold.
  if (wrong.empty()) {
    wrong =
        check_forward<Mask::kCausal, 192, 128>({1, 400, 400, 2, 1, 64, kNoFirst, 0}, 2, 100, seed);
  }
  if (wrong.empty()) {
    wrong = check_forward<Mask::kNone, 192, 64>({1, 200, 450, 3, 1, 64, kNoFirst, kNoLast}, 2, 60,
                                                seed);
  }
  if (wrong.empty()) {
    wrong = check_forward<Mask::kNone, 128, 128>({1, 130, 450, 1, 1, 64, kNoFirst, kNoLast}, 1, 10,
                                                 seed, 1e34f);
  }
  // A lane's sixteen weights of a block are some 2^126.6: the correction would be less than 2^-126.
  if (wrong.empty()) {
    wrong = check_forward<Mask::kNone, 64, 64>({1, 64, 256, 1, 1, 64, kNoFirst, kNoLast}, 1, 0.1f,
                                               seed, 1.0f, 122.6f);
  }
  return wrong;
}

}  // namespace
}  // namespace tk::check

int main(int argc, char** argv) { return tk::check::explore(argc, argv, tk::check::check_all); }
