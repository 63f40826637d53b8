// The target tk_attention_fwd_v1.
#include <algorithm>

#include "ffi/attention_extras.h"
#include "ffi/attention_kernels.h"
#include "ffi/attention_problem.h"
#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/sections.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_attention_fwd_v1";

runtime::KernelTable<KernelKey> kernels;

using Sizes = AttentionSizes;

struct ForwardBuffers {
  AnyBuffer q, k, v;
  AnyBuffer out, lse, lse_rest;  // the last of size 0 without a bias
  xffi::RemainingArgs extras;
};

struct ForwardCall {
  Sizes sizes;
  ExtraBuffers extras;
  AttentionForwardKernel kernel;
  bool empty;
};

Result<ForwardCall> read_forward(const ForwardBuffers& b, const attention::Options& options,
                                 const attention::ForwardConfig& config) {
  const auto extras = read_extras(b.extras);
  if (!extras.ok()) return extras.error();
  const auto sizes = read_sizes(b.q, b.k, b.v, *extras, options);
  if (!sizes.ok()) return sizes.error();
  const Sizes& s = *sizes;
  const unsigned features = features_of(*extras, options) | bias_reading(*extras);
  const MapBlock block = {config.block_q, config.block_kv};
  const std::int64_t rests = (features & attention::kBias) != 0 ? s.seqlen_q : 0;
  if (Status status =
          first_error({check_dims("out", b.out, {s.batch, s.seqlen_q, s.num_heads, s.head_dim_v}),
                       check_dtype("out", b.out, b.q.element_type()),
                       check_dims("lse", b.lse, {s.batch, s.seqlen_q, s.num_heads}),
                       check_dtype("lse", b.lse, xffi::DataType::F32),
                       check_dims("lse_rest", b.lse_rest, {s.batch, rests, s.num_heads}),
                       check_dtype("lse_rest", b.lse_rest, xffi::DataType::F32),
                       check_maps(*extras, s, block, std::nullopt),
                       check_masks(*extras, s, block, std::nullopt)});
      !status.ok()) {
    return status.error();
  }
  const auto empty = is_empty(s, /*backward=*/false);
  if (!empty.ok()) return empty.error();
  return ForwardCall{s,
                     *extras,
                     {s.dtype, attention::tile_head_dim(s.head_dim),
                      attention::tile_head_dim(s.head_dim_v), mask_of(options), features, config},
                     *empty};
}

// choose_section, which takes some microseconds: calls come again and again in the same sizes.
int section_of(const ForwardCall& call, std::int64_t workers,
               const attention::ForwardParams& params) {
  const Sizes& s = call.sizes;
  const AttentionForwardKernel& k = call.kernel;
  if (k.mask == attention::Mask::kNone) return 0;
  const std::int64_t kv_row_bytes = 2 * s.seqlen_kv * (s.head_dim + s.head_dim_v);
  const attention::TileGrid grid = {
      k.config.block_q,
      k.config.block_kv,
      attention::forward_lead(s.seqlen_q, k.config.block_q, k.mask, k.features),
      s.seqlen_q,
      s.seqlen_kv,
      params.first_offset,
      params.last_offset,
      s.num_heads * s.batch,
      workers,
      kv_row_bytes * s.num_kv_heads / s.num_heads};
  thread_local attention::TileGrid last = {};
  thread_local int section = 0;
  if (grid != last) {
    section = attention::choose_section(grid);
    last = grid;
  }
  return section;
}

Status execute_forward(const Execution& on, const ForwardBuffers& b,
                       const attention::Options& options, const attention::ForwardConfig& config) {
  const auto call = read_forward(b, options, config);
  if (!call.ok()) return call.error();
  if (call->empty) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"out", b.out, true},
                  {"lse", b.lse, true},
                  {"lse_rest", b.lse_rest, true}},
                 call->extras);

  const Sizes& s = call->sizes;
  attention::ForwardParams params = {};
  if (Status status = first_error({encode_rows(&params.q, b.q, s, 64),
                                   encode_rows(&params.k, b.k, s, config.block_kv),
                                   encode_rows(&params.v, b.v, s, config.block_kv),
                                   encode_rows(&params.out, b.out, s, 64)});
      !status.ok()) {
    return status;
  }
  if ((call->kernel.features & attention::kTiledBias) != 0) {
    if (Status status = encode_bias(&params.bias, call->extras, config.block_kv); !status.ok()) {
      return status;
    }
  }
  params.out_rows = b.out.untyped_data();
  params.head_dim_v = static_cast<int>(s.head_dim_v);
  params.lse = static_cast<float*>(b.lse.untyped_data());
  params.lse_rest = static_cast<float*>(b.lse_rest.untyped_data());
  set_problem(&params, s, call->extras, options);
  const std::int64_t tiles = ceil_div(s.seqlen_q, config.block_q) * s.num_heads * s.batch;
  const std::int64_t blocks = std::min<std::int64_t>(on.device.multiprocessors, tiles);
  params.section = section_of(*call, blocks, params);
  return runtime::launch(**kernel, on.stream, {blocks}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error forward(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, xffi::RemainingArgs extras,
                    Ret out, Ret lse, Ret lse_rest, attention::Options options,
                    attention::ForwardConfig config) {
  const ForwardBuffers buffers = {q, k, v, *out, *lse, *lse_rest, extras};
  return run_stage(
      kName, stage,
      [&](const Device& device) {
        return load(kernels, read_forward(buffers, options, config), device);
      },
      [&](const Execution& on) { return execute_forward(on, buffers, options, config); });
}

template <typename Binding>
auto bind_forward(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .RemainingArgs()            // ExtraBuffers
      .template Ret<AnyBuffer>()  // out
      .template Ret<AnyBuffer>()  // lse
      .template Ret<AnyBuffer>()  // lse_rest, or of size 0
      .template Attr<attention::Options>("options")
      .template Attr<attention::ForwardConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kAttentionForwardTarget, kName, forward, bind_forward);

}  // namespace tk::ffi
