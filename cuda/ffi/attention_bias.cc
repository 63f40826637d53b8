// The target tk_attention_bwd_bias_v1: the gradient of a bias, from what the backward pass has
// left.
#include <algorithm>

#include "ffi/attention_extras.h"
#include "ffi/attention_kernels.h"
#include "ffi/attention_problem.h"
#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_attention_bwd_bias_v1";

runtime::KernelTable<KernelKey> kernels;

struct Buffers {
  AnyBuffer q, k, v, dout, delta, scaled_lse;
  AnyBuffer dbias;
  xffi::RemainingArgs extras;
};

struct Call {
  AttentionSizes sizes;
  ExtraBuffers extras;
  AttentionBiasKernel kernel;
  bool shares_queries, shares_keys;
  bool empty;
};

Result<Call> read_call(const Buffers& b, const attention::Options& options) {
  const auto extras = read_extras(b.extras);
  if (!extras.ok()) return extras.error();
  if (!extras->bias) return invalid("there is no bias");
  const auto sizes = read_sizes(b.q, b.k, b.v, *extras, options);
  if (!sizes.ok()) return sizes.error();
  const AttentionSizes& s = *sizes;
  const AnyBuffer& bias = *extras->bias;
  const bool shares_queries = dim(bias, 2) == 1, shares_keys = dim(bias, 3) == 1;
  const bool is_float = b.dbias.element_type() == xffi::DataType::F32;
  const bool needs_float = is_float || shares_queries || shares_keys;
  if (Status status = first_error(
          {check_dims("dout", b.dout, {s.batch, s.seqlen_q, s.num_heads, s.head_dim_v}),
           check_dtype("dout", b.dout, b.q.element_type()),
           check_dims("delta", b.delta, {s.batch, s.num_heads, s.padded_q()}),
           check_dtype("delta", b.delta, xffi::DataType::F32),
           check_dims("scaled_lse", b.scaled_lse, {s.batch, s.num_heads, s.padded_q()}),
           check_dtype("scaled_lse", b.scaled_lse, xffi::DataType::F32),
           check_dims(
               "dbias", b.dbias,
               {dim(bias, 0), dim(bias, 1), shares_queries ? attention::kBiasBlockQ : s.seqlen_q,
                shares_keys ? attention::kBiasBlockKv : s.seqlen_kv}),
           check_dtype("dbias", b.dbias, needs_float ? xffi::DataType::F32 : bias.element_type()),
           check_masks(*extras, s, MapBlock{attention::kBiasBlockQ, attention::kBiasBlockKv},
                       std::nullopt)});
      !status.ok()) {
    return status.error();
  }
  const auto empty = is_empty(s, /*backward=*/true);
  if (!empty.ok()) return empty.error();
  if (*empty && b.dbias.element_count() != 0) {
    return invalid("dbias has shape " + shape_text(b.dbias) + ", but there are no scores");
  }
  return Call{
      s,
      *extras,
      {s.dtype, attention::tile_head_dim(s.head_dim), attention::tile_head_dim(s.head_dim_v),
       mask_of(options), features_of(*extras, options)},
      shares_queries,
      shares_keys,
      *empty};
}

Status execute(const Execution& on, const Buffers& b, const attention::Options& options) {
  const auto call = read_call(b, options);
  if (!call.ok()) return call.error();
  if (call->empty) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"dout", b.dout, false},
                  {"delta", b.delta, false},
                  {"scaled_lse", b.scaled_lse, false},
                  {"dbias", b.dbias, true}},
                 call->extras);

  const AttentionSizes& s = call->sizes;
  attention::BackwardBiasParams params = {};
  if (Status status =
          first_error({encode_rows(&params.q, b.q, s, 64), encode_rows(&params.dout, b.dout, s, 64),
                       encode_rows(&params.k, b.k, s, attention::kBiasBlockKv),
                       encode_rows(&params.v, b.v, s, attention::kBiasBlockKv)});
      !status.ok()) {
    return status;
  }
  params.delta = static_cast<const float*>(b.delta.untyped_data());
  params.scaled_lse = static_cast<const float*>(b.scaled_lse.untyped_data());
  params.dbias = b.dbias.untyped_data();
  params.shares_queries = call->shares_queries;
  params.shares_keys = call->shares_keys;
  params.float_result = b.dbias.element_type() == xffi::DataType::F32;
  params.bias_batches = static_cast<int>(dim(b.dbias, 0));
  params.bias_heads = static_cast<int>(dim(b.dbias, 1));
  params.padded_q = static_cast<int>(s.padded_q());
  set_problem(&params, s, call->extras, options);
  const std::int64_t tiles = ceil_div(dim(b.dbias, 2), attention::kBiasBlockQ) *
                             ceil_div(dim(b.dbias, 3), attention::kBiasBlockKv) * dim(b.dbias, 1) *
                             dim(b.dbias, 0);
  if (tiles > kMaxInt) return unsupported("more than 2^31 - 1 tiles of dbias");
  return runtime::launch(**kernel, on.stream,
                         {std::min<std::int64_t>(on.device.multiprocessors, tiles)}, &params);
}

using Ret = xffi::Result<AnyBuffer>;

xffi::Error call(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                 AnyBuffer delta, AnyBuffer scaled_lse, xffi::RemainingArgs extras, Ret dbias,
                 attention::Options options) {
  const Buffers buffers = {q, k, v, dout, delta, scaled_lse, *dbias, extras};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return load(kernels, read_call(buffers, options), device); },
      [&](const Execution& on) { return execute(on, buffers, options); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // delta
      .template Arg<AnyBuffer>()  // scaled_lse
      .RemainingArgs()            // ExtraBuffers
      .template Ret<AnyBuffer>()  // dbias
      .template Attr<attention::Options>("options");
}

}  // namespace

TK_DEFINE_TARGET(kAttentionBiasTarget, kName, call, bind);

}  // namespace tk::ffi
