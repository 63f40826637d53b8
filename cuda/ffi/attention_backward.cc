// The target tk_attention_bwd_v1.
#include <algorithm>
#include <numbers>

#include "ffi/attention_extras.h"
#include "ffi/attention_kernels.h"
#include "ffi/attention_problem.h"
#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "kernels/attention/attention.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_attention_bwd_v1";

runtime::KernelTable<KernelKey> kernels;

using Sizes = AttentionSizes;

struct BackwardBuffers {
  AnyBuffer q, k, v, out, lse, dout, dlse;
  AnyBuffer dq, dk, dv, delta, scaled_lse, dq_acc, dq_order;
  xffi::RemainingArgs extras;
};

struct BackwardCall {
  Sizes sizes;
  ExtraBuffers extras;
  AttentionBackwardKernels kernels;
  bool empty;
};

// Columns of the workspace in which dq is summed.
std::int64_t sum_columns(const AttentionBackwardKernels& kernels) {
  return kernels.wide() ? 0 : kernels.narrow_head_dim();
}

Status check_backward(const BackwardBuffers& b, const Sizes& s, std::int64_t dq_columns) {
  const auto dtype = b.q.element_type();
  const std::int64_t padded = s.padded_q();
  const bool has_dlse = b.dlse.element_count() != 0;
  return first_error(
      {check_dims("out", b.out, {s.batch, s.seqlen_q, s.num_heads, s.head_dim_v}),
       check_dims("dout", b.dout, {s.batch, s.seqlen_q, s.num_heads, s.head_dim_v}),
       check_dims("dq", b.dq, {s.batch, s.seqlen_q, s.num_heads, s.head_dim}),
       check_dims("dk", b.dk, {s.batch, s.seqlen_kv, s.num_kv_heads, s.head_dim}),
       check_dims("dv", b.dv, {s.batch, s.seqlen_kv, s.num_kv_heads, s.head_dim_v}),
       check_dtype("out", b.out, dtype),
       check_dtype("dout", b.dout, dtype),
       check_dtype("dq", b.dq, dtype),
       check_dtype("dk", b.dk, dtype),
       check_dtype("dv", b.dv, dtype),
       check_dims("lse", b.lse, {s.batch, s.seqlen_q, s.num_heads}),
       check_dtype("lse", b.lse, xffi::DataType::F32),
       has_dlse ? check_dims("dlse", b.dlse, {s.batch, s.seqlen_q, s.num_heads}) : Status(),
       check_dtype("dlse", b.dlse, xffi::DataType::F32),
       check_dims("delta", b.delta, {s.batch, s.num_heads, padded}),
       check_dtype("delta", b.delta, xffi::DataType::F32),
       check_dims("scaled_lse", b.scaled_lse, {s.batch, s.num_heads, padded}),
       check_dtype("scaled_lse", b.scaled_lse, xffi::DataType::F32),
       check_dims("dq_acc", b.dq_acc, {s.batch, s.num_heads, padded, dq_columns}),
       check_dtype("dq_acc", b.dq_acc, xffi::DataType::F32),
       check_dims("dq_order", b.dq_order,
                  {s.batch, s.num_heads, padded / attention::kFragmentRows}),
       check_dtype("dq_order", b.dq_order, xffi::DataType::S32)});
}

Result<BackwardCall> read_backward(const BackwardBuffers& b, const attention::Options& options,
                                   const attention::BackwardConfig& config) {
  const auto extras = read_extras(b.extras);
  if (!extras.ok()) return extras.error();
  const auto sizes = read_sizes(b.q, b.k, b.v, *extras, options);
  if (!sizes.ok()) return sizes.error();
  const Sizes& s = *sizes;
  const AttentionBackwardKernels kernels = {s.dtype,
                                            attention::tile_head_dim(s.head_dim),
                                            attention::tile_head_dim(s.head_dim_v),
                                            mask_of(options),
                                            features_of(*extras, options),
                                            options.deterministic,
                                            config};
  const MapBlock block = {config.block_q, config.block_kv};
  const MapBlock dq_block =
      kernels.wide() ? MapBlock{attention::kWideDqBlockQ, config.dq_block_kv} : block;
  const auto mask_block = kernels.wide() ? std::optional(dq_block) : std::nullopt;
  if (Status status = first_error({check_backward(b, s, sum_columns(kernels)),
                                   check_maps(*extras, s, dq_block, block),
                                   check_masks(*extras, s, mask_block, block)});
      !status.ok()) {
    return status.error();
  }
  const auto empty = is_empty(s, /*backward=*/true);
  if (!empty.ok()) return empty.error();
  return BackwardCall{s, *extras, kernels, *empty};
}

