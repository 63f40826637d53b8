// What handlers ask of where their calls run, on a GPU: nobody wants to be told of arrays, and a
// call runs once. The interpreter's answers are in interpreter/ffi/runtime.cc.
#include "ffi/ffi_util.h"

namespace tk::ffi {

extern const bool kInterpreted = false;

void declare_call_arrays(std::span<const CallArray>) {}

Status explore(const std::function<Status()>& call) { return call(); }

}  // namespace tk::ffi
