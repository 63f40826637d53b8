// Addresses in the shared memory of a block, as the backend counts them.
#pragma once

#ifdef TK_INTERPRETER
#include "tk/interpreter/engine.h"
namespace tk::detail {
using interpreter::shared_address;
}  // namespace tk::detail
#else
#include "tk/sm90/ptx/thread.cuh"
namespace tk::detail {
using ptx::shared_address;
}  // namespace tk::detail
#endif
