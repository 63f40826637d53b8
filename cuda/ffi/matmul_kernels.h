// The specialisations of the matmul kernel; a spec is refused where the kernel does not offer it.
#pragma once

#include "ffi/ffi_util.h"
#include "kernels/matmul/matmul.h"

namespace tk::ffi {

struct MatmulKernel {
  runtime::DataType dtype;
  matmul::Options options;
  matmul::Config config;

  KernelKey key() const;
  Result<KernelSpec> spec() const;
};

}  // namespace tk::ffi

TK_REGISTER_SETTINGS(tk::matmul::Options, StructMember<bool>("transpose_a"),
                     StructMember<bool>("transpose_b"));
TK_REGISTER_SETTINGS(tk::matmul::Config, StructMember<std::int64_t>("block_m"),
                     StructMember<std::int64_t>("block_n"), StructMember<std::int64_t>("block_k"),
                     StructMember<std::int64_t>("stages"), StructMember<std::int64_t>("cluster_m"),
                     StructMember<std::int64_t>("group_m"));
