// The matmul kernels that are compiled with the interpreter: those that default_config chooses.
// Others are compiled when they are asked for.
#include "ffi/matmul_kernels.h"
#include "interpreter/registry.h"
#include "kernels/matmul/kernel.cuh"

namespace tk::matmul {
namespace {

using interpreter::Registration;
using interpreter::run_kernel;

template <typename T>
constexpr runtime::DataType kDataType =
    kSame<T, bf16> ? runtime::DataType::kBFloat16 : runtime::DataType::kFloat16;

template <typename T, bool kTransposeA, bool kTransposeB, int kBlockN, int kStages, int kClusterM>
Registration registered() {
  const ffi::MatmulKernel kernel = {
      kDataType<T>, {kTransposeA, kTransposeB}, {128, kBlockN, 64, kStages, kClusterM, 8}};
  return {
      *kernel.spec(),
      run_kernel<
          multiply<Traits<T, kTransposeA, kTransposeB, 128, kBlockN, 64, kStages, kClusterM, 8>>,
          Params>};
}

template <typename T, bool kTransposeA, bool kTransposeB>
void register_configs() {
  registered<T, kTransposeA, kTransposeB, 256, 4, 1>();
  registered<T, kTransposeA, kTransposeB, 128, 6, 1>();
}

template <typename T>
bool register_layouts() {
  register_configs<T, false, false>();
  register_configs<T, false, true>();
  register_configs<T, true, false>();
  register_configs<T, true, true>();
  return true;
}

const bool kRegistered[] = {register_layouts<bf16>(), register_layouts<fp16>()};

}  // namespace
}  // namespace tk::matmul
