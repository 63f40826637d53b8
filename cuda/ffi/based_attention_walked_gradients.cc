// The target tk_based_attention_walked_gradients_v1: dq of a walk forward, or dk and dv of one in
// reverse.
#include "ffi/based_attention_problem.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_based_attention_walked_gradients_v1";

struct Buffers {
  AnyBuffer q, k, v, dout, counts;
  BasedStartBuffers start;
  AnyBuffer changes, sums;
  AnyBuffer dkeys, dv, to;
};

// Whether dq or dk is the sum over several heads or slices, which come as parts.
bool in_parts(const LinearAttentionSizes& s) { return s.num_heads * s.slices() != s.num_groups; }

Status check_dkeys(const Buffers& b, const LinearAttentionSizes& s) {
  if (!in_parts(s)) {
    return check_like("dkeys", b.dkeys, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim});
  }
  return first_error(
      {check_dims("dkeys", b.dkeys, {s.batch, s.seqlen, s.num_heads, s.slices(), s.key_dim}),
       check_dtype("dkeys", b.dkeys, xffi::DataType::F32)});
}

Status check_normalized(const Buffers& b, const BasedWalkCall& call) {
  const LinearAttentionSizes& s = call.sizes;
  if (!is_given(b.changes)) {
    return is_given(b.sums) ? Status(invalid("sums of what is not normalized")) : Status();
  }
  return first_error(
      {check_floats("changes", b.changes, {s.batch, s.num_heads, s.slices(), s.padded()}),
       check_optional_floats("sums", b.sums, {s.batch, s.num_heads, call.segments, 18, 16})});
}

Result<BasedWalkCall> read(const Buffers& b, const BasedStatesOptions& options,
                           const BasedConfig& config) {
  const auto sizes = read_based_attention_sizes("q", b.q, "v", b.v);
  if (!sizes.ok()) return sizes.error();
  const LinearAttentionSizes& s = *sizes;
  const auto check_values = [&](const char* name, const AnyBuffer& buffer) {
    return check_like(name, buffer, b.q, {s.batch, s.seqlen, s.num_heads, s.value_dim});
  };
  if (Status status =
          first_error({check_like("k", b.k, b.q, {s.batch, s.seqlen, s.num_groups, s.key_dim}),
                       check_values("dout", b.dout), check_dkeys(b, s),
                       options.reverse ? check_values("dv", b.dv) : Status()});
      !status.ok()) {
    return status.error();
  }
  if (!options.reverse && is_given(b.dv)) return invalid("dv is asked for beside dq");
  auto call = read_based_walk(s, BasedAttentionKernel::Name::kWalkedGradients, b.counts,
                              options.chunks_of_segment, config, b.start, b.to);
  if (!call.ok()) return call;
  call->kernel.reverse = options.reverse;
  call->kernel.normalize = is_given(b.changes);
  if (Status status = check_normalized(b, *call); !status.ok()) return status.error();
  return call;
}

Status initialize(const Device& device, const Buffers& buffers, const BasedStatesOptions& options,
                  const BasedConfig& config) {
  const auto call = read(buffers, options, config);
  return call.ok() ? load_based_kernel(device, call->kernel) : call.error();
}

Status execute(const Execution& on, const Buffers& b, const BasedStatesOptions& options,
               const BasedConfig& config) {
  const auto call = read(b, options, config);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_based_kernel(on.device, call->kernel);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"dout", b.dout, false},
                  {"counts", b.counts, false},
                  {"from", b.start.from, false},
                  {"added", b.start.added, false},
                  {"since", b.start.since, false},
                  {"changes", b.changes, false},
                  {"sums", b.sums, false},
                  {"dkeys", b.dkeys, true},
                  {"dv", b.dv, true},
                  {"to", b.to, true}});

  based_attention::WalkedGradientsParams params = {};
  if (Status status =
          first_error({encode_keys(&params.q, b.q, s), encode_keys(&params.k, b.k, s),
                       encode_tokens(&params.v, b.v, s), encode_tokens(&params.dout, b.dout, s),
                       in_parts(s) ? Status() : encode_keys(&params.dkeys_map, b.dkeys, s),
                       options.reverse ? encode_tokens(&params.dv, b.dv, s) : Status()});
      !status.ok()) {
    return status;
  }
  params.dkeys = b.dkeys.untyped_data();
  params.in_parts = in_parts(s);
  params.changes = optional_floats(b.changes);
  params.sums = optional_floats(b.sums);
  params.scale = options.scale;
  params.factors = query_factors(options.scale);
  params.factors_are_powers = is_power_of_two(options.scale);
  set_based_walk(&params, *call, b.counts, b.start, b.to, options.chunks_of_segment);
  return runtime::launch(**kernel, on.stream, {s.num_heads * s.slices(), call->segments, s.batch},
                         &params);
}

using Ret = xffi::Result<AnyBuffer>;

xffi::Error walked_gradients(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                             AnyBuffer counts, AnyBuffer from, AnyBuffer added, AnyBuffer since,
                             AnyBuffer changes, AnyBuffer sums, Ret dkeys, Ret dv, Ret to,
                             BasedStatesOptions options, BasedConfig config) {
  const Buffers buffers = {q,       k,    v,      dout, counts, {from, added, since},
                           changes, sums, *dkeys, *dv,  *to};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return initialize(device, buffers, options, config); },
      [&](const Execution& on) { return execute(on, buffers, options, config); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // from, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // added, or of size 0
      .template Arg<AnyBuffer>()  // since, or of size 0
      .template Arg<AnyBuffer>()  // changes, or of size 0 where nothing is normalized
      .template Arg<AnyBuffer>()  // sums, or of size 0 for zeros
      .template Ret<AnyBuffer>()  // dkeys: dq, or in reverse dk; or its parts
      .template Ret<AnyBuffer>()  // dv, or of size 0
      .template Ret<AnyBuffer>()  // to, or of size 0
      .template Attr<BasedStatesOptions>("options")
      .template Attr<BasedConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kBasedAttentionWalkedGradientsTarget, kName, walked_gradients, bind);

}  // namespace tk::ffi
