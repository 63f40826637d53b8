// The settings of a free-standing kernel's call, as tk_kernel_v1 decodes them.
#pragma once

#include <cstdint>
#include <string_view>

#include "ffi/ffi_util.h"

namespace tk::ffi {

// Fields match tk_jax.kernel.KernelSettings.
struct KernelSettings {
  std::string_view symbol;
  std::string_view header;  // relative to the source root, or empty
  std::string_view source;  // device code, or empty
  std::string_view function;
  std::int64_t threads;
  std::int64_t shared_bytes;
  std::int64_t cluster_size;
  std::int64_t grid_x;
  std::int64_t grid_y;
  std::int64_t grid_z;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::ffi::KernelSettings, StructMember<std::string_view>("symbol"),
                     StructMember<std::string_view>("header"),
                     StructMember<std::string_view>("source"),
                     StructMember<std::string_view>("function"),
                     StructMember<std::int64_t>("threads"),
                     StructMember<std::int64_t>("shared_bytes"),
                     StructMember<std::int64_t>("cluster_size"),
                     StructMember<std::int64_t>("grid_x"), StructMember<std::int64_t>("grid_y"),
                     StructMember<std::int64_t>("grid_z"));
