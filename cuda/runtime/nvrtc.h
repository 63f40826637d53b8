// NVRTC, the run-time compiler, opened when a kernel has to be compiled.
#pragma once

#include <string>
#include <vector>

#include "runtime/status.h"

namespace tk::runtime {

struct NvrtcVersion {
  int major = 0;
  int minor = 0;
  std::string path;  // the library that was opened
};

struct NvrtcOutput {
  std::string cubin;
  std::string log;  // the compiler's and ptxas's
};

// Opens libnvrtc: TK_JAX_NVRTC (a file or a folder), then the folders that Python found, then
// whatever the loader finds. A failure is not remembered: the next call tries again.
Result<NvrtcVersion> nvrtc_version();

// `name` stands for the source's file in messages and when its includes are searched for.
Result<NvrtcOutput> nvrtc_compile(const std::string& source, const std::string& name,
                                  const std::vector<std::string>& options);

}  // namespace tk::runtime
