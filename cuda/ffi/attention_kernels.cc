#include "ffi/attention_kernels.h"

#include <iterator>

namespace tk::ffi {
namespace {

// Of the bits of attention::Feature, in order.
constexpr const char* kFeatureNames[] = {"lengths", "segments",  "mask",      "bias",
                                         "softcap", "floatbias", "tiledbias", "pairedbias"};

constexpr int kFragmentThreads = attention::kWarpgroupThreads;  // of prepare and finish

Status check_kernel_dtype(runtime::DataType dtype) {
  if (dtype != runtime::DataType::kBFloat16 && dtype != runtime::DataType::kFloat16) {
    return unsupported("dtype " + std::string(type_suffix(dtype)) +
                       "; the kernels take bfloat16 and float16");
  }
  return {};
}

Status check_tile_head_dim(const char* name, std::int64_t head_dim) {
  if (head_dim > 0 && head_dim <= attention::kMaxHeadDim &&
      head_dim % attention::kHeadDimStep == 0) {
    return {};
  }
  return unsupported("tiles of " + std::string(name) + " " + std::to_string(head_dim) +
                     "; the kernels take multiples of 64 up to 256");
}

// Of the backward pass.
Status check_common(const AttentionBackwardKernels& k) {
  return first_error({check_kernel_dtype(k.dtype), check_tile_head_dim("head_dim", k.head_dim),
                      check_tile_head_dim("head_dim_v", k.head_dim_v)});
}

Status check_multiple(const char* name, std::int64_t value, std::int64_t multiple,
                      std::int64_t largest) {
  if (value >= multiple && value <= largest && value % multiple == 0) return {};
  return invalid("config." + std::string(name) + " is " + std::to_string(value) +
                 "; expected a multiple of " + std::to_string(multiple) + " up to " +
                 std::to_string(largest));
}

// bf16 or fp16, and everything else that stands in a symbol: "d128_causal_bf16",
// "d192x128_causal_segments_softcap_bf16".
std::string suffix(runtime::DataType dtype, std::int64_t head_dim, std::int64_t head_dim_v,
                   attention::Mask mask = attention::Mask::kNone, unsigned features = 0) {
  std::string text = "d" + std::to_string(head_dim);
  if (head_dim_v != head_dim) text += "x" + std::to_string(head_dim_v);
  const char* masks[] = {"", "_causal", "_band"};
  text += masks[static_cast<int>(mask)];
  for (const char* name : kFeatureNames) {
    if (features & feature_of(name)) text += std::string("_") + name;
  }
  return text + "_" + type_suffix(dtype);
}

std::string mask_name(attention::Mask mask) {
  const char* names[] = {"kNone", "kCausal", "kBand"};
  return std::string("tk::attention::Mask::") + names[static_cast<int>(mask)];
}

std::string fragment_arguments(runtime::DataType dtype, std::int64_t head_dim) {
  return std::string("<") + type_name(dtype) + ", " + std::to_string(head_dim) + ">";
}

Result<KernelSpec> checked(KernelSpec spec) {
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

}  // namespace

unsigned feature_of(std::string_view name) {
  for (unsigned i = 0; i < std::size(kFeatureNames); ++i) {
    if (name == kFeatureNames[i]) return 1u << i;
  }
  return 0;
}

KernelKey AttentionForwardKernel::key() const {
  return {{0, static_cast<int>(dtype), head_dim, head_dim_v, static_cast<int>(mask), features,
           config.block_q, config.block_kv, config.stages}};
}

Result<KernelSpec> AttentionForwardKernel::spec() const {
  if (Status status =
          first_error({check_kernel_dtype(dtype), check_tile_head_dim("head_dim", head_dim),
                       check_tile_head_dim("head_dim_v", head_dim_v),
                       check_multiple("block_q", config.block_q, 64, 192),
                       check_multiple("block_kv", config.block_kv, 16, 256),
                       check_multiple("stages", config.stages, 1, 8)});
      !status.ok()) {
    return status.error();
  }
  KernelSpec spec;
  spec.symbol = "tk_attention_fwd_" + suffix(dtype, head_dim, head_dim_v, mask, features);
  spec.header = "kernels/attention/forward.cuh";
  spec.function = std::string("tk::attention::forward<tk::attention::ForwardTraits<") +
                  type_name(dtype) + ", " + std::to_string(head_dim) + ", " +
                  std::to_string(head_dim_v) + ", " + mask_name(mask) + ", " +
                  std::to_string(features) + ", " + std::to_string(config.block_q) + ", " +
                  std::to_string(config.block_kv) + ", " + std::to_string(config.stages) + ">>";
  spec.params_type = "tk::attention::ForwardParams";
  spec.threads = attention::forward_threads(config.block_q);
  spec.shared_bytes = attention::forward_shared_bytes(head_dim, head_dim_v, config, features);
  return checked(std::move(spec));
}

KernelKey AttentionBackwardKernels::prepare_key() const {
  return {{1, static_cast<int>(dtype), head_dim_v}};
}

KernelKey AttentionBackwardKernels::main_key() const {
  const std::int64_t rows = wide() ? head_dim : narrow_head_dim();
  const std::int64_t rows_v = wide() ? head_dim_v : narrow_head_dim();
  return {{2, static_cast<int>(dtype), rows, rows_v, static_cast<int>(mask), features,
           !wide() && deterministic, config.block_q, config.block_kv, config.stages}};
}

KernelKey AttentionBackwardKernels::last_key() const {
  if (wide()) {
    return {{4, static_cast<int>(dtype), head_dim, head_dim_v, static_cast<int>(mask), features,
             config.dq_block_kv, config.dq_stages}};
  }
  return {{3, static_cast<int>(dtype), narrow_head_dim()}};
}

Result<KernelSpec> AttentionBackwardKernels::prepare_spec() const {
  if (Status status = check_common(*this); !status.ok()) return status.error();
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_prepare_" + suffix(dtype, head_dim_v, head_dim_v);
  spec.header = "kernels/attention/backward_prepare.cuh";
  spec.function = "tk::attention::backward_prepare" + fragment_arguments(dtype, head_dim_v);
  spec.params_type = "tk::attention::BackwardPrepareParams";
  spec.threads = kFragmentThreads;
  spec.shared_bytes = attention::backward_prepare_shared_bytes(head_dim_v);
  return checked(std::move(spec));
}

Result<KernelSpec> AttentionBackwardKernels::main_spec() const {
  if (wide()) return wide_spec();
  if (Status status =
          first_error({check_common(*this), check_multiple("block_q", config.block_q, 64, 128),
                       check_multiple("block_kv", config.block_kv, 64, 256),
                       check_multiple("stages", config.stages, 1, 8)});
      !status.ok()) {
    return status.error();
  }
  const std::int64_t tile = narrow_head_dim();
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_" + suffix(dtype, tile, tile, mask, features);
  spec.header = "kernels/attention/backward.cuh";
  spec.function = std::string("tk::attention::backward<tk::attention::BackwardTraits<") +
                  type_name(dtype) + ", " + std::to_string(tile) + ", " + mask_name(mask) + ", " +
                  std::to_string(features) + ", " + bool_name(deterministic) + ", " +
                  std::to_string(config.block_q) + ", " + std::to_string(config.block_kv) + ", " +
                  std::to_string(config.stages) + ">>";
  spec.params_type = "tk::attention::BackwardParams";
  spec.threads = attention::backward_threads(config.block_kv);
  spec.min_blocks = attention::backward_resident_blocks(tile, config.block_kv);
  spec.shared_bytes = attention::backward_shared_bytes(tile, config);
  return checked(std::move(spec));
}

Result<KernelSpec> AttentionBackwardKernels::wide_spec() const {
  if (Status status =
          first_error({check_common(*this), check_multiple("block_q", config.block_q, 64, 128),
                       check_multiple("block_kv", config.block_kv, 64, 128),
                       check_multiple("stages", config.stages, 1, 8)});
      !status.ok()) {
    return status.error();
  }
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_" + suffix(dtype, head_dim, head_dim_v, mask, features);
  spec.header = "kernels/attention/backward_wide.cuh";
  spec.function = std::string("tk::attention::backward_wide<tk::attention::BackwardWideTraits<") +
                  type_name(dtype) + ", " + std::to_string(head_dim) + ", " +
                  std::to_string(head_dim_v) + ", " + mask_name(mask) + ", " +
                  std::to_string(features) + ", " + std::to_string(config.block_q) + ", " +
                  std::to_string(config.block_kv) + ", " + std::to_string(config.stages) + ">>";
  spec.params_type = "tk::attention::BackwardParams";
  spec.threads = attention::backward_wide_threads();
  spec.shared_bytes = attention::backward_wide_shared_bytes(head_dim, head_dim_v, config);
  spec.cluster_size = attention::backward_wide_cluster(config);
  return checked(std::move(spec));
}

Result<KernelSpec> AttentionBackwardKernels::wide_dq_spec() const {
  if (Status status = first_error({check_common(*this),
                                   check_multiple("dq_block_kv", config.dq_block_kv, 16, 256),
                                   check_multiple("dq_stages", config.dq_stages, 1, 8)});
      !status.ok()) {
    return status.error();
  }
  if (config.dq_stages < 2) return invalid("config.dq_stages is 1; expected at least 2");
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_dq_" + suffix(dtype, head_dim, head_dim_v, mask, features);
  spec.header = "kernels/attention/backward_wide_dq.cuh";
  spec.function =
      std::string("tk::attention::backward_wide_dq<tk::attention::BackwardWideDqTraits<") +
      type_name(dtype) + ", " + std::to_string(head_dim) + ", " + std::to_string(head_dim_v) +
      ", " + mask_name(mask) + ", " + std::to_string(features) + ", " +
      std::to_string(config.dq_block_kv) + ", " + std::to_string(config.dq_stages) + ">>";
  spec.params_type = "tk::attention::BackwardWideDqParams";
  spec.threads = attention::backward_wide_dq_threads();
  spec.shared_bytes = attention::backward_wide_dq_shared_bytes(head_dim, head_dim_v, config);
  return checked(std::move(spec));
}

Result<KernelSpec> AttentionBackwardKernels::last_spec() const {
  if (wide()) return wide_dq_spec();
  if (Status status = check_common(*this); !status.ok()) return status.error();
  const std::int64_t tile = narrow_head_dim();
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_finish_" + suffix(dtype, tile, tile);
  spec.header = "kernels/attention/backward_finish.cuh";
  spec.function = "tk::attention::backward_finish" + fragment_arguments(dtype, tile);
  spec.params_type = "tk::attention::BackwardFinishParams";
  spec.threads = kFragmentThreads;
  spec.shared_bytes = attention::backward_finish_shared_bytes(tile);
  return checked(std::move(spec));
}

KernelKey AttentionBiasKernel::key() const {
  return {{static_cast<int>(dtype), head_dim, head_dim_v, static_cast<int>(mask), features}};
}

Result<KernelSpec> AttentionBiasKernel::spec() const {
  if (Status status =
          first_error({check_kernel_dtype(dtype), check_tile_head_dim("head_dim", head_dim),
                       check_tile_head_dim("head_dim_v", head_dim_v)});
      !status.ok()) {
    return status.error();
  }
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_bias_" + suffix(dtype, head_dim, head_dim_v, mask, features);
  spec.header = "kernels/attention/backward_bias.cuh";
  spec.function = std::string("tk::attention::backward_bias<tk::attention::BackwardBiasTraits<") +
                  type_name(dtype) + ", " + std::to_string(head_dim) + ", " +
                  std::to_string(head_dim_v) + ", " + mask_name(mask) + ", " +
                  std::to_string(features) + ">>";
  spec.params_type = "tk::attention::BackwardBiasParams";
  spec.threads = attention::forward_threads(attention::kBiasBlockQ);
  spec.shared_bytes = attention::backward_bias_shared_bytes(head_dim, head_dim_v);
  return checked(std::move(spec));
}

}  // namespace tk::ffi
