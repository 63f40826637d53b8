// The target tk_linear_attention_gradients_v1: the gradients of a chunk from the states around it.
#include <algorithm>

#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "ffi/linear_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_linear_attention_gradients_v1";

runtime::KernelTable<KernelKey> kernels;

struct Buffers {
  AnyBuffer q, k, v, dout, states, dstates;
  GateBuffers gates;
  AnyBuffer skip;
  AnyBuffer dq, dk, dv, as_query, as_key, to_state, through, dweights, dskip;
};

struct Call {
  LinearAttentionSizes sizes;
  LinearAttentionGradientsKernel kernel;
};

Status check_arrays(const Buffers& b, const LinearAttentionSizes& s) {
  const std::int64_t chunks = s.chunks(), columns = s.padded_values();
  return first_error(
      {check_like("k", b.k, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
       check_like("dout", b.dout, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim}),
       check_stored_states("states", b.states, b.q, s, linear_attention::kPair),
       check_stored_states("dstates", b.dstates, b.q, s, linear_attention::kPair),
       check_gates(b.gates, s), check_optional_floats("skip", b.skip, {s.num_heads, columns}),
       check_like("dq", b.dq, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
       check_like("dk", b.dk, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
       check_like("dv", b.dv, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim}),
       check_floats("as_query", b.as_query, {s.batch, s.num_heads, s.padded()}),
       check_floats("as_key", b.as_key, {s.batch, s.num_heads, s.padded()}),
       check_floats("to_state", b.to_state, {s.batch, s.num_heads, s.padded()}),
       check_floats("through", b.through, {s.batch, s.num_heads, s.padded()}),
       check_optional_floats("dweights", b.dweights, {s.batch, s.num_heads, s.padded()}),
       check_optional_floats("dskip", b.dskip, {s.batch, s.num_heads, chunks, columns})});
}

Result<Call> read_call(const Buffers& b, const GradientsConfig& config) {
  const auto sizes = read_linear_attention_sizes("q", b.q, "v", b.v);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  if (Status status = check_arrays(b, s); !status.ok()) return status.error();
  if (is_given(b.gates.weights) != is_given(b.dweights) || is_given(b.skip) != is_given(b.dskip)) {
    return invalid("weights and dweights go together, and so do skip and dskip");
  }
  const std::int64_t tile = linear_attention::tile_dim(s.key_dim);
  if (tile > linear_attention::kMaxKeyDim) {
    return unsupported("keys of " + std::to_string(s.key_dim) +
                       " dimensions; the kernels take up to " +
                       std::to_string(linear_attention::kMaxKeyDim));
  }
  const unsigned skip = is_given(b.skip) ? linear_attention::kSkip : 0u;
  return Call{s, {s.dtype, tile, features_of(b.gates) | skip, config}};
}

Status execute(const Execution& on, const Buffers& b, const GradientsOptions& options,
               const GradientsConfig& config) {
  const auto call = read_call(b, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"dout", b.dout, false},
                  {"states", b.states, false},
                  {"dstates", b.dstates, false},
                  {"sums", b.gates.sums, false},
                  {"weights", b.gates.weights, false},
                  {"counts", b.gates.counts, false},
                  {"skip", b.skip, false},
                  {"dq", b.dq, true},
                  {"dk", b.dk, true},
                  {"dv", b.dv, true},
                  {"as_query", b.as_query, true},
                  {"as_key", b.as_key, true},
                  {"to_state", b.to_state, true},
                  {"through", b.through, true},
                  {"dweights", b.dweights, true},
                  {"dskip", b.dskip, true}});

  linear_attention::GradientsParams params = {};
  if (Status status = first_error(
          {encode_tokens(&params.q, b.q, s), encode_tokens(&params.k, b.k, s),
           encode_tokens(&params.v, b.v, s), encode_tokens(&params.dout, b.dout, s),
           encode_tokens(&params.dq, b.dq, s), encode_tokens(&params.dk, b.dk, s),
           encode_tokens(&params.dv, b.dv, s), encode_states(&params.states, b.states, s),
           encode_states(&params.dstates, b.dstates, s)});
      !status.ok()) {
    return status;
  }
  params.gates = kernel_gates(b.gates);
  params.skip = optional_floats(b.skip);
  params.as_query = floats(b.as_query);
  params.as_key = floats(b.as_key);
  params.to_state = floats(b.to_state);
  params.through = floats(b.through);
  params.dweights = optional_floats(b.dweights);
  params.dskip = optional_floats(b.dskip);
  set_sizes(&params, s);
  params.group_heads = static_cast<int>(s.num_heads / s.num_groups);
  params.scale = options.scale;
  const std::int64_t places =
      s.batch * s.num_groups * s.chunks() * linear_attention::gradients_parts(call->kernel.key_dim);
  params.places = static_cast<int>(places);
  const auto blocks = std::min<std::int64_t>(places, on.device.multiprocessors);
  return runtime::launch(**kernel, on.stream, {blocks, 1, 1}, &params);
}

using Ret = xffi::Result<AnyBuffer>;

xffi::Error call(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                 AnyBuffer states, AnyBuffer dstates, AnyBuffer sums, AnyBuffer weights,
                 AnyBuffer counts, AnyBuffer skip, Ret dq, Ret dk, Ret dv, Ret as_query, Ret as_key,
                 Ret to_state, Ret through, Ret dweights, Ret dskip, GradientsOptions options,
                 GradientsConfig config) {
  const Buffers buffers = {
      q,        k,         v,     dout, states,    dstates, {sums, weights, counts},
      skip,     *dq,       *dk,   *dv,  *as_query, *as_key, *to_state,
      *through, *dweights, *dskip};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return load(kernels, read_call(buffers, config), device); },
      [&](const Execution& on) { return execute(on, buffers, options, config); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // states
      .template Arg<AnyBuffer>()  // dstates
      .template Arg<AnyBuffer>()  // sums
      .template Arg<AnyBuffer>()  // weights, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // skip, or of size 0
      .template Ret<AnyBuffer>()  // dq
      .template Ret<AnyBuffer>()  // dk
      .template Ret<AnyBuffer>()  // dv
      .template Ret<AnyBuffer>()  // as_query
      .template Ret<AnyBuffer>()  // as_key
      .template Ret<AnyBuffer>()  // to_state
      .template Ret<AnyBuffer>()  // through
      .template Ret<AnyBuffer>()  // dweights, of size 0 without weights
      .template Ret<AnyBuffer>()  // dskip, of size 0 without skip
      .template Attr<GradientsOptions>("options")
      .template Attr<GradientsConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kLinearAttentionGradientsTarget, kName, call, bind);

}  // namespace tk::ffi