// Tiles that run at once.
std::int64_t resident_tiles(const BackwardCall& call, const runtime::Device& device) {
  const AttentionBackwardKernels& k = call.kernels;
  return device.multiprocessors *
         attention::backward_resident_blocks(k.narrow_head_dim(), k.config.block_kv);
}

// Whether key blocks meet different numbers of query blocks.
bool tiles_differ(const AttentionBackwardKernels& k) {
  return k.mask != attention::Mask::kNone || (k.features & attention::kMapFeatures) != 0;
}

// Whether causal key blocks are dealt out in waves.
bool in_waves(const AttentionBackwardKernels& k) {
  return attention::causal_in_waves(k.narrow_head_dim(), k.mask, k.features);
}

std::int64_t tiles_of(const BackwardCall& call) {
  const Sizes& s = call.sizes;
  return ceil_div(s.seqlen_kv, call.kernels.config.block_kv) * s.num_kv_heads * s.batch;
}

// The grid that attention.h asks for at BackwardParams.
std::int64_t backward_blocks(const BackwardCall& call, std::int64_t resident) {
  const AttentionBackwardKernels& k = call.kernels;
  const std::int64_t key_blocks = ceil_div(call.sizes.seqlen_kv, k.config.block_kv);
  const std::int64_t tiles = tiles_of(call);
  if (in_waves(k)) return std::min(tiles, resident);
  if (tiles_differ(k)) return tiles;
  if (!k.deterministic) return std::min(tiles, resident);
  const std::int64_t whole_heads = resident / key_blocks * key_blocks;
  return std::min({tiles, resident, std::max(key_blocks, whole_heads)});
}

// In a fixed order and without a mask, blocks of whole heads run together. Where these leave a
// tenth of the multiprocessors idle, or may do so because elements have lengths, the causal kernel,
// told that every query sees all keys, is better: it deals tiles out one by one.
void settle_mask(BackwardCall* call, const runtime::Device& device) {
  AttentionBackwardKernels& k = call->kernels;
  if (call->empty || k.wide() || !k.deterministic || k.mask != attention::Mask::kNone ||
      (k.features & attention::kMapFeatures) != 0) {
    return;
  }
  const std::int64_t resident = resident_tiles(*call, device);
  const std::int64_t blocks = backward_blocks(*call, resident);
  const std::int64_t tiles = tiles_of(*call);
  const bool lengths =
      (k.features & attention::kLengths) != 0 &&
      attention::causal_in_waves(k.narrow_head_dim(), attention::Mask::kCausal, k.features);
  if (tiles >= 2 * resident && (lengths || 10 * blocks < 9 * resident)) {
    k.mask = attention::Mask::kCausal;
  }
}

Status initialize_backward(const Device& device, const BackwardBuffers& buffers,
                           const attention::Options& options,
                           const attention::BackwardConfig& config) {
  auto call = read_backward(buffers, options, config);
  if (!call.ok()) return call.error();
  settle_mask(&*call, device);
  const AttentionBackwardKernels& k = call->kernels;
  const auto prepare = kernels.load(k.prepare_key(), device, [&] { return k.prepare_spec(); });
  if (!prepare.ok()) return prepare.error();
  const auto main = kernels.load(k.main_key(), device, [&] { return k.main_spec(); });
  if (!main.ok()) return main.error();
  const auto last = kernels.load(k.last_key(), device, [&] { return k.last_spec(); });
  return last.ok() ? Status() : last.error();
}

