// A KernelSpec as the dict that Python has of it, in both modules.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "runtime/kernel_spec.h"

namespace tk::ffi {

inline nanobind::dict spec_to_dict(const runtime::KernelSpec& spec) {
  nanobind::dict out;
  out["symbol"] = spec.symbol;
  out["header"] = spec.header;
  out["source"] = spec.source;
  out["function"] = spec.function;
  out["params_type"] = spec.params_type;
  out["threads"] = spec.threads;
  out["shared_bytes"] = spec.shared_bytes;
  out["cluster_size"] = spec.cluster_size;
  out["min_blocks"] = spec.min_blocks;
  return out;
}

}  // namespace tk::ffi
