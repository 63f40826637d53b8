// What the programs of attention's backward kernels share: arrays, exact results, and the kernel
// that comes first.
#pragma once

#include <array>
#include <memory>
#include <utility>

#include "interpreter/launch.h"
#include "kernels/attention/backward_prepare.cuh"
#include "tests/interpreter/attention.h"

namespace tk::check {

constexpr int kMultiprocessors = 4;

// The arrays of one call, the forward pass's results among them, and exact results.
class BackwardCall {
 public:
  // dq is summed in rows of dq_columns; 0: it is not.
  BackwardCall(const Attention& shape, int dq_columns, std::uint64_t seed)
      : s(shape),
        padded_q(static_cast<int>(attention::padded_queries(s.seqlen_q))),
        padded_rows(static_cast<std::size_t>(s.batch) * s.num_heads * padded_q),
        q("q", s.q_size()),
        k("k", s.kv_size()),
        v("v", s.v_size()),
        out("out", s.out_size()),
        dout("dout", s.out_size()),
        dq("dq", s.q_size()),
        dk("dk", s.kv_size()),
        dv("dv", s.v_size()),
        lse("lse", s.rows()),
        dlse("dlse", s.rows()),
        delta("delta", padded_rows),
        scaled_lse("scaled_lse", padded_rows),
        dq_acc("dq_acc", padded_rows * dq_columns),
        dq_order("dq_order", padded_rows / 64) {
    q.fill_normal(1);
    k.fill_normal(2);
    v.fill_normal(3);
    dout.fill_normal(4);
    dlse.fill_normal(5);
    find_exact();
    for (std::size_t i = 0; i < out.size(); ++i) {
      out.data()[i] = interpreter::from_float<bf16>(static_cast<float>(exact->out[i]));
    }
    for (std::size_t i = 0; i < lse.size(); ++i) lse.data()[i] = static_cast<float>(exact->lse[i]);
    for (const Array<bf16>* array : {&q, &k, &v, &out, &dout}) array->give(memory, true);
    for (const Array<bf16>* array : {&dq, &dk, &dv}) array->give(memory, false);
    for (const Array<float>* array : {&lse, &dlse}) array->give(memory, true);
    for (const Array<float>* array : {&delta, &scaled_lse, &dq_acc}) array->give(memory, false);
    memory.add("dq_order", dq_order.data(), dq_order.size() * sizeof(int), false);
    launch.seed = seed;
    launch.resident_blocks = kMultiprocessors;
  }

  // Runs `kernel` over a grid; returns the fault that is found, or nothing.
  template <auto kFunction, typename Params>
  std::string run(const char* kernel, const Params& params, std::array<int, 3> grid, int threads,
                  int shared_bytes, int cluster_size = 1) {
    launch.kernel = kernel;
    launch.entry = entry<kFunction, Params>;
    launch.params = &params;
    for (int i = 0; i < 3; ++i) launch.grid[i] = grid[i];
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    launch.cluster_size = cluster_size;
    const auto report = interpreter::run(launch, memory);
    return report ? report->text() : "";
  }

  template <int kHeadDimV>
  std::string prepare(int zeroed_columns) {
    attention::BackwardPrepareParams params = {};
    params.out = rows_map(out, s, true, 64);
    params.dout = rows_map(dout, s, true, 64);
    params.lse = lse.data();
    params.dlse = dlse.data();
    params.delta = delta.data();
    params.scaled_lse = scaled_lse.data();
    params.lse_factor = kLog2E;
    params.dq_acc = dq_acc.data();
    params.dq_order = dq_order.data();
    params.next_tile = reinterpret_cast<int*>(dq.data());
    params.batch = s.batch;
    params.seqlen_q = s.seqlen_q;
    params.num_heads = s.num_heads;
    params.zeroed_columns = zeroed_columns;
    return run<attention::backward_prepare<bf16, kHeadDimV>>(
        "tk_attention_bwd_prepare", params, {padded_q / 64, s.num_heads, s.batch}, 128,
        attention::backward_prepare_shared_bytes(kHeadDimV));
  }

  // What every kernel after it is told alike.
  template <typename Params>
  void set_problem(Params& params) {
    params.delta = delta.data();
    params.scaled_lse = scaled_lse.data();
    params.batch = s.batch;
    params.seqlen_q = s.seqlen_q;
    params.seqlen_kv = s.seqlen_kv;
    params.num_heads = s.num_heads;
    params.num_kv_heads = s.num_kv_heads;
    params.first_offset = s.first_offset;
    params.last_offset = s.last_offset;
    params.padded_q = padded_q;
    params.scale = s.scale();
  }

  // What is wrong with the gradients, or nothing.
  std::string wrong(bool deterministic) {
    std::string wrong = compare(dv, exact->dv, 0.01);
    if (wrong.empty()) wrong = compare(dk, exact->dk, 0.01);
    if (wrong.empty()) wrong = compare(dq, exact->dq, 0.01);
    if (!wrong.empty() || !deterministic) return wrong;

    // The same bits in every schedule.
    static std::vector<std::pair<Attention, std::vector<char>>> seen;
    const char* bits = reinterpret_cast<const char*>(dq.data());
    const std::vector<char> now(bits, bits + dq.size() * sizeof(bf16));
    for (const auto& [shape, before] : seen) {
      if (std::memcmp(&shape, &s, sizeof(s)) == 0) {
        return before == now ? "" : "wrong dq: other bits than in an earlier schedule";
      }
    }
    seen.emplace_back(s, now);
    return "";
  }

  const Attention s;
  const int padded_q;
  const std::size_t padded_rows;
  Array<bf16> q, k, v, out, dout, dq, dk, dv;
  Array<float> lse, dlse, delta, scaled_lse, dq_acc;
  Array<int> dq_order;
  const ExactAttention* exact = nullptr;
  interpreter::Memory memory;
  interpreter::Launch launch = {};

 private:
  // Computed once for each shape.
  void find_exact() {
    static std::vector<std::pair<Attention, std::unique_ptr<ExactAttention>>> known;
    for (const auto& [shape, results] : known) {
      if (std::memcmp(&shape, &s, sizeof(s)) == 0) exact = results.get();
    }
    if (exact != nullptr) return;
    known.emplace_back(
        s, std::make_unique<ExactAttention>(exact_attention<bf16>(s, q, k, v, &dout, &dlse)));
    exact = known.back().second.get();
  }
};

}  // namespace tk::check
