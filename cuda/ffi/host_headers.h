// The headers that handlers share with kernels, as they were when this was built.
#pragma once

#include "runtime/settings.h"

namespace tk::ffi {

inline constexpr runtime::HostHeader kHostHeaders[] = {
// {path, digest} of HOST_HEADERS in sources.bzl, written by the build.
#include "ffi/host_headers.inc"
};

}  // namespace tk::ffi