Status launch_prepare(const runtime::Kernel& kernel, runtime::cuda::Stream stream,
                      const BackwardBuffers& b, const BackwardCall& call,
                      const attention::Options& options) {
  const Sizes& s = call.sizes;
  attention::BackwardPrepareParams params = {};
  if (Status status = first_error(
          {encode_rows(&params.out, b.out, s, 64), encode_rows(&params.dout, b.dout, s, 64)});
      !status.ok()) {
    return status;
  }
  params.lse = static_cast<const float*>(b.lse.untyped_data());
  params.dlse =
      b.dlse.element_count() == 0 ? nullptr : static_cast<const float*>(b.dlse.untyped_data());
  params.delta = static_cast<float*>(b.delta.untyped_data());
  params.scaled_lse = static_cast<float*>(b.scaled_lse.untyped_data());
  params.dq_acc = static_cast<float*>(b.dq_acc.untyped_data());
  params.dq_order = static_cast<int*>(b.dq_order.untyped_data());
  if (in_waves(call.kernels)) params.next_tile = static_cast<int*>(b.dq.untyped_data());
  const bool adds = (call.kernels.features & attention::kBias) != 0;
  params.lse_factor = adds ? 1.0f : std::numbers::log2e_v<float>;
  params.batch = static_cast<int>(s.batch);
  params.seqlen_q = static_cast<int>(s.seqlen_q);
  params.num_heads = static_cast<int>(s.num_heads);
  const bool blind_queries = s.last_offset(options) < 0 ||
                             s.seqlen_q + s.first_offset(options) > s.seqlen_kv ||
                             (call.kernels.features & attention::kHidingFeatures) != 0;
  if (!options.deterministic || blind_queries) {
    params.zeroed_columns = static_cast<int>(sum_columns(call.kernels));
  }
  return runtime::launch(kernel, stream,
                         {s.padded_q() / attention::kFragmentRows, s.num_heads, s.batch}, &params);
}

Status launch_main(const runtime::Kernel& kernel, runtime::cuda::Stream stream,
                   const BackwardBuffers& b, const BackwardCall& call,
                   const attention::Options& options, const attention::BackwardConfig& config,
                   const runtime::Device& device) {
  const Sizes& s = call.sizes;
  attention::BackwardParams params = {};
  if (Status status =
          first_error({encode_rows(&params.q, b.q, s, config.block_q),
                       encode_rows(&params.dout, b.dout, s, config.block_q),
                       encode_rows(&params.k, b.k, s, config.block_kv),
                       encode_rows(&params.v, b.v, s, config.block_kv),
                       encode_rows(&params.dk, b.dk, s, 64), encode_rows(&params.dv, b.dv, s, 64)});
      !status.ok()) {
    return status;
  }
  params.delta = static_cast<const float*>(b.delta.untyped_data());
  params.scaled_lse = static_cast<const float*>(b.scaled_lse.untyped_data());
  params.dq_acc = static_cast<float*>(b.dq_acc.untyped_data());
  params.dq_order = static_cast<int*>(b.dq_order.untyped_data());
  set_problem(&params, s, call.extras, options);
  // Of a mask that hides nothing: settle_mask.
  if (call.kernels.mask != mask_of(options)) {
    params.last_offset = params.extras.window_last = static_cast<int>(s.seqlen_kv);
    params.extras.bottom_right = false;
  }
  const std::int64_t key_blocks = ceil_div(s.seqlen_kv, config.block_kv);
  const std::int64_t resident = resident_tiles(call, device);
  params.padded_q = static_cast<int>(s.padded_q());
  params.q_blocks = static_cast<int>(ceil_div(s.seqlen_q, config.block_q));
  params.kv_blocks = static_cast<int>(key_blocks);
  params.heads_of_group = static_cast<int>(s.num_heads / s.num_kv_heads);
  params.tiles = static_cast<int>(tiles_of(call));
  params.turn_group = static_cast<int>(std::min(key_blocks, resident));
  params.tile_rows = static_cast<int>(s.num_kv_heads * s.batch);
  if (in_waves(call.kernels)) {
    const long rows =
        attention::causal_rows_together(key_blocks, params.tile_rows, params.heads_of_group,
                                        call.kernels.narrow_head_dim(), resident);
    params.turn_group = static_cast<int>(resident);
    params.rows_together = static_cast<int>(rows);
    params.phase_blocks =
        static_cast<int>(std::clamp<std::int64_t>(2 * resident / rows, 1, key_blocks));
    params.next_tile = static_cast<int*>(b.dq.untyped_data());
  }
  return runtime::launch(kernel, stream, {backward_blocks(call, resident)}, &params);
}

