// The specialisations of the kernels of linear attention and the state-space dual; a spec is
// refused where the kernels do not offer it.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/linear_attention/linear_attention.h"

namespace tk::ffi {

// What is computed, as the targets take it: with the fields of the dataclasses of the same names in
// tk_jax.ops.linear_attention.config.
struct ChunkSumsOptions {
  long seqlen;  // of x, which may have one token for all
  float scale, least;
};
struct StepOptions {
  bool softplus;
  float least, most;      // steps
  float least_log_decay;  // what is below counts as this
};
struct StatesOptions {
  float scale;
  bool reverse;
  long chunks_of_segment;
  long stored_every;  // chunks to a stored state
};
struct SegmentSumsOptions {
  float scale;
  bool reverse;
  bool of_all;  // or all but the last, reverse: but the first
  long chunks_of_segment;
};
struct OutputsOptions {
  float scale;
  long chunks_of_segment;
};
struct SpreadOptions {
  bool reverse;
  long chunks_of_segment;
  long stored_every;  // chunks to a stored state; 0 of outputs
};
struct GradientsOptions {
  float scale;
};
struct GradientsConfig {
  long stages, key_stages;
};

// The bit of a feature's name, as it stands in symbols; 0 where there is none of that name.
unsigned linear_attention_feature_of(std::string_view name);

// Those that walk through a sequence.
struct LinearAttentionWalkKernel {
  enum class Walk { kStates, kReverseStates, kSegmentSums, kReverseSegmentSums, kOutputs };

  Walk walk;
  runtime::DataType dtype;
  std::int64_t key_dim;  // of tiles
  unsigned features;     // bits of linear_attention::Feature
  linear_attention::WalkConfig config;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

struct LinearAttentionGradientsKernel {
  runtime::DataType dtype;
  std::int64_t key_dim;  // of tiles
  unsigned features;     // bits of linear_attention::Feature
  GradientsConfig config;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

// Those that join segments; what is spread into is of a dtype.
struct LinearAttentionSegmentKernel {
  enum class Name { kStarts, kSpreadStates, kSpreadOut };

  Name name;
  runtime::DataType dtype = runtime::DataType::kFloat32;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

// Those of gates and of steps, of which the latter have a specialisation for each type of raw
// steps.
struct LinearAttentionGateKernel {
  enum class Name { kChunkSums, kGateGradients, kStepGates, kStepGradients, kHeadSums };

  Name name;
  runtime::DataType raw_dtype = runtime::DataType::kFloat32;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::ffi::ChunkSumsOptions, StructMember<std::int64_t>("seqlen"),
                     StructMember<float>("scale"), StructMember<float>("least"));
TK_REGISTER_SETTINGS(tk::ffi::StepOptions, StructMember<bool>("softplus"),
                     StructMember<float>("least"), StructMember<float>("most"),
                     StructMember<float>("least_log_decay"));
TK_REGISTER_SETTINGS(tk::ffi::StatesOptions, StructMember<float>("scale"),
                     StructMember<bool>("reverse"), StructMember<std::int64_t>("chunks_of_segment"),
                     StructMember<std::int64_t>("stored_every"));
TK_REGISTER_SETTINGS(tk::ffi::SegmentSumsOptions, StructMember<float>("scale"),
                     StructMember<bool>("reverse"), StructMember<bool>("of_all"),
                     StructMember<std::int64_t>("chunks_of_segment"));
TK_REGISTER_SETTINGS(tk::ffi::OutputsOptions, StructMember<float>("scale"),
                     StructMember<std::int64_t>("chunks_of_segment"));
TK_REGISTER_SETTINGS(tk::ffi::SpreadOptions, StructMember<bool>("reverse"),
                     StructMember<std::int64_t>("chunks_of_segment"),
                     StructMember<std::int64_t>("stored_every"));
TK_REGISTER_SETTINGS(tk::ffi::GradientsOptions, StructMember<float>("scale"));
TK_REGISTER_SETTINGS(tk::ffi::GradientsConfig, StructMember<std::int64_t>("stages"),
                     StructMember<std::int64_t>("key_stages"));
TK_REGISTER_SETTINGS(tk::linear_attention::WalkConfig, StructMember<std::int64_t>("consumers"),
                     StructMember<std::int64_t>("stages"), StructMember<std::int64_t>("helpers"));
