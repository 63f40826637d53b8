// The specialisations of the kernels of Based attention; a spec is refused where the kernels do not
// offer it.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/based_attention/based_attention.h"

namespace tk::ffi {

// How a kernel runs: with the fields of the dataclass of the same name in
// tk_jax.ops.based_attention.config.
struct BasedConfig {
  long stages;  // of the ring of chunks, or of slices of values
};

struct BasedAttentionKernel {
  enum class Name { kStates, kOutputs, kChunkOutputs, kGradients };

  Name name;
  runtime::DataType dtype;
  std::int64_t dim;  // of q and k
  bool documents;
  BasedConfig config;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::ffi::BasedConfig, StructMember<std::int64_t>("stages"));
