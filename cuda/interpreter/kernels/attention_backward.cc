// The backward kernels of attention that are compiled with the interpreter: those that
// backward_config chooses. Others are compiled when they are asked for.
#include "ffi/attention_kernels.h"
#include "interpreter/registry.h"
#include "kernels/attention/backward.cuh"
#include "kernels/attention/backward_finish.cuh"
#include "kernels/attention/backward_prepare.cuh"

namespace tk::attention {
namespace {

using interpreter::Registration;
using interpreter::run_kernel;

template <typename T>
constexpr runtime::DataType kDataType =
    kSame<T, bf16> ? runtime::DataType::kBFloat16 : runtime::DataType::kFloat16;

template <typename T, int kHeadDim, Mask kMask, bool kDeterministic, int kBlockQ>
ffi::AttentionBackwardKernels register_main() {
  const ffi::AttentionBackwardKernels kernels = {
      kDataType<T>, kHeadDim, kHeadDim, kMask, 0, kDeterministic, {kBlockQ, 128, 2}};
  Registration(
      *kernels.main_spec(),
      run_kernel<backward<BackwardTraits<T, kHeadDim, kMask, 0, kDeterministic, kBlockQ, 128, 2>>,
                 BackwardParams>);
  return kernels;
}

template <typename T, int kHeadDim, int kBlockQ>
bool register_head_dim() {
  register_main<T, kHeadDim, Mask::kNone, false, kBlockQ>();
  register_main<T, kHeadDim, Mask::kNone, true, kBlockQ>();
  register_main<T, kHeadDim, Mask::kCausal, false, kBlockQ>();
  const auto kernels = register_main<T, kHeadDim, Mask::kCausal, true, kBlockQ>();
  Registration(*kernels.prepare_spec(),
               run_kernel<backward_prepare<T, kHeadDim>, BackwardPrepareParams>);
  Registration(*kernels.last_spec(),
               run_kernel<backward_finish<T, kHeadDim>, BackwardFinishParams>);
  return true;
}

const bool kRegistered[] = {register_head_dim<bf16, 64, 128>(), register_head_dim<bf16, 128, 64>(),
                            register_head_dim<fp16, 64, 128>(), register_head_dim<fp16, 128, 64>()};

}  // namespace
}  // namespace tk::attention
