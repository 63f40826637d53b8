// The targets tk_linear_attention_segment_sums_v1, tk_linear_attention_states_v1 and
// tk_linear_attention_outputs_v1: kernels that walk through a sequence.
#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "ffi/linear_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kSegmentSumsName = "tk_linear_attention_segment_sums_v1";
constexpr const char* kStatesName = "tk_linear_attention_states_v1";
constexpr const char* kOutputsName = "tk_linear_attention_outputs_v1";

using linear_attention::WalkConfig;
using Walk = LinearAttentionWalkKernel::Walk;

runtime::KernelTable<KernelKey> kernels;

struct WalkCall {
  LinearAttentionSizes sizes;
  LinearAttentionWalkKernel kernel;
  std::int64_t segments;
};

// Checks what all targets have, of a kernel whose other settings are given.
Result<WalkCall> read_walk(const LinearAttentionSizes& s, Walk walk, unsigned features,
                           std::int64_t chunks_of_segment, const WalkConfig& config) {
  if (chunks_of_segment < 1 || chunks_of_segment > s.chunks()) {
    return invalid("chunks_of_segment is " + std::to_string(chunks_of_segment) +
                   "; expected 1 to the " + std::to_string(s.chunks()) + " chunks there are");
  }
  const std::int64_t segments = ceil_div(s.chunks(), chunks_of_segment);
  const std::int64_t slices = s.num_heads / s.num_groups * s.slices();
  if (config.consumers < 1 || slices % config.consumers != 0) {
    return invalid("config.consumers is " + std::to_string(config.consumers) +
                   "; expected a divisor of the " + std::to_string(slices) +
                   " slices of values of a group");
  }
  if (Status status = check_grid("segments", segments); !status.ok()) return status.error();
  return WalkCall{
      s, {walk, s.dtype, linear_attention::tile_dim(s.key_dim), features, config}, segments};
}
Status check_segment_states(const char* name, const AnyBuffer& states,
                            const LinearAttentionSizes& s, std::int64_t segments) {
  return check_optional_floats(name, states,
                               {s.batch, s.num_heads, segments, s.value_dim, s.key_dim});
}
Status check_marks(const AnyBuffer& marks, const LinearAttentionSizes& s, std::int64_t segments) {
  return check_optional_floats(
      "marks", marks,
      {s.batch, s.num_heads, segments, s.padded_values() / linear_attention::kMarkedRows});
}
// What kernels have that start segments from a state and end them with one.
struct EndBuffers {
  AnyBuffer to, marks;
};
// The same of those.
Result<WalkCall> read_walk(const LinearAttentionSizes& s, Walk walk, unsigned features,
                           std::int64_t chunks_of_segment, const WalkConfig& config,
                           const AnyBuffer& from, const EndBuffers& ends) {
  auto call = read_walk(s, walk, features, chunks_of_segment, config);
  if (!call.ok()) return call;
  if (Status status = first_error({check_segment_states("from", from, s, call->segments),
                                   check_segment_states("to", ends.to, s, call->segments),
                                   check_marks(ends.marks, s, call->segments)});
      !status.ok()) {
    return status.error();
  }
  if (call->segments > 1 && !s.empty() && !(is_given(ends.to) && is_given(ends.marks))) {
    return invalid("several segments need to and marks");
  }
  return call;
}

template <typename Params>
void set_walk(Params* params, const WalkCall& call, const GateBuffers& gates, const AnyBuffer& to,
              std::int64_t chunks_of_segment, float scale) {
  set_sizes(params, call.sizes);
  params->gates = kernel_gates(gates);
  params->to = optional_floats(to);
  params->chunks_of_segment = static_cast<int>(chunks_of_segment);
  params->scale = scale;
}

runtime::Grid grid_of(const WalkCall& call, std::int64_t segments) {
  const LinearAttentionSizes& s = call.sizes;
  return {s.num_heads * s.slices() / call.kernel.config.consumers, segments, s.batch};
}

// -- Sums of segments -----------------------------------------------------------------------------

struct SegmentSumsBuffers {
  AnyBuffer keys, values;
  GateBuffers gates;
  AnyBuffer to, kept;
};

Result<WalkCall> read_segment_sums(const SegmentSumsBuffers& b, const SegmentSumsOptions& options,
                                   const WalkConfig& config) {
  const auto sizes = read_linear_attention_sizes("keys", b.keys, "values", b.values);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  if (Status status = check_gates(b.gates, s); !status.ok()) return status.error();
  const auto call = read_walk(s, options.reverse ? Walk::kReverseSegmentSums : Walk::kSegmentSums,
                              features_of(b.gates), options.chunks_of_segment, config);
  if (!call.ok()) return call;
  const std::int64_t wanted = call->segments - (options.of_all ? 0 : 1);
  if (wanted < 1 && !s.empty()) return invalid("there is one segment; expected several");
  if (!is_given(b.to) && !s.empty()) return invalid("to is not given");
  if (Status status = first_error({check_segment_states("to", b.to, s, wanted),
                                   check_floats("kept", b.kept, {s.batch, s.num_heads, wanted})});
      !status.ok()) {
    return status.error();
  }
  return call;
}

