// The specialisations of the attention kernels: which template, with how many threads and bytes.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/attention/attention.h"

namespace tk::ffi {

// The bit of a feature's name, as it stands in symbols; 0 where there is none of that name.
unsigned feature_of(std::string_view name);

// Whatever of a call's settings ends up in the kernels' template arguments. A spec is refused where
// the kernels do not offer it.
struct AttentionForwardKernel {
  runtime::DataType dtype;
  std::int64_t head_dim, head_dim_v;  // of tiles
  attention::Mask mask;
  unsigned features;  // bits of attention::Feature
  attention::ForwardConfig config;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

// Three kernels, or, where is_wide, three others: attention.h lists both.
struct AttentionBackwardKernels {
  runtime::DataType dtype;
  std::int64_t head_dim, head_dim_v;  // of tiles
  attention::Mask mask;
  unsigned features;  // bits of attention::Feature
  bool deterministic;
  attention::BackwardConfig config;

  bool wide() const { return attention::is_wide(head_dim, head_dim_v); }
  std::int64_t narrow_head_dim() const { return attention::narrow_head_dim(head_dim, head_dim_v); }

  // The last is finish or the wide dq.
  KernelKey prepare_key() const;
  KernelKey main_key() const;
  KernelKey last_key() const;
  Result<KernelSpec> prepare_spec() const;
  Result<KernelSpec> main_spec() const;
  Result<KernelSpec> last_spec() const;

 private:
  Result<KernelSpec> wide_spec() const;
  Result<KernelSpec> wide_dq_spec() const;
};

// Of the gradient of a bias.
struct AttentionBiasKernel {
  runtime::DataType dtype;
  std::int64_t head_dim, head_dim_v;  // of tiles
  attention::Mask mask;
  unsigned features;  // bits of attention::Feature

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::attention::Options, StructMember<float>("scale"),
                     StructMember<bool>("is_causal"), StructMember<bool>("bottom_right"),
                     StructMember<bool>("deterministic"), StructMember<std::int64_t>("window_left"),
                     StructMember<std::int64_t>("window_right"), StructMember<float>("soft_cap"));
TK_REGISTER_SETTINGS(tk::attention::ForwardConfig, StructMember<std::int64_t>("block_q"),
                     StructMember<std::int64_t>("block_kv"), StructMember<std::int64_t>("stages"));
TK_REGISTER_SETTINGS(tk::attention::BackwardConfig, StructMember<std::int64_t>("block_q"),
                     StructMember<std::int64_t>("block_kv"), StructMember<std::int64_t>("stages"),
                     StructMember<std::int64_t>("dq_block_kv"),
                     StructMember<std::int64_t>("dq_stages"));
