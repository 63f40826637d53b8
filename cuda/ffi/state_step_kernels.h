// The specialisations of the steps of one token; a spec is refused where the kernels do not offer
// it.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/state_step/state_step.h"

namespace tk::ffi {

// What is computed and how, as the target takes it: with the fields of the dataclasses of the same
// names in tk_jax.ops._state_step.
struct StateStepOptions {
  float scale;
  bool values_last;  // states [K, V] instead of [V, K]
  bool normalize;
  bool taylor;  // K features are made of q and k
};
struct StateStepConfig {
  long columns;  // of a tile of the state
};

struct StateStepKernel {
  runtime::DataType key_dtype, value_dtype;
  bool values_last, whole, normalize;
  std::int64_t columns, queries;
  bool taylor;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::ffi::StateStepOptions, StructMember<float>("scale"),
                     StructMember<bool>("values_last"), StructMember<bool>("normalize"),
                     StructMember<bool>("taylor"));
TK_REGISTER_SETTINGS(tk::ffi::StateStepConfig, StructMember<std::int64_t>("columns"));