// As attention.h describes BackwardParams for backward_wide.cuh.
Status launch_wide(const runtime::Kernel& kernel, runtime::cuda::Stream stream,
                   const BackwardBuffers& b, const BackwardCall& call,
                   const attention::Options& options, const attention::BackwardConfig& config,
                   int multiprocessors) {
  const Sizes& s = call.sizes;
  attention::BackwardParams params = {};
  if (Status status =
          first_error({encode_rows(&params.q, b.q, s, config.block_q),
                       encode_rows(&params.dout, b.dout, s, config.block_q),
                       encode_rows(&params.k, b.k, s, 64), encode_rows(&params.v, b.v, s, 64),
                       encode_rows(&params.dk, b.dk, s, 64), encode_rows(&params.dv, b.dv, s, 64)});
      !status.ok()) {
    return status;
  }
  params.delta = static_cast<const float*>(b.delta.untyped_data());
  params.scaled_lse = static_cast<const float*>(b.scaled_lse.untyped_data());
  set_problem(&params, s, call.extras, options);
  const std::int64_t key_blocks = ceil_div(s.seqlen_kv, config.block_kv);
  const std::int64_t tiles = tiles_of(call);
  params.padded_q = static_cast<int>(s.padded_q());
  params.q_blocks = static_cast<int>(ceil_div(s.seqlen_q, config.block_q));
  params.kv_blocks = static_cast<int>(key_blocks);
  params.heads_of_group = static_cast<int>(s.num_heads / s.num_kv_heads);
  params.tiles = static_cast<int>(tiles);
  params.turn_group = 1;
  const std::int64_t cluster = attention::backward_wide_cluster(config);
  const std::int64_t resident = std::max<std::int64_t>(1, multiprocessors / cluster);
  return runtime::launch(
      kernel, stream, {(tiles_differ(call.kernels) ? tiles : std::min(tiles, resident)) * cluster},
      &params);
}

Status launch_wide_dq(const runtime::Kernel& kernel, runtime::cuda::Stream stream,
                      const BackwardBuffers& b, const BackwardCall& call,
                      const attention::Options& options, const attention::BackwardConfig& config,
                      int multiprocessors) {
  const Sizes& s = call.sizes;
  attention::BackwardWideDqParams params = {};
  if (Status status = first_error(
          {encode_rows(&params.q, b.q, s, 64), encode_rows(&params.dout, b.dout, s, 64),
           encode_rows(&params.dq, b.dq, s, 64), encode_rows(&params.k, b.k, s, config.dq_block_kv),
           encode_rows(&params.v, b.v, s, config.dq_block_kv)});
      !status.ok()) {
    return status;
  }
  params.delta = static_cast<const float*>(b.delta.untyped_data());
  params.scaled_lse = static_cast<const float*>(b.scaled_lse.untyped_data());
  set_problem(&params, s, call.extras, options);
  params.padded_q = static_cast<int>(s.padded_q());
  const std::int64_t tiles = ceil_div(s.seqlen_q, attention::kWideDqBlockQ) * s.num_heads * s.batch;
  return runtime::launch(kernel, stream, {std::min<std::int64_t>(multiprocessors, tiles)}, &params);
}

