#include "ffi/based_attention_kernels.h"

namespace tk::ffi {
namespace {

using Name = BasedAttentionKernel::Name;

// Shared memory of a multiprocessor, of which every block takes 1 KB more than it asks for.
constexpr int kMultiprocessorBytes = 228 * 1024;

struct Facts {
  const char* name;
  const char* params;
  int threads, blocks;  // that share a multiprocessor
  int least_stages;
  int (*shared_bytes)(int dim, long stages);
};
constexpr Facts kFacts[] = {
    {"states", "StatesParams", based_attention::kWalkThreads, based_attention::kWalkBlocks,
     based_attention::kLeastWalkStages, based_attention::states_shared_bytes},
    {"outputs", "OutputsParams", based_attention::kWalkThreads, based_attention::kWalkBlocks,
     based_attention::kLeastWalkStages, based_attention::outputs_shared_bytes},
    {"walked_gradients", "WalkedGradientsParams", based_attention::kWalkThreads,
     based_attention::kWalkBlocks, based_attention::kLeastWalkStages,
     based_attention::walked_gradients_shared_bytes},
    {"chunk_outputs", "ChunkOutputsParams", based_attention::kWalkThreads,
     based_attention::kWalkBlocks, 1, based_attention::chunk_outputs_shared_bytes},
    {"gradients", "GradientsParams", based_attention::kGradientsThreads, 1, 1,
     based_attention::gradients_shared_bytes},
};

}  // namespace

KernelKey BasedAttentionKernel::key() const {
  return {{static_cast<int>(name), static_cast<int>(dtype), dim, documents, config.stages,
           normalize, reverse}};
}

Result<KernelSpec> BasedAttentionKernel::spec() const {
  const Facts& facts = kFacts[static_cast<int>(name)];
  if (dtype != runtime::DataType::kBFloat16 && dtype != runtime::DataType::kFloat16) {
    return unsupported("dtype " + std::string(type_suffix(dtype)) +
                       "; the kernels take bfloat16 and float16");
  }
  if (!based_attention::is_feature_dim(dim)) {
    return unsupported("features of " + std::to_string(dim) +
                       " values; the kernels take 8, 16, 24 and 32");
  }
  const int dim = static_cast<int>(this->dim);
  const bool walks = name == Name::kOutputs || name == Name::kWalkedGradients;
  const bool by_chunks = name == Name::kChunkOutputs || name == Name::kGradients;
  if (based_attention::walks(dim) ? by_chunks : walks) {
    return unsupported(std::string(facts.name) + " of " + std::to_string(dim) +
                       " values; their state is " + (walks ? "stored" : "walked through"));
  }
  if (normalize && !walks) {
    return invalid(std::string(facts.name) + " are not normalized");
  }
  if (reverse && name != Name::kWalkedGradients) {
    return invalid(std::string(facts.name) + " have one kernel for either way");
  }
  int most = 0;
  while (facts.blocks * (facts.shared_bytes(dim, most + 1) + 1024) <= kMultiprocessorBytes) ++most;
  if (config.stages < facts.least_stages || config.stages > most) {
    return invalid("config.stages is " + std::to_string(config.stages) + "; expected " +
                   std::to_string(facts.least_stages) + " to the " + std::to_string(most) +
                   " that there is shared memory for");
  }
  KernelSpec spec;
  spec.symbol = std::string("tk_based_attention_") + facts.name + "_d" + std::to_string(dim) +
                (documents ? "_documents" : "") + (normalize ? "_normalized" : "") +
                (reverse ? "_reverse_" : "_") + type_suffix(dtype);
  spec.header = std::string("kernels/based_attention/") + facts.name + ".cuh";
  spec.function = std::string("tk::based_attention::") + facts.name +
                  "<tk::based_attention::Traits<" + type_name(dtype) + ", " + std::to_string(dim) +
                  ", " + bool_name(documents) + ", " + std::to_string(config.stages) + ">";
  if (name == Name::kWalkedGradients) spec.function += std::string(", ") + bool_name(reverse);
  if (walks) spec.function += std::string(", ") + bool_name(normalize);
  spec.function += ">";
  spec.params_type = std::string("tk::based_attention::") + facts.params;
  spec.threads = facts.threads;
  spec.shared_bytes = facts.shared_bytes(dim, config.stages);
  spec.min_blocks = facts.blocks;
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

}  // namespace tk::ffi
