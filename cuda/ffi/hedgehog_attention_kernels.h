// The specialisations of the kernels of Hedgehog attention; a spec is refused where the kernels do
// not offer it.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/hedgehog_attention/hedgehog_attention.h"

namespace tk::ffi {

// What is computed, as the targets take it: with the fields of the dataclasses of the same names in
// tk_jax.ops.hedgehog_attention.config.
struct HedgehogSumsOptions {
  long chunks_of_segment;
};
struct HedgehogOutputsOptions {
  float scale;
  long chunks_of_segment;  // of packed documents: shares of tiles
  long states_of_segment;  // that those after it begin with; 0 where documents are packed
  long shares;             // 0 where documents are not packed
};
struct HedgehogGradientsOptions {
  float scale;
};
struct HedgehogStepOptions {
  float scale;
};
struct HedgehogDocumentStatesOptions {
  bool reverse;
  long shares;
};

struct HedgehogKernel {
  enum class Kind {
    kSums,
    kOutputs,
    kQueries,
    kKeys,
    kDocumentStates,
    kReverseDocumentStates,
    kStep
  };

  Kind kind;
  runtime::DataType dtype;
  std::int64_t key_dim, value_dim;  // of tiles; kFeatures in reverse
  bool documents;                   // packed, for those kernels that have both

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::ffi::HedgehogSumsOptions, StructMember<std::int64_t>("chunks_of_segment"));
TK_REGISTER_SETTINGS(tk::ffi::HedgehogOutputsOptions, StructMember<float>("scale"),
                     StructMember<std::int64_t>("chunks_of_segment"),
                     StructMember<std::int64_t>("states_of_segment"),
                     StructMember<std::int64_t>("shares"));
TK_REGISTER_SETTINGS(tk::ffi::HedgehogGradientsOptions, StructMember<float>("scale"));
TK_REGISTER_SETTINGS(tk::ffi::HedgehogStepOptions, StructMember<float>("scale"));
TK_REGISTER_SETTINGS(tk::ffi::HedgehogDocumentStatesOptions, StructMember<bool>("reverse"),
                     StructMember<std::int64_t>("shares"));