Status execute_segment_sums(const Execution& on, const SegmentSumsBuffers& b,
                            const SegmentSumsOptions& options, const WalkConfig& config) {
  const auto call = read_segment_sums(b, options, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"keys", b.keys, false},
                  {"values", b.values, false},
                  {"sums", b.gates.sums, false},
                  {"weights", b.gates.weights, false},
                  {"counts", b.gates.counts, false},
                  {"to", b.to, true},
                  {"kept", b.kept, true}});

  linear_attention::SegmentSumsParams params = {};
  if (Status status = first_error(
          {encode_tokens(&params.keys, b.keys, s), encode_tokens(&params.values, b.values, s)});
      !status.ok()) {
    return status;
  }
  params.left_out = options.of_all ? 0 : 1;
  params.kept = floats(b.kept);
  set_walk(&params, *call, b.gates, b.to, options.chunks_of_segment, options.scale);
  return runtime::launch(**kernel, on.stream, grid_of(*call, call->segments - params.left_out),
                         &params);
}

// -- States ---------------------------------------------------------------------------------------

struct StatesBuffers {
  AnyBuffer keys, values;
  GateBuffers gates;
  AnyBuffer from;
  AnyBuffer stored;
  EndBuffers ends;
};

Result<WalkCall> read_states(const StatesBuffers& b, const StatesOptions& options,
                             const WalkConfig& config) {
  const auto sizes = read_linear_attention_sizes("keys", b.keys, "values", b.values);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  if (options.stored_every < 1 || options.stored_every > kMaxInt) {
    return invalid("stored_every is " + std::to_string(options.stored_every) +
                   "; expected a number of chunks");
  }
  if (Status status =
          first_error({check_gates(b.gates, s),
                       check_stored_states("stored", b.stored, b.keys, s, options.stored_every)});
      !status.ok()) {
    return status.error();
  }
  return read_walk(s, options.reverse ? Walk::kReverseStates : Walk::kStates, features_of(b.gates),
                   options.chunks_of_segment, config, b.from, b.ends);
}

Status execute_states(const Execution& on, const StatesBuffers& b, const StatesOptions& options,
                      const WalkConfig& config) {
  const auto call = read_states(b, options, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"keys", b.keys, false},
                  {"values", b.values, false},
                  {"sums", b.gates.sums, false},
                  {"weights", b.gates.weights, false},
                  {"counts", b.gates.counts, false},
                  {"from", b.from, false},
                  {"stored", b.stored, true},
                  {"to", b.ends.to, true},
                  {"marks", b.ends.marks, true}});

  linear_attention::StatesParams params = {};
  params.stored_every = static_cast<int>(options.stored_every);
  params.marks = optional_floats(b.ends.marks);
  params.from = optional_floats(b.from);
  if (Status status = first_error({encode_tokens(&params.keys, b.keys, s),
                                   encode_tokens(&params.values, b.values, s),
                                   encode_states(&params.stored, b.stored, s)});
      !status.ok()) {
    return status;
  }
  set_walk(&params, *call, b.gates, b.ends.to, options.chunks_of_segment, options.scale);
  return runtime::launch(**kernel, on.stream, grid_of(*call, call->segments), &params);
}

// -- Outputs --------------------------------------------------------------------------------------

struct OutputsBuffers {
  AnyBuffer q, k, v;
  GateBuffers gates;
  AnyBuffer skip, from;
  AnyBuffer out;
  EndBuffers ends;
};

Result<WalkCall> read_outputs(const OutputsBuffers& b, const OutputsOptions& options,
                              const WalkConfig& config) {
  const auto sizes = read_linear_attention_sizes("q", b.q, "v", b.v);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  if (Status status = first_error(
          {check_like("k", b.k, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
           check_gates(b.gates, s),
           check_optional_floats("skip", b.skip, {s.num_heads, s.padded_values()}),
           check_like("out", b.out, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim})});
      !status.ok()) {
    return status.error();
  }
  const unsigned skip = is_given(b.skip) ? linear_attention::kSkip : 0u;
  return read_walk(s, Walk::kOutputs, features_of(b.gates) | skip, options.chunks_of_segment,
                   config, b.from, b.ends);
}

