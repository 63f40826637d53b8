// The matmul kernels that the interpreter can run: those that default_config chooses, and one in
// clusters.
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
const Registration kClustered[] = {registered<bf16, false, false, 128, 4, 2>(),
                                   registered<bf16, true, true, 128, 4, 2>()};

}  // namespace
}  // namespace tk::matmul
