// Every FFI target of the package, with its two stages.
#pragma once

#include <span>

#include "xla/ffi/api/ffi.h"

namespace tk::ffi {

struct Target {
  const char* name;
  XLA_FFI_Handler* initialize;  // compiles and loads
  XLA_FFI_Handler* execute;     // finds, encodes tensor maps, launches
};

extern const Target kAttentionForwardTarget;
extern const Target kAttentionBackwardTarget;
extern const Target kAttentionBiasTarget;
extern const Target kMatmulTarget;
extern const Target kKernelTarget;

}  // namespace tk::ffi
