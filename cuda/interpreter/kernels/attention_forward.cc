// The forward kernels of attention that are compiled with the interpreter: every configuration that
// forward_config chooses. Others are compiled when they are asked for.
#include "ffi/attention_kernels.h"
#include "interpreter/registry.h"
#include "kernels/attention/forward.cuh"

namespace tk::attention {
namespace {

using interpreter::Registration;
using interpreter::run_kernel;

template <typename T>
constexpr runtime::DataType kDataType =
    kSame<T, bf16> ? runtime::DataType::kBFloat16 : runtime::DataType::kFloat16;

template <typename T, int kHeadDim, Mask kMask, int kBlockQ, int kBlockKv>
void register_one() {
  const ffi::AttentionForwardKernel kernel = {kDataType<T>, kHeadDim, kHeadDim,
                                              kMask,        0,        {kBlockQ, kBlockKv, 2}};
  Registration(
      *kernel.spec(),
      run_kernel<forward<ForwardTraits<T, kHeadDim, kHeadDim, kMask, 0, kBlockQ, kBlockKv, 2>>,
                 ForwardParams>);
}

template <typename T, Mask kMask>
bool register_tiles() {
  register_one<T, 64, kMask, 192, 128>();
  register_one<T, 128, kMask, 128, 128>();
  register_one<T, 128, kMask, 128, 160>();
  return true;
}

const bool kRegistered[] = {
    register_tiles<bf16, Mask::kNone>(), register_tiles<bf16, Mask::kCausal>(),
    register_tiles<fp16, Mask::kNone>(), register_tiles<fp16, Mask::kCausal>()};

}  // namespace
}  // namespace tk::attention
