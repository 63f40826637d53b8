#include "ffi/attention_kernels.h"

namespace tk::ffi {
namespace {

constexpr int kFragmentThreads = attention::kWarpgroupThreads;  // of prepare and finish

Status check_common(runtime::DataType dtype, std::int64_t head_dim) {
  if (dtype != runtime::DataType::kBFloat16 && dtype != runtime::DataType::kFloat16) {
    return unsupported("dtype " + std::string(type_suffix(dtype)) +
                       "; the kernels take bfloat16 and float16");
  }
  if (head_dim != 64 && head_dim != 128) {
    return unsupported("head_dim " + std::to_string(head_dim) + "; the kernels take 64 and 128");
  }
  return {};
}

Status check_multiple(const char* name, std::int64_t value, std::int64_t multiple,
                      std::int64_t largest) {
  if (value >= multiple && value <= largest && value % multiple == 0) return {};
  return invalid("config." + std::string(name) + " is " + std::to_string(value) +
                 "; expected a multiple of " + std::to_string(multiple) + " up to " +
                 std::to_string(largest));
}

// bf16 or fp16, and everything else that stands in a symbol: "d128_causal_bf16".
std::string suffix(runtime::DataType dtype, std::int64_t head_dim,
                   attention::Mask mask = attention::Mask::kNone) {
  const char* words[] = {"_", "_causal_", "_band_"};
  return "d" + std::to_string(head_dim) + words[static_cast<int>(mask)] + type_suffix(dtype);
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

KernelKey AttentionForwardKernel::key() const {
  return {{0, static_cast<int>(dtype), head_dim, static_cast<int>(mask), config.block_q,
           config.block_kv, config.stages}};
}

Result<KernelSpec> AttentionForwardKernel::spec() const {
  if (Status status = first_error({check_common(dtype, head_dim),
                                   check_multiple("block_q", config.block_q, 64, 192),
                                   check_multiple("block_kv", config.block_kv, 16, 256),
                                   check_multiple("stages", config.stages, 1, 8)});
      !status.ok()) {
    return status.error();
  }
  KernelSpec spec;
  spec.symbol = "tk_attention_fwd_" + suffix(dtype, head_dim, mask);
  spec.header = "kernels/attention/forward.cuh";
  spec.function = std::string("tk::attention::forward<tk::attention::ForwardTraits<") +
                  type_name(dtype) + ", " + std::to_string(head_dim) + ", " + mask_name(mask) +
                  ", " + std::to_string(config.block_q) + ", " + std::to_string(config.block_kv) +
                  ", " + std::to_string(config.stages) + ">>";
  spec.params_type = "tk::attention::ForwardParams";
  spec.threads = attention::forward_threads(config.block_q);
  spec.shared_bytes = attention::forward_shared_bytes(head_dim, config);
  return checked(std::move(spec));
}

KernelKey AttentionBackwardKernels::prepare_key() const {
  return {{1, static_cast<int>(dtype), head_dim}};
}

KernelKey AttentionBackwardKernels::main_key() const {
  return {{2, static_cast<int>(dtype), head_dim, static_cast<int>(mask), deterministic,
           config.block_q, config.block_kv, config.stages}};
}

KernelKey AttentionBackwardKernels::finish_key() const {
  return {{3, static_cast<int>(dtype), head_dim}};
}

Result<KernelSpec> AttentionBackwardKernels::prepare_spec() const {
  if (Status status = check_common(dtype, head_dim); !status.ok()) return status.error();
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_prepare_" + suffix(dtype, head_dim);
  spec.header = "kernels/attention/backward_prepare.cuh";
  spec.function = "tk::attention::backward_prepare" + fragment_arguments(dtype, head_dim);
  spec.params_type = "tk::attention::BackwardPrepareParams";
  spec.threads = kFragmentThreads;
  spec.shared_bytes = attention::backward_prepare_shared_bytes(head_dim);
  return checked(std::move(spec));
}

Result<KernelSpec> AttentionBackwardKernels::main_spec() const {
  if (Status status = first_error({check_common(dtype, head_dim),
                                   check_multiple("block_q", config.block_q, 64, 128),
                                   check_multiple("block_kv", config.block_kv, 64, 256),
                                   check_multiple("stages", config.stages, 1, 8)});
      !status.ok()) {
    return status.error();
  }
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_" + suffix(dtype, head_dim, mask);
  spec.header = "kernels/attention/backward.cuh";
  spec.function = std::string("tk::attention::backward<tk::attention::BackwardTraits<") +
                  type_name(dtype) + ", " + std::to_string(head_dim) + ", " + mask_name(mask) +
                  ", " + bool_name(deterministic) + ", " + std::to_string(config.block_q) + ", " +
                  std::to_string(config.block_kv) + ", " + std::to_string(config.stages) + ">>";
  spec.params_type = "tk::attention::BackwardParams";
  spec.threads = attention::backward_threads(config.block_kv);
  spec.shared_bytes = attention::backward_shared_bytes(head_dim, config);
  return checked(std::move(spec));
}

Result<KernelSpec> AttentionBackwardKernels::finish_spec() const {
  if (Status status = check_common(dtype, head_dim); !status.ok()) return status.error();
  KernelSpec spec;
  spec.symbol = "tk_attention_bwd_finish_" + suffix(dtype, head_dim);
  spec.header = "kernels/attention/backward_finish.cuh";
  spec.function = "tk::attention::backward_finish" + fragment_arguments(dtype, head_dim);
  spec.params_type = "tk::attention::BackwardFinishParams";
  spec.threads = kFragmentThreads;
  spec.shared_bytes = attention::backward_finish_shared_bytes(head_dim);
  return checked(std::move(spec));
}

}  // namespace tk::ffi