Status launch_finish(const runtime::Kernel& kernel, runtime::cuda::Stream stream,
                     const BackwardBuffers& b, const Sizes& s, float scale) {
  attention::BackwardFinishParams params = {};
  if (Status status = encode_rows(&params.dq, b.dq, s, 64); !status.ok()) return status;
  params.dq_acc = static_cast<const float*>(b.dq_acc.untyped_data());
  params.seqlen_q = static_cast<int>(s.seqlen_q);
  params.num_heads = static_cast<int>(s.num_heads);
  params.scale = scale;
  const std::int64_t fragments = ceil_div(s.seqlen_q, attention::kFragmentRows);
  return runtime::launch(kernel, stream, {fragments, s.num_heads, s.batch}, &params);
}

Status execute_backward(const Execution& on, const BackwardBuffers& b,
                        const attention::Options& options,
                        const attention::BackwardConfig& config) {
  auto call = read_backward(b, options, config);
  if (!call.ok()) return call.error();
  if (call->empty) return {};
  settle_mask(&*call, on.device);
  const AttentionBackwardKernels& k = call->kernels;
  const auto prepare =
      find_loaded(kernels, k.prepare_key(), on.device, [&] { return k.prepare_spec(); });
  if (!prepare.ok()) return prepare.error();
  const auto main = find_loaded(kernels, k.main_key(), on.device, [&] { return k.main_spec(); });
  if (!main.ok()) return main.error();
  const auto last = find_loaded(kernels, k.last_key(), on.device, [&] { return k.last_spec(); });
  if (!last.ok()) return last.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"out", b.out, false},
                  {"lse", b.lse, false},
                  {"dout", b.dout, false},
                  {"dlse", b.dlse, false},
                  {"dq", b.dq, true},
                  {"dk", b.dk, true},
                  {"dv", b.dv, true},
                  {"delta", b.delta, true},
                  {"scaled_lse", b.scaled_lse, true},
                  {"dq_acc", b.dq_acc, true},
                  {"dq_order", b.dq_order, true}},
                 call->extras);

  if (Status status = launch_prepare(**prepare, on.stream, b, *call, options); !status.ok()) {
    return status;
  }
  const int multiprocessors = on.device.multiprocessors;
  if (k.wide()) {
    if (Status status = launch_wide(**main, on.stream, b, *call, options, config, multiprocessors);
        !status.ok()) {
      return status;
    }
    return launch_wide_dq(**last, on.stream, b, *call, options, config, multiprocessors);
  }
  const Sizes& s = call->sizes;
  if (Status status = launch_main(**main, on.stream, b, *call, options, config, on.device);
      !status.ok()) {
    return status;
  }
  return launch_finish(**last, on.stream, b, s, options.scale);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error backward(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer out,
                     AnyBuffer lse, AnyBuffer dout, AnyBuffer dlse, xffi::RemainingArgs extras,
                     Ret dq, Ret dk, Ret dv, Ret delta, Ret scaled_lse, Ret dq_acc, Ret dq_order,
                     attention::Options options, attention::BackwardConfig config) {
  const BackwardBuffers buffers = {q,   k,   v,      out,         lse,     dout,      dlse,  *dq,
                                   *dk, *dv, *delta, *scaled_lse, *dq_acc, *dq_order, extras};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return initialize_backward(device, buffers, options, config); },
      [&](const Execution& on) { return execute_backward(on, buffers, options, config); });
}

template <typename Binding>
auto bind_backward(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // out
      .template Arg<AnyBuffer>()  // lse
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // dlse, or of size 0
      .RemainingArgs()            // ExtraBuffers
      .template Ret<AnyBuffer>()  // dq
      .template Ret<AnyBuffer>()  // dk
      .template Ret<AnyBuffer>()  // dv
      .template Ret<AnyBuffer>()  // delta
      .template Ret<AnyBuffer>()  // scaled_lse
      .template Ret<AnyBuffer>()  // dq_acc
      .template Ret<AnyBuffer>()  // dq_order
      .template Attr<attention::Options>("options")
      .template Attr<attention::BackwardConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kAttentionBackwardTarget, kName, backward, bind_backward);

}  // namespace tk::ffi
