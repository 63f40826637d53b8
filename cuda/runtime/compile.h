// From a specialisation to a cubin: shipped with the package, kept from before, or compiled now.
#pragma once

#include <string>

#include "runtime/kernel_spec.h"
#include "runtime/status.h"

namespace tk::runtime {

enum class Origin { kShipped, kCache, kCompiled };

struct Compiled {
  std::string cubin;
  std::string log;       // what the compiler said, ptxas's report included
  double seconds = 0.0;  // what it took now
  Origin origin = Origin::kCompiled;
};

enum class Lookup { kAllowed, kSkipped };

// Needs no GPU. With Lookup::kSkipped it compiles whatever is there already, and keeps the result.
Result<Compiled> compile(const KernelSpec& spec, Lookup lookup = Lookup::kAllowed);

// The same, and writes the result to `folder`, from where set_shipped_dirs lets it be found.
Result<Compiled> ship(const KernelSpec& spec, const std::string& folder, Lookup lookup);

// The names under which a kernel is shipped and kept; for tests and tools.
struct KernelKeys {
  std::string shipped;  // digest of sources, translation unit and options
  std::string cache;    // the same with the compiler's version
};
Result<KernelKeys> kernel_keys(const KernelSpec& spec);

}  // namespace tk::runtime
