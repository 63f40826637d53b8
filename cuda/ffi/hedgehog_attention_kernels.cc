#include "ffi/hedgehog_attention_kernels.h"

namespace tk::ffi {
namespace {

using Kind = HedgehogKernel::Kind;

Status check_tiles(const HedgehogKernel& kernel) {
  if (kernel.dtype != runtime::DataType::kBFloat16 && kernel.dtype != runtime::DataType::kFloat16) {
    return unsupported("dtype " + std::string(type_suffix(kernel.dtype)) +
                       "; the kernels take bfloat16 and float16");
  }
  for (const std::int64_t dim : {kernel.key_dim, kernel.value_dim}) {
    if (dim <= 0 || dim > hedgehog_attention::kMaxDim || hedgehog_attention::tile_dim(dim) != dim) {
      return unsupported("tiles of dim " + std::to_string(dim) + "; the kernels take 64 and 128");
    }
  }
  return {};
}

}  // namespace

KernelKey HedgehogKernel::key() const {
  return {{static_cast<int>(kind), static_cast<int>(dtype), key_dim, value_dim, documents}};
}

Result<KernelSpec> HedgehogKernel::spec() const {
  if (Status status = check_tiles(*this); !status.ok()) return status.error();
  const std::int64_t consumers = hedgehog_attention::slices(value_dim);
  const bool states = kind == Kind::kDocumentStates || kind == Kind::kReverseDocumentStates;
  const bool reverse = kind == Kind::kReverseDocumentStates;
  // Keys are features there, whatever they were made of.
  const std::int64_t key_dim = reverse ? hedgehog_attention::kFeatures : this->key_dim;
  const bool walks = kind == Kind::kSums || kind == Kind::kOutputs || states;
  const bool is_paired = kind == Kind::kOutputs && consumers == 2 && !documents;
  const bool has_flag = kind != Kind::kSums && kind != Kind::kStep && !is_paired;
  if (documents && (kind == Kind::kSums || kind == Kind::kStep)) {
    return invalid("sums or steps of packed documents");
  }
  struct Entry {
    const char* name;
    const char* traits;
    const char* params;
    int threads, shared_bytes;
  };
  const Entry entry = [&]() -> Entry {
    switch (kind) {
      case Kind::kSums:
        return {"sums", "SumsTraits", "SumsParams", hedgehog_attention::walk_threads(consumers),
                hedgehog_attention::sums_shared_bytes(key_dim, consumers)};
      case Kind::kOutputs:
        if (is_paired) {
          return {"paired_outputs", "PairedOutputsTraits", "OutputsParams",
                  hedgehog_attention::kPairedOutputsThreads,
                  hedgehog_attention::paired_outputs_shared_bytes(key_dim)};
        }
        return {"outputs", "OutputsTraits", "OutputsParams",
                hedgehog_attention::walk_threads(consumers),
                hedgehog_attention::outputs_shared_bytes(key_dim, consumers, documents)};
      case Kind::kQueries:
        return {"queries", "GradientsTraits", "QueriesParams", hedgehog_attention::kQueriesThreads,
                hedgehog_attention::queries_shared_bytes(key_dim, value_dim, documents)};
      case Kind::kStep:
        return {"step", "StepTraits", "StepParams", hedgehog_attention::kStepThreads,
                hedgehog_attention::step_shared_bytes(key_dim, value_dim)};
      case Kind::kDocumentStates:
      case Kind::kReverseDocumentStates:
        return {"document_states", "DocumentStatesTraits", "DocumentStatesParams",
                hedgehog_attention::walk_threads(consumers),
                hedgehog_attention::document_states_shared_bytes(key_dim, consumers, reverse)};
      default:
        return {"keys", "GradientsTraits", "KeysParams", hedgehog_attention::kKeysThreads,
                hedgehog_attention::keys_shared_bytes(key_dim, value_dim, documents)};
    }
  }();
  KernelSpec spec;
  spec.symbol = std::string("tk_hedgehog_attention_") + entry.name + (reverse ? "_reverse" : "") +
                "_d" + std::to_string(key_dim) + "_v" + std::to_string(value_dim) +
                (documents && !states ? "_documents_" : "_") + type_suffix(dtype);
  spec.header = std::string("kernels/hedgehog_attention/") + entry.name + ".cuh";
  spec.function = std::string("tk::hedgehog_attention::") + entry.name +
                  "<tk::hedgehog_attention::" + entry.traits + "<" + type_name(dtype) + ", " +
                  std::to_string(key_dim) +
                  (is_paired ? "" : ", " + std::to_string(walks ? consumers : value_dim)) +
                  (has_flag ? std::string(", ") + bool_name(states ? reverse : documents) : "") +
                  ">>";
  spec.params_type = std::string("tk::hedgehog_attention::") + entry.params;
  spec.threads = entry.threads;
  spec.shared_bytes = entry.shared_bytes;
  if (kind == Kind::kStep) spec.min_blocks = hedgehog_attention::kStepBlocks;
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

}  // namespace tk::ffi
