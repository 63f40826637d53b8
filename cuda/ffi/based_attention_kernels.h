// The specialisations of the kernels of Based attention; a spec is refused where the kernels do not
// offer it.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/based_attention/based_attention.h"

namespace tk::ffi {

// What is computed, where linear attention's options do not say it, and how a kernel runs: with the
// fields of the dataclasses of the same names in tk_jax.ops.based_attention.config.
struct BasedStatesOptions {
  float scale;
  bool reverse;
  long chunks_of_segment;
};
struct BasedOutputsOptions {
  float scale;
  long chunks_of_segment;
  bool normalize;
};
struct BasedConfig {
  long stages;  // of the ring of chunks, or of slices of values
};

struct BasedAttentionKernel {
  enum class Name { kStates, kOutputs, kWalkedGradients, kChunkOutputs, kGradients };

  Name name;
  runtime::DataType dtype;
  std::int64_t dim;  // of q and k
  bool documents;
  BasedConfig config;
  bool normalize = false;  // of outputs and walked_gradients
  bool reverse = false;    // of walked_gradients

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::ffi::BasedStatesOptions, StructMember<float>("scale"),
                     StructMember<bool>("reverse"),
                     StructMember<std::int64_t>("chunks_of_segment"));
TK_REGISTER_SETTINGS(tk::ffi::BasedOutputsOptions, StructMember<float>("scale"),
                     StructMember<std::int64_t>("chunks_of_segment"),
                     StructMember<bool>("normalize"));
TK_REGISTER_SETTINGS(tk::ffi::BasedConfig, StructMember<std::int64_t>("stages"));
