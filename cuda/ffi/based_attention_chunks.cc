// The targets tk_based_attention_chunk_outputs_v1 and tk_based_attention_gradients_v1: kernels that
// compute each chunk from the states around it.
#include <algorithm>

#include "ffi/based_attention_problem.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kOutputsName = "tk_based_attention_chunk_outputs_v1";
constexpr const char* kGradientsName = "tk_based_attention_gradients_v1";

using Name = BasedAttentionKernel::Name;

struct ChunksCall {
  LinearAttentionSizes sizes;
  BasedAttentionKernel kernel;

  runtime::Grid grid() const { return {sizes.chunks(), sizes.num_groups, sizes.batch}; }
};

// Checks what both targets have; `also` is what else there is to check.
template <typename Also>
Result<ChunksCall> read_chunks(Name name, const AnyBuffer& q, const AnyBuffer& k,
                               const AnyBuffer& v, const AnyBuffer& states, const AnyBuffer& counts,
                               const BasedConfig& config, Also&& also) {
  const auto sizes = read_based_attention_sizes("q", q, "v", v);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  if (Status status =
          first_error({check_like("k", k, q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
                       check_chunk_states("states", states, q, s), check_counts(counts, s),
                       check_grid("groups", s.num_groups), also(s)});
      !status.ok()) {
    return status.error();
  }
  return ChunksCall{s, {name, s.dtype, s.key_dim, is_given(counts), config}};
}

// -- Outputs --------------------------------------------------------------------------------------

struct OutputsBuffers {
  AnyBuffer q, k, v, states, counts;
  AnyBuffer out;
};

Result<ChunksCall> read_outputs(const OutputsBuffers& b, const BasedConfig& config) {
  return read_chunks(Name::kChunkOutputs, b.q, b.k, b.v, b.states, b.counts, config,
                     [&](const LinearAttentionSizes& s) {
                       return check_like("out", b.out, b.q,
                                         {s.batch, s.seqlen, s.num_heads, s.value_dim});
                     });
}

Status initialize_outputs(const Device& device, const OutputsBuffers& buffers,
                          const BasedConfig& config) {
  const auto call = read_outputs(buffers, config);
  return call.ok() ? load_based_kernel(device, call->kernel) : call.error();
}

Status execute_outputs(const Execution& on, const OutputsBuffers& b,
                       const GradientsOptions& options, const BasedConfig& config) {
  const auto call = read_outputs(b, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_based_kernel(on.device, call->kernel);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"states", b.states, false},
                  {"counts", b.counts, false},
                  {"out", b.out, true}});

  based_attention::ChunkOutputsParams params = {};
  if (Status status =
          first_error({encode_keys(&params.q, b.q, s), encode_keys(&params.k, b.k, s),
                       encode_tokens(&params.v, b.v, s), encode_tokens(&params.out, b.out, s),
                       encode_chunk_states(&params.states, b.states, s)});
      !status.ok()) {
    return status;
  }
  set_based_sizes(&params, s, b.counts);
  params.scale = options.scale;
  params.factors = query_factors(options.scale);
  return runtime::launch(**kernel, on.stream, call->grid(), &params);
}

// -- Gradients ------------------------------------------------------------------------------------

struct GradientsBuffers {
  AnyBuffer q, k, v, dout, states, dstates, counts;
  AnyBuffer dq, dk, dv;
};

Result<ChunksCall> read_gradients(const GradientsBuffers& b, const BasedConfig& config) {
  return read_chunks(
      Name::kGradients, b.q, b.k, b.v, b.states, b.counts, config,
      [&](const LinearAttentionSizes& s) {
        return first_error(
            {check_like("dout", b.dout, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim}),
             check_chunk_states("dstates", b.dstates, b.q, s),
             check_like("dq", b.dq, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
             check_like("dk", b.dk, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
             check_like("dv", b.dv, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim})});
      });
}

Status initialize_gradients(const Device& device, const GradientsBuffers& buffers,
                            const BasedConfig& config) {
  const auto call = read_gradients(buffers, config);
  return call.ok() ? load_based_kernel(device, call->kernel) : call.error();
}

Status execute_gradients(const Execution& on, const GradientsBuffers& b,
                         const GradientsOptions& options, const BasedConfig& config) {
  const auto call = read_gradients(b, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_based_kernel(on.device, call->kernel);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"dout", b.dout, false},
                  {"states", b.states, false},
                  {"dstates", b.dstates, false},
                  {"counts", b.counts, false},
                  {"dq", b.dq, true},
                  {"dk", b.dk, true},
                  {"dv", b.dv, true}});

  based_attention::GradientsParams params = {};
  if (Status status = first_error(
          {encode_keys(&params.q, b.q, s), encode_keys(&params.k, b.k, s),
           encode_tokens(&params.v, b.v, s), encode_tokens(&params.dout, b.dout, s),
           encode_keys(&params.dq, b.dq, s), encode_keys(&params.dk, b.dk, s),
           encode_tokens(&params.dv, b.dv, s), encode_chunk_states(&params.states, b.states, s),
           encode_chunk_states(&params.dstates, b.dstates, s)});
      !status.ok()) {
    return status;
  }
  set_based_sizes(&params, s, b.counts);
  params.scale = options.scale;
  params.factors = query_factors(options.scale);
  const std::int64_t tiles = s.chunks() * s.num_groups * s.batch;
  params.tiles = static_cast<int>(tiles);
  return runtime::launch(**kernel, on.stream,
                         {std::min<std::int64_t>(on.device.multiprocessors, tiles)}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error outputs(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer states,
                    AnyBuffer counts, Ret out, GradientsOptions options, BasedConfig config) {
  const OutputsBuffers buffers = {q, k, v, states, counts, *out};
  return run_stage(
      kOutputsName, stage,
      [&](const Device& device) { return initialize_outputs(device, buffers, config); },
      [&](const Execution& on) { return execute_outputs(on, buffers, options, config); });
}

xffi::Error gradients(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                      AnyBuffer states, AnyBuffer dstates, AnyBuffer counts, Ret dq, Ret dk, Ret dv,
                      GradientsOptions options, BasedConfig config) {
  const GradientsBuffers buffers = {q, k, v, dout, states, dstates, counts, *dq, *dk, *dv};
  return run_stage(
      kGradientsName, stage,
      [&](const Device& device) { return initialize_gradients(device, buffers, config); },
      [&](const Execution& on) { return execute_gradients(on, buffers, options, config); });
}

template <typename Binding>
auto bind_outputs(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // states
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Ret<AnyBuffer>()  // out
      .template Attr<GradientsOptions>("options")
      .template Attr<BasedConfig>("config");
}

template <typename Binding>
auto bind_gradients(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // states
      .template Arg<AnyBuffer>()  // dstates
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Ret<AnyBuffer>()  // dq
      .template Ret<AnyBuffer>()  // dk
      .template Ret<AnyBuffer>()  // dv
      .template Attr<GradientsOptions>("options")
      .template Attr<BasedConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kBasedAttentionChunkOutputsTarget, kOutputsName, outputs, bind_outputs);
TK_DEFINE_TARGET(kBasedAttentionGradientsTarget, kGradientsName, gradients, bind_gradients);

}  // namespace tk::ffi
