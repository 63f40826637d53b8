// The targets tk_based_attention_states_v1 and tk_based_attention_outputs_v1: kernels that walk
// through a sequence.
#include "ffi/based_attention_problem.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kStatesName = "tk_based_attention_states_v1";
constexpr const char* kOutputsName = "tk_based_attention_outputs_v1";

using Name = BasedAttentionKernel::Name;

// -- States ---------------------------------------------------------------------------------------

struct StatesBuffers {
  AnyBuffer keys, values, counts;
  BasedStartBuffers start;
  AnyBuffer chunk_states, adds, to;
};

Result<BasedWalkCall> read_states(const StatesBuffers& b, const BasedStatesOptions& options,
                                  const BasedConfig& config) {
  const auto sizes = read_based_attention_sizes("keys", b.keys, "values", b.values);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  const bool stores = is_given(b.chunk_states);
  if (Status status = stores ? check_chunk_states("chunk_states", b.chunk_states, b.keys, s)
                             : check_dtype("chunk_states", b.chunk_states, b.keys.element_type());
      !status.ok()) {
    return status.error();
  }
  if (!stores && !is_given(b.to) && !is_given(b.adds) && !s.empty()) {
    return invalid("neither chunk_states nor adds nor to is asked for");
  }
  auto call =
      read_based_walk(s, Name::kStates, b.counts, options.chunks_of_segment, config, b.start, b.to);
  if (!call.ok()) return call;
  if (Status status = check_added("adds", b.adds, s, call->segments); !status.ok()) {
    return status.error();
  }
  if (is_given(b.adds) && (stores || is_given(b.to) || is_given(b.start.from) ||
                           is_given(b.start.added) || is_given(b.start.since))) {
    return invalid("adds is asked for beside other states");
  }
  return call;
}

Status initialize_states(const Device& device, const StatesBuffers& buffers,
                         const BasedStatesOptions& options, const BasedConfig& config) {
  const auto call = read_states(buffers, options, config);
  return call.ok() ? load_based_kernel(device, call->kernel) : call.error();
}

Status execute_states(const Execution& on, const StatesBuffers& b,
                      const BasedStatesOptions& options, const BasedConfig& config) {
  const auto call = read_states(b, options, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_based_kernel(on.device, call->kernel);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"keys", b.keys, false},
                  {"values", b.values, false},
                  {"counts", b.counts, false},
                  {"from", b.start.from, false},
                  {"added", b.start.added, false},
                  {"since", b.start.since, false},
                  {"chunk_states", b.chunk_states, true},
                  {"adds", b.adds, true},
                  {"to", b.to, true}});

  based_attention::StatesParams params = {};
  params.stores = is_given(b.chunk_states);
  params.reverse = options.reverse;
  params.factors =
      options.reverse ? query_factors(options.scale) : ProductFactors{1.0f, 1.0f, 1.0f};
  if (Status status = first_error(
          {encode_keys(&params.keys, b.keys, s), encode_tokens(&params.values, b.values, s),
           params.stores ? encode_chunk_states(&params.chunk_states, b.chunk_states, s)
                         : Status()});
      !status.ok()) {
    return status;
  }
  set_based_walk(&params, *call, b.counts, b.start, b.to, options.chunks_of_segment);
  params.adds = optional_floats(b.adds);
  const int pieces = based_attention::state_pieces(static_cast<int>(s.key_dim));
  // Nothing starts after the last.
  const std::int64_t segments = call->segments - (is_given(b.adds) ? 1 : 0);
  return runtime::launch(**kernel, on.stream,
                         {s.num_heads * s.slices() * pieces, segments, s.batch}, &params);
}

// -- Outputs --------------------------------------------------------------------------------------

struct OutputsBuffers {
  AnyBuffer q, k, v, counts;
  BasedStartBuffers start;
  AnyBuffer sums;
  AnyBuffer out, to, divisors;
};

Result<BasedWalkCall> read_outputs(const OutputsBuffers& b, const BasedOutputsOptions& options,
                                   const BasedConfig& config) {
  const auto sizes = read_based_attention_sizes("q", b.q, "v", b.v);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  if (Status status = first_error(
          {check_like("k", b.k, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
           check_like("out", b.out, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim})});
      !status.ok()) {
    return status.error();
  }
  auto call = read_based_walk(s, Name::kOutputs, b.counts, options.chunks_of_segment, config,
                              b.start, b.to);
  if (!call.ok()) return call;
  call->kernel.normalize = options.normalize;
  if ((is_given(b.sums) || is_given(b.divisors)) && !options.normalize) {
    return invalid("sums or divisors of what is not normalized");
  }
  if (Status status = first_error(
          {check_optional_floats("sums", b.sums, {s.batch, s.num_heads, call->segments, 18, 16}),
           check_optional_floats("divisors", b.divisors, {s.batch, s.num_heads, s.padded()})});
      !status.ok()) {
    return status.error();
  }
  return call;
}

