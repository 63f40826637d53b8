// The targets tk_linear_attention_chunk_sums_v1 and tk_linear_attention_gate_gradients_v1: what a
// call does to its gates before and after everything else.
#include "ffi/linear_attention_gates.h"

#include "ffi/ffi_util.h"
#include "ffi/handlers.h"

namespace tk::ffi {
namespace {

constexpr const char* kSumsName = "tk_linear_attention_chunk_sums_v1";
constexpr const char* kGradientsName = "tk_linear_attention_gate_gradients_v1";

using Name = LinearAttentionGateKernel::Name;
constexpr LinearAttentionGateKernel kSums = {Name::kChunkSums};
constexpr LinearAttentionGateKernel kGradients = {Name::kGateGradients};
runtime::KernelTable<KernelKey> kernels;

// -- Sums of chunks -------------------------------------------------------------------------------

struct SumsBuffers {
  AnyBuffer x, sums;
};

// x has [B, T, H], and one element for all along axes of size 1.
Result<GateSizes> read_sums(const SumsBuffers& b, const ChunkSumsOptions& options) {
  if (Status status = first_error({check_rank("x", b.x, 3), check_rank("sums", b.sums, 3),
                                   check_dtype("x", b.x, xffi::DataType::F32)});
      !status.ok()) {
    return status.error();
  }
  const GateSizes s{dim(b.sums, 0), options.seqlen, dim(b.sums, 1)};
  if (Status status = check_gate_sizes(s); !status.ok()) return status.error();
  const std::int64_t whole[] = {s.batch, s.seqlen, s.num_heads};
  for (std::size_t i = 0; i < 3; ++i) {
    if (dim(b.x, i) != whole[i] && dim(b.x, i) != 1) {
      return invalid("x has shape " + shape_text(b.x) + "; expected 1 or " +
                     std::to_string(whole[i]) + " along axis " + std::to_string(i));
    }
  }
  if (Status status = check_floats("sums", b.sums, {s.batch, s.num_heads, s.padded()});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_sums(const Device& device, const SumsBuffers& buffers,
                       const ChunkSumsOptions& options) {
  const auto sizes = read_sums(buffers, options);
  return sizes.ok() ? load(kernels, kSums, device) : sizes.error();
}

Status execute_sums(const Execution& on, const SumsBuffers& b, const ChunkSumsOptions& options) {
  const auto sizes = read_sums(b, options);
  if (!sizes.ok()) return sizes.error();
  if (sizes->batch == 0) return {};
  declare_arrays({{"x", b.x, false}, {"sums", b.sums, true}});
  const std::int64_t tokens = dim(b.x, 1), heads = dim(b.x, 2);
  linear_attention::ChunkSumsParams params = {};
  params.x = floats(b.x);
  params.sums = floats(b.sums);
  params.x_batch_stride = dim(b.x, 0) == 1 ? 0 : tokens * heads;
  params.x_token_stride = tokens == 1 ? 0 : heads;
  params.x_head_stride = heads == 1 ? 0 : 1;
  params.scale = options.scale;
  params.least = options.least;
  return launch_gates(kernels, kSums, on, *sizes, &params);
}

// -- Gradients of gates ---------------------------------------------------------------------------

struct GradientsBuffers {
  GatePartBuffers parts;
  AnyBuffer dgates;
};

Result<GateSizes> read_gradients(const GradientsBuffers& b) {
  if (Status status = check_rank("dgates", b.dgates, 3); !status.ok()) return status.error();
  const GateSizes s{dim(b.dgates, 0), dim(b.dgates, 1), dim(b.dgates, 2)};
  if (Status status =
          first_error({check_gate_sizes(s), check_dtype("dgates", b.dgates, xffi::DataType::F32),
                       check_gate_parts(b.parts, s)});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_gradients(const Device& device, const GradientsBuffers& buffers) {
  const auto sizes = read_gradients(buffers);
  return sizes.ok() ? load(kernels, kGradients, device) : sizes.error();
}

Status execute_gradients(const Execution& on, const GradientsBuffers& b) {
  const auto sizes = read_gradients(b);
  if (!sizes.ok()) return sizes.error();
  if (sizes->batch == 0) return {};
  declare_arrays({{"as_query", b.parts.as_query, false},
                  {"as_key", b.parts.as_key, false},
                  {"to_state", b.parts.to_state, false},
                  {"through", b.parts.through, false},
                  {"dgates", b.dgates, true}});
  linear_attention::GateGradientsParams params = {};
  params.parts = kernel_gate_parts(b.parts);
  params.dgates = floats(b.dgates);
  return launch_gates(kernels, kGradients, on, *sizes, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error sums(Stage stage, AnyBuffer x, Ret sums, ChunkSumsOptions options) {
  const SumsBuffers buffers = {x, *sums};
  return run_stage(
      kSumsName, stage,
      [&](const Device& device) { return initialize_sums(device, buffers, options); },
      [&](const Execution& on) { return execute_sums(on, buffers, options); });
}

xffi::Error gradients(Stage stage, AnyBuffer as_query, AnyBuffer as_key, AnyBuffer to_state,
                      AnyBuffer through, Ret dgates) {
  const GradientsBuffers buffers = {{as_query, as_key, to_state, through}, *dgates};
  return run_stage(
      kGradientsName, stage,
      [&](const Device& device) { return initialize_gradients(device, buffers); },
      [&](const Execution& on) { return execute_gradients(on, buffers); });
}

template <typename Binding>
auto bind_sums(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // x
      .template Ret<AnyBuffer>()  // sums
      .template Attr<ChunkSumsOptions>("options");
}

template <typename Binding>
auto bind_gradients(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()   // as_query
      .template Arg<AnyBuffer>()   // as_key
      .template Arg<AnyBuffer>()   // to_state
      .template Arg<AnyBuffer>()   // through
      .template Ret<AnyBuffer>();  // dgates
}

}  // namespace

TK_DEFINE_TARGET(kLinearAttentionChunkSumsTarget, kSumsName, sums, bind_sums);
TK_DEFINE_TARGET(kLinearAttentionGateGradientsTarget, kGradientsName, gradients, bind_gradients);

}  // namespace tk::ffi
