#include "ffi/linear_attention_kernels.h"

#include <iterator>

namespace tk::ffi {
namespace {

// Of the bits of linear_attention::Feature, in order.
constexpr const char* kFeatureNames[] = {"weights", "counts", "skip"};

Status check_dtype(runtime::DataType dtype) {
  if (dtype == runtime::DataType::kBFloat16 || dtype == runtime::DataType::kFloat16) return {};
  return unsupported("dtype " + std::string(type_suffix(dtype)) +
                     "; the kernels take bfloat16 and float16");
}

Status check_common(runtime::DataType dtype, std::int64_t key_dim, unsigned features,
                    unsigned offered) {
  if (Status status = check_dtype(dtype); !status.ok()) return status;
  if (key_dim <= 0 || key_dim > linear_attention::kMaxKeyDim ||
      linear_attention::tile_dim(key_dim) != key_dim) {
    return unsupported("tiles of key dim " + std::to_string(key_dim) +
                       "; the kernels take multiples of 64 up to 256");
  }
  for (unsigned i = 0; i < std::size(kFeatureNames); ++i) {
    if (features & ~offered & (1u << i)) {
      return invalid(std::string("a kernel that does not take ") + kFeatureNames[i]);
    }
  }
  return {};
}

Status check_setting(const char* name, std::int64_t value, std::int64_t least,
                     std::int64_t largest) {
  if (value >= least && value <= largest) return {};
  return invalid("config." + std::string(name) + " is " + std::to_string(value) + "; expected " +
                 std::to_string(least) + " to " + std::to_string(largest));
}

// "d128_weights_skip_bf16"
std::string suffix(runtime::DataType dtype, std::int64_t key_dim, unsigned features) {
  std::string text = "d" + std::to_string(key_dim);
  for (unsigned i = 0; i < std::size(kFeatureNames); ++i) {
    if (features & (1u << i)) text += std::string("_") + kFeatureNames[i];
  }
  return text + "_" + type_suffix(dtype);
}

Result<KernelSpec> checked(KernelSpec spec) {
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

KernelSpec named(const std::string& name, const std::string& params) {
  KernelSpec spec;
  spec.symbol = "tk_linear_attention_" + name;
  spec.header = "kernels/linear_attention/" + name + ".cuh";
  spec.function = "tk::linear_attention::" + name;
  spec.params_type = "tk::linear_attention::" + params;
  return spec;
}

}  // namespace

unsigned linear_attention_feature_of(std::string_view name) {
  for (unsigned i = 0; i < std::size(kFeatureNames); ++i) {
    if (name == kFeatureNames[i]) return 1u << i;
  }
  return 0;
}

KernelKey LinearAttentionWalkKernel::key() const {
  return {{static_cast<int>(walk), static_cast<int>(dtype), key_dim, features, config.consumers,
           config.stages, config.helpers}};
}

Result<KernelSpec> LinearAttentionWalkKernel::spec() const {
  const bool is_outputs = walk == Walk::kOutputs;
  const bool is_helped = is_outputs && config.helpers == 1;
  const bool is_sums = walk == Walk::kSegmentSums || walk == Walk::kReverseSegmentSums;
  const bool is_reverse = walk == Walk::kReverseStates || walk == Walk::kReverseSegmentSums;
  const unsigned offered = linear_attention::kCounts |
                           (is_reverse ? 0u : linear_attention::kWeights) |
                           (is_outputs ? linear_attention::kSkip : 0u);
  if (Status status = first_error(
          {check_common(dtype, key_dim, features, offered),
           check_setting("consumers", config.consumers, 1,
                         is_outputs && key_dim > linear_attention::kHelpedKeyDim ? 1 : 2),
           check_setting("stages", config.stages, 1, 8),
           check_setting("helpers", config.helpers, is_outputs && config.consumers == 2 ? 1 : 0,
                         is_outputs && key_dim <= linear_attention::kHelpedKeyDim ? 1 : 0)});
      !status.ok()) {
    return status.error();
  }
  const std::string type = is_outputs ? "Outputs" : is_sums ? "SegmentSums" : "States";
  KernelSpec spec = named(is_helped    ? "helped_outputs"
                          : is_outputs ? "outputs"
                          : is_sums    ? "segment_sums"
                                       : "states",
                          type + "Params");
  if (is_reverse) spec.symbol += "_reverse";
  spec.symbol += "_" + suffix(dtype, key_dim, features);
  spec.function += std::string("<tk::linear_attention::") +
                   (is_helped    ? "HelpedOutputsTraits<"
                    : is_outputs ? "OutputsTraits<"
                                 : "StatesTraits<") +
                   type_name(dtype) + ", " + std::to_string(key_dim) + ", ";
  if (!is_outputs) spec.function += std::string(bool_name(is_reverse)) + ", ";
  spec.function += std::to_string(features) + ", ";
  if (!is_outputs) spec.function += std::to_string(config.consumers) + ", ";
  spec.function += std::to_string(config.stages);
  if (is_helped) spec.function += ", " + std::to_string(config.consumers);
  spec.function += ">>";
  spec.threads = linear_attention::walk_threads(config);
  spec.shared_bytes = is_helped    ? linear_attention::helped_outputs_shared_bytes(
                                         key_dim, config.stages, config.consumers)
                      : is_outputs ? linear_attention::outputs_shared_bytes(key_dim, config.stages)
                      : is_sums    ? linear_attention::segment_sums_shared_bytes(key_dim, config)
                                   : linear_attention::states_shared_bytes(key_dim, config);
  spec.min_blocks = linear_attention::walk_blocks(key_dim, config.consumers, config.helpers);
  return checked(std::move(spec));
}

KernelKey LinearAttentionGradientsKernel::key() const {
  return {{static_cast<int>(dtype), key_dim, features, config.stages, config.key_stages}};
}

Result<KernelSpec> LinearAttentionGradientsKernel::spec() const {
  if (Status status =
          first_error({check_common(dtype, key_dim, features, linear_attention::kAllFeatures),
                       check_setting("stages", config.stages, 1, 8),
                       check_setting("key_stages", config.key_stages, 1, 2)});
      !status.ok()) {
    return status.error();
  }
  KernelSpec spec = named("gradients", "GradientsParams");
  spec.symbol += "_" + suffix(dtype, key_dim, features);
  spec.function += std::string("<tk::linear_attention::GradientsTraits<") + type_name(dtype) +
                   ", " + std::to_string(key_dim) + ", " + std::to_string(features) + ", " +
                   std::to_string(config.stages) + ", " + std::to_string(config.key_stages) + ">>";
  spec.threads = linear_attention::kGradientsThreads;
  spec.shared_bytes =
      linear_attention::gradients_shared_bytes(key_dim, config.stages, config.key_stages);
  return checked(std::move(spec));
}

KernelKey LinearAttentionSegmentKernel::key() const {
  return {{static_cast<int>(name), static_cast<int>(dtype)}};
}

Result<KernelSpec> LinearAttentionSegmentKernel::spec() const {
  if (name == Name::kStarts) {
    KernelSpec spec = named("segment_starts", "SegmentStartsParams");
    spec.threads = linear_attention::kStartsThreads;
    spec.shared_bytes = linear_attention::kStartsSharedBytes;
    return checked(std::move(spec));
  }
  if (Status status = check_dtype(dtype); !status.ok()) return status.error();
  const bool is_of_states = name == Name::kSpreadStates;
  KernelSpec spec = named("spread", "SpreadParams");
  spec.symbol += std::string(is_of_states ? "_states_" : "_out_") + type_suffix(dtype);
  spec.function += std::string("<tk::linear_attention::SpreadTraits<") + type_name(dtype) + ", " +
                   bool_name(is_of_states) + ">>";
  spec.threads = linear_attention::kSpreadThreads;
  spec.shared_bytes = linear_attention::kSpreadSharedBytes;
  return checked(std::move(spec));
}

KernelKey LinearAttentionGateKernel::key() const {
  return {{static_cast<int>(name), static_cast<int>(raw_dtype)}};
}

Result<KernelSpec> LinearAttentionGateKernel::spec() const {
  KernelSpec spec;
  switch (name) {
    case Name::kChunkSums:
      spec = named("chunk_sums", "ChunkSumsParams");
      break;
    case Name::kGateGradients:
      spec = named("gate_gradients", "GateGradientsParams");
      break;
    case Name::kStepGates:
      spec = named("step_gates", "StepGatesParams");
      break;
    case Name::kStepGradients:
      spec = named("step_gradients", "StepGradientsParams");
      break;
    case Name::kHeadSums:
      spec = named("head_sums", "HeadSumsParams");
      break;
  }
  if (name == Name::kStepGates || name == Name::kStepGradients) {
    if (raw_dtype == runtime::DataType::kInt32) {
      return unsupported("steps of int32; the kernels take float32, bfloat16 and float16");
    }
    spec.symbol += std::string("_") + type_suffix(raw_dtype);
    spec.function += std::string("<") + type_name(raw_dtype) + ">";
  }
  spec.threads = linear_attention::kGateThreads;
  spec.shared_bytes = linear_attention::kGateSharedBytes;
  if (name != Name::kHeadSums) spec.min_blocks = linear_attention::kGateBlocks;
  return checked(std::move(spec));
}

}  // namespace tk::ffi
