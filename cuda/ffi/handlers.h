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
extern const Target kBasedAttentionChunkOutputsTarget;
extern const Target kBasedAttentionGradientsTarget;
extern const Target kBasedAttentionOutputsTarget;
extern const Target kBasedAttentionStatesTarget;
extern const Target kBasedAttentionWalkedGradientsTarget;
extern const Target kHedgehogDocumentStatesTarget;
extern const Target kHedgehogKeysTarget;
extern const Target kHedgehogOutputsTarget;
extern const Target kHedgehogQueriesTarget;
extern const Target kHedgehogStepTarget;
extern const Target kHedgehogSumsTarget;
extern const Target kLinearAttentionChunkSumsTarget;
extern const Target kLinearAttentionGateGradientsTarget;
extern const Target kLinearAttentionGradientsTarget;
extern const Target kLinearAttentionHeadSumsTarget;
extern const Target kLinearAttentionOutputsTarget;
extern const Target kLinearAttentionSegmentStartsTarget;
extern const Target kLinearAttentionSegmentSumsTarget;
extern const Target kLinearAttentionSpreadTarget;
extern const Target kLinearAttentionStatesTarget;
extern const Target kLinearAttentionStepGatesTarget;
extern const Target kLinearAttentionStepGradientsTarget;
extern const Target kMatmulTarget;
extern const Target kStateStepTarget;
extern const Target kKernelTarget;

// All of them.
inline constexpr const Target* kTargets[] = {
    &kAttentionForwardTarget,
    &kAttentionBackwardTarget,
    &kAttentionBiasTarget,
    &kBasedAttentionChunkOutputsTarget,
    &kBasedAttentionGradientsTarget,
    &kBasedAttentionOutputsTarget,
    &kBasedAttentionStatesTarget,
    &kBasedAttentionWalkedGradientsTarget,
    &kHedgehogDocumentStatesTarget,
    &kHedgehogKeysTarget,
    &kHedgehogOutputsTarget,
    &kHedgehogQueriesTarget,
    &kHedgehogStepTarget,
    &kHedgehogSumsTarget,
    &kKernelTarget,
    &kLinearAttentionChunkSumsTarget,
    &kLinearAttentionGateGradientsTarget,
    &kLinearAttentionGradientsTarget,
    &kLinearAttentionHeadSumsTarget,
    &kLinearAttentionOutputsTarget,
    &kLinearAttentionSegmentStartsTarget,
    &kLinearAttentionSegmentSumsTarget,
    &kLinearAttentionSpreadTarget,
    &kLinearAttentionStatesTarget,
    &kLinearAttentionStepGatesTarget,
    &kLinearAttentionStepGradientsTarget,
    &kMatmulTarget,
    &kStateStepTarget,
};

}  // namespace tk::ffi