Status execute_outputs(const Execution& on, const OutputsBuffers& b, const OutputsOptions& options,
                       const WalkConfig& config) {
  const auto call = read_outputs(b, options, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"sums", b.gates.sums, false},
                  {"weights", b.gates.weights, false},
                  {"counts", b.gates.counts, false},
                  {"skip", b.skip, false},
                  {"from", b.from, false},
                  {"out", b.out, true},
                  {"to", b.ends.to, true},
                  {"marks", b.ends.marks, true}});

  linear_attention::OutputsParams params = {};
  if (Status status =
          first_error({encode_tokens(&params.q, b.q, s), encode_tokens(&params.k, b.k, s),
                       encode_tokens(&params.v, b.v, s), encode_tokens(&params.out, b.out, s)});
      !status.ok()) {
    return status;
  }
  params.marks = optional_floats(b.ends.marks);
  params.skip = optional_floats(b.skip);
  params.from = optional_floats(b.from);
  set_walk(&params, *call, b.gates, b.ends.to, options.chunks_of_segment, options.scale);
  return runtime::launch(**kernel, on.stream, grid_of(*call, call->segments), &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error segment_sums(Stage stage, AnyBuffer keys, AnyBuffer values, AnyBuffer sums,
                         AnyBuffer weights, AnyBuffer counts, Ret to, Ret kept,
                         SegmentSumsOptions options, WalkConfig config) {
  const SegmentSumsBuffers buffers = {keys, values, {sums, weights, counts}, *to, *kept};
  return run_stage(
      kSegmentSumsName, stage,
      [&](const Device& device) {
        return load(kernels, read_segment_sums(buffers, options, config), device);
      },
      [&](const Execution& on) { return execute_segment_sums(on, buffers, options, config); });
}

xffi::Error states(Stage stage, AnyBuffer keys, AnyBuffer values, AnyBuffer sums, AnyBuffer weights,
                   AnyBuffer counts, AnyBuffer from, Ret stored, Ret to, Ret marks,
                   StatesOptions options, WalkConfig config) {
  const StatesBuffers buffers = {keys, values,  {sums, weights, counts},
                                 from, *stored, {*to, *marks}};
  return run_stage(
      kStatesName, stage,
      [&](const Device& device) {
        return load(kernels, read_states(buffers, options, config), device);
      },
      [&](const Execution& on) { return execute_states(on, buffers, options, config); });
}

xffi::Error outputs(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer sums,
                    AnyBuffer weights, AnyBuffer counts, AnyBuffer skip, AnyBuffer from, Ret out,
                    Ret to, Ret marks, OutputsOptions options, WalkConfig config) {
  const OutputsBuffers buffers = {q,    k,    v,    {sums, weights, counts},
                                  skip, from, *out, {*to, *marks}};
  return run_stage(
      kOutputsName, stage,
      [&](const Device& device) {
        return load(kernels, read_outputs(buffers, options, config), device);
      },
      [&](const Execution& on) { return execute_outputs(on, buffers, options, config); });
}

template <typename Binding>
auto bind_segment_sums(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // keys
      .template Arg<AnyBuffer>()  // values
      .template Arg<AnyBuffer>()  // sums
      .template Arg<AnyBuffer>()  // weights, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Ret<AnyBuffer>()  // to
      .template Ret<AnyBuffer>()  // kept
      .template Attr<SegmentSumsOptions>("options")
      .template Attr<WalkConfig>("config");
}

template <typename Binding>
auto bind_states(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // keys
      .template Arg<AnyBuffer>()  // values
      .template Arg<AnyBuffer>()  // sums
      .template Arg<AnyBuffer>()  // weights, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // from, or of size 0 for zeros
      .template Ret<AnyBuffer>()  // stored
      .template Ret<AnyBuffer>()  // to, or of size 0
      .template Ret<AnyBuffer>()  // marks, of size 0 for one segment
      .template Attr<StatesOptions>("options")
      .template Attr<WalkConfig>("config");
}

template <typename Binding>
auto bind_outputs(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // sums
      .template Arg<AnyBuffer>()  // weights, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // skip, or of size 0
      .template Arg<AnyBuffer>()  // from, or of size 0 for zeros
      .template Ret<AnyBuffer>()  // out
      .template Ret<AnyBuffer>()  // to, or of size 0
      .template Ret<AnyBuffer>()  // marks, of size 0 for one segment
      .template Attr<OutputsOptions>("options")
      .template Attr<WalkConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kLinearAttentionSegmentSumsTarget, kSegmentSumsName, segment_sums,
                 bind_segment_sums);
TK_DEFINE_TARGET(kLinearAttentionStatesTarget, kStatesName, states, bind_states);
TK_DEFINE_TARGET(kLinearAttentionOutputsTarget, kOutputsName, outputs, bind_outputs);

}  // namespace tk::ffi