Status initialize_outputs(const Device& device, const OutputsBuffers& buffers,
                          const BasedOutputsOptions& options, const BasedConfig& config) {
  const auto call = read_outputs(buffers, options, config);
  return call.ok() ? load_based_kernel(device, call->kernel) : call.error();
}

Status execute_outputs(const Execution& on, const OutputsBuffers& b,
                       const BasedOutputsOptions& options, const BasedConfig& config) {
  const auto call = read_outputs(b, options, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_based_kernel(on.device, call->kernel);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"counts", b.counts, false},
                  {"from", b.start.from, false},
                  {"added", b.start.added, false},
                  {"since", b.start.since, false},
                  {"sums", b.sums, false},
                  {"out", b.out, true},
                  {"to", b.to, true},
                  {"divisors", b.divisors, true}});

  based_attention::OutputsParams params = {};
  if (Status status =
          first_error({encode_keys(&params.q, b.q, s), encode_keys(&params.k, b.k, s),
                       encode_tokens(&params.v, b.v, s), encode_tokens(&params.out, b.out, s)});
      !status.ok()) {
    return status;
  }
  params.sums = optional_floats(b.sums);
  params.divisors = optional_floats(b.divisors);
  params.scale = options.scale;
  params.factors = query_factors(options.scale);
  params.factors_are_powers = is_power_of_two(options.scale);
  set_based_walk(&params, *call, b.counts, b.start, b.to, options.chunks_of_segment);
  return runtime::launch(**kernel, on.stream, {s.num_heads * s.slices(), call->segments, s.batch},
                         &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error states(Stage stage, AnyBuffer keys, AnyBuffer values, AnyBuffer counts, AnyBuffer from,
                   AnyBuffer added, AnyBuffer since, Ret chunk_states, Ret adds, Ret to,
                   BasedStatesOptions options, BasedConfig config) {
  const StatesBuffers buffers = {keys,          values, counts, {from, added, since},
                                 *chunk_states, *adds,  *to};
  return run_stage(
      kStatesName, stage,
      [&](const Device& device) { return initialize_states(device, buffers, options, config); },
      [&](const Execution& on) { return execute_states(on, buffers, options, config); });
}

xffi::Error outputs(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer counts,
                    AnyBuffer from, AnyBuffer added, AnyBuffer since, AnyBuffer sums, Ret out,
                    Ret to, Ret divisors, BasedOutputsOptions options, BasedConfig config) {
  const OutputsBuffers buffers = {q,    k,    v,   counts,   {from, added, since},
                                  sums, *out, *to, *divisors};
  return run_stage(
      kOutputsName, stage,
      [&](const Device& device) { return initialize_outputs(device, buffers, options, config); },
      [&](const Execution& on) { return execute_outputs(on, buffers, options, config); });
}

template <typename Binding>
auto bind_states(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // keys
      .template Arg<AnyBuffer>()  // values
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // from, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // added, or of size 0
      .template Arg<AnyBuffer>()  // since, or of size 0
      .template Ret<AnyBuffer>()  // chunk_states, or of size 0
      .template Ret<AnyBuffer>()  // adds, or of size 0
      .template Ret<AnyBuffer>()  // to, or of size 0
      .template Attr<BasedStatesOptions>("options")
      .template Attr<BasedConfig>("config");
}

template <typename Binding>
auto bind_outputs(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // from, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // added, or of size 0
      .template Arg<AnyBuffer>()  // since, or of size 0
      .template Arg<AnyBuffer>()  // sums, or of size 0 for zeros
      .template Ret<AnyBuffer>()  // out
      .template Ret<AnyBuffer>()  // to, or of size 0
      .template Ret<AnyBuffer>()  // divisors, or of size 0
      .template Attr<BasedOutputsOptions>("options")
      .template Attr<BasedConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kBasedAttentionStatesTarget, kStatesName, states, bind_states);
TK_DEFINE_TARGET(kBasedAttentionOutputsTarget, kOutputsName, outputs, bind_outputs);

}  // namespace tk::ffi
