#include "ffi/matmul_kernels.h"

namespace tk::ffi {

KernelKey MatmulKernel::key() const {
  return {{static_cast<int>(dtype), options.transpose_a, options.transpose_b, config.block_m,
           config.block_n, config.block_k, config.stages, config.cluster_m, config.group_m}};
}

Result<KernelSpec> MatmulKernel::spec() const {
  if (dtype != runtime::DataType::kBFloat16 && dtype != runtime::DataType::kFloat16) {
    return unsupported("dtype " + std::string(type_suffix(dtype)) +
                       "; the kernel takes bfloat16 and float16");
  }
  const auto& c = config;
  const bool offered = (c.block_m == 128 || c.block_m == 256) && c.block_n >= 64 &&
                       c.block_n <= 256 && c.block_k == 64 && c.stages >= 2 && c.stages <= 8 &&
                       (c.cluster_m == 1 || c.cluster_m == 2) &&
                       c.block_n % (64 * c.cluster_m) == 0 && c.group_m >= 1 && c.group_m <= 1024 &&
                       c.group_m % c.cluster_m == 0;
  if (!offered) {
    return invalid("config (block_m " + std::to_string(c.block_m) + ", block_n " +
                   std::to_string(c.block_n) + ", block_k " + std::to_string(c.block_k) +
                   ", stages " + std::to_string(c.stages) + ", cluster_m " +
                   std::to_string(c.cluster_m) + ", group_m " + std::to_string(c.group_m) +
                   ") is outside of what the kernel offers");
  }
  KernelSpec spec;
  spec.symbol = std::string("tk_matmul_") + (options.transpose_a ? "t" : "n") +
                (options.transpose_b ? "t" : "n") + "_" + type_suffix(dtype);
  spec.header = "kernels/matmul/kernel.cuh";
  spec.function = std::string("tk::matmul::multiply<tk::matmul::Traits<") + type_name(dtype) +
                  ", " + bool_name(options.transpose_a) + ", " + bool_name(options.transpose_b);
  for (const long value : {config.block_m, config.block_n, config.block_k, config.stages,
                           config.cluster_m, config.group_m}) {
    spec.function += ", " + std::to_string(value);
  }
  spec.function += ">>";
  spec.params_type = "tk::matmul::Params";
  spec.threads = matmul::kThreads;
  spec.shared_bytes = matmul::shared_bytes(config);
  spec.cluster_size = static_cast<int>(config.cluster_m);
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

}  // namespace tk::ffi
