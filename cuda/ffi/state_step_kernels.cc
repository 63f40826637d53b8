#include "ffi/state_step_kernels.h"

namespace tk::ffi {
namespace {

bool is_float(runtime::DataType type) {
  return type == runtime::DataType::kBFloat16 || type == runtime::DataType::kFloat16 ||
         type == runtime::DataType::kFloat32;
}

Status check(const StateStepKernel& kernel) {
  for (const runtime::DataType type : {kernel.key_dtype, kernel.value_dtype}) {
    if (!is_float(type)) {
      return unsupported("dtype " + std::string(type_suffix(type)) +
                         "; the kernels take bfloat16, float16 and float32");
    }
  }
  if (kernel.columns != 16 && kernel.columns != 32 && kernel.columns != 64) {
    return invalid("config.columns is " + std::to_string(kernel.columns) +
                   "; expected 16, 32 or 64");
  }
  if (kernel.queries < 1 || kernel.queries > state_step::kMaxQueries) {
    return unsupported(std::to_string(kernel.queries) +
                       " queries of a state; the kernels take up to " +
                       std::to_string(state_step::kMaxQueries));
  }
  if (!kernel.values_last && (kernel.normalize || kernel.queries > 1)) {
    return invalid("states with values in rows are not normalized and have one query");
  }
  if (kernel.taylor && (!kernel.values_last || kernel.queries > 1)) {
    return invalid("features are made for states with values in columns and one query");
  }
  return {};
}

}  // namespace

KernelKey StateStepKernel::key() const {
  return {{static_cast<int>(key_dtype), static_cast<int>(value_dtype), values_last, whole,
           normalize, columns, queries, taylor}};
}

Result<KernelSpec> StateStepKernel::spec() const {
  if (Status status = check(*this); !status.ok()) return status.error();
  const std::string name = values_last ? "columns" : "rows";
  KernelSpec spec;
  spec.symbol = "tk_state_step_" + name + "_c" + std::to_string(columns);
  if (!whole) spec.symbol += "_odd";
  if (taylor) spec.symbol += "_taylor";
  if (normalize) spec.symbol += "_normalized";
  if (queries > 1) spec.symbol += "_q" + std::to_string(queries);
  if (key_dtype != value_dtype) spec.symbol += std::string("_") + type_suffix(key_dtype);
  spec.symbol += std::string("_") + type_suffix(value_dtype);
  spec.header = "kernels/state_step/" + name + ".cuh";
  spec.function = "tk::state_step::" + name +
                  "<tk::state_step::" + (values_last ? "ColumnsTraits<" : "Traits<") +
                  type_name(key_dtype) + ", " + type_name(value_dtype) + ", " +
                  std::to_string(columns) + ", " + bool_name(whole);
  if (values_last) {
    spec.function += std::string(", ") + bool_name(normalize) + ", " + std::to_string(queries) +
                     ", " + bool_name(taylor);
    spec.shared_bytes = state_step::columns_shared_bytes(columns, queries, normalize, taylor);
  }
  spec.function += ">>";
  spec.params_type = "tk::state_step::StepParams";
  spec.threads = state_step::kThreads;
  spec.min_blocks = state_step::resident_blocks(values_last, whole, normalize, queries, taylor);
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

}  // namespace tk::ffi
