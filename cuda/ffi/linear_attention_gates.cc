// The targets tk_linear_attention_chunk_sums_v1 and tk_linear_attention_gate_gradients_v1: what a
// call does to its gates before and after everything else.
#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "ffi/linear_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kSumsName = "tk_linear_attention_chunk_sums_v1";
constexpr const char* kGradientsName = "tk_linear_attention_gate_gradients_v1";

// One kernel each.
enum GateKernel : std::int64_t { kChunkSums, kGateGradients };
runtime::KernelTable<KernelKey> kernels;

struct GateSizes {
  std::int64_t batch, seqlen, num_heads;

  std::int64_t chunks() const { return ceil_div(seqlen, linear_attention::kChunk); }
  std::int64_t padded() const { return chunks() * linear_attention::kChunk; }
};

Status check_sizes(const GateSizes& s) {
  if (s.seqlen < 1 || s.num_heads < 1) {
    return invalid(std::to_string(s.seqlen) + " tokens of " + std::to_string(s.num_heads) +
                   " heads; expected at least one of both");
  }
  if (s.seqlen > kMaxInt - linear_attention::kChunk ||
      int_product({s.batch, s.num_heads, s.padded()}) < 0) {
    return unsupported("more than 2^31 - 1 gates: " + std::to_string(s.batch) + " x " +
                       std::to_string(s.num_heads) + " x " + std::to_string(s.padded()));
  }
  return first_error(
      {check_grid("times 16 heads", ceil_div(s.num_heads, linear_attention::kHeadsOfBlock)),
       check_grid("batch elements", s.batch)});
}

struct Gate {
  GateKernel which;
  KernelKey key() const { return {{which}}; }
  Result<KernelSpec> spec() const {
    return which == kChunkSums ? chunk_sums_spec() : gate_gradients_spec();
  }
};

template <typename Params>
Status launch(int device_ordinal, runtime::cuda::Stream stream, GateKernel which,
              const GateSizes& s, Params* params) {
  const auto device = runtime::open_device(device_ordinal);
  if (!device.ok()) return device.error();
  const auto kernel = find_loaded(kernels, Gate{which}, **device);
  if (!kernel.ok()) return kernel.error();
  const runtime::ScopedContext context(**device);
  params->batch = static_cast<int>(s.batch);
  params->seqlen = static_cast<int>(s.seqlen);
  params->num_heads = static_cast<int>(s.num_heads);
  return runtime::launch(**kernel, stream,
                         {ceil_div(s.chunks(), linear_attention::kChunksOfBlock),
                          ceil_div(s.num_heads, linear_attention::kHeadsOfBlock), s.batch},
                         params);
}

// -- Sums of chunks -------------------------------------------------------------------------------

struct SumsBuffers {
  AnyBuffer x, y;
  AnyBuffer sums, moved;
};

// x has [B, T, H], and one element for all along axes of size 1; y is [B, T, H].
Result<GateSizes> read_sums(const SumsBuffers& b, const ChunkSumsOptions& options) {
  if (Status status = first_error({check_rank("x", b.x, 3), check_rank("sums", b.sums, 3),
                                   check_dtype("x", b.x, xffi::DataType::F32)});
      !status.ok()) {
    return status.error();
  }
  const GateSizes s{dim(b.sums, 0), options.seqlen, dim(b.sums, 1)};
  if (Status status = check_sizes(s); !status.ok()) return status.error();
  const std::int64_t whole[] = {s.batch, s.seqlen, s.num_heads};
  for (std::size_t i = 0; i < 3; ++i) {
    if (dim(b.x, i) != whole[i] && dim(b.x, i) != 1) {
      return invalid("x has shape " + shape_text(b.x) + "; expected 1 or " +
                     std::to_string(whole[i]) + " along axis " + std::to_string(i));
    }
  }
  if (Status status = first_error(
          {check_optional_floats("y", b.y, {s.batch, s.seqlen, s.num_heads}),
           check_floats("sums", b.sums, {s.batch, s.num_heads, s.padded()}),
           check_optional_floats("moved", b.moved, {s.batch, s.num_heads, s.padded()})});
      !status.ok()) {
    return status.error();
  }
  if (is_given(b.y) != is_given(b.moved)) return invalid("y and moved go together");
  return s;
}

Status initialize_sums(int device, const SumsBuffers& buffers, const ChunkSumsOptions& options) {
  const auto sizes = read_sums(buffers, options);
  return sizes.ok() ? load(kernels, Gate{kChunkSums}, device) : sizes.error();
}

Status execute_sums(int device, runtime::cuda::Stream stream, const SumsBuffers& b,
                    const ChunkSumsOptions& options) {
  const auto sizes = read_sums(b, options);
  if (!sizes.ok()) return sizes.error();
  if (sizes->batch == 0) return {};
  declare_arrays(
      {{"x", b.x, false}, {"y", b.y, false}, {"sums", b.sums, true}, {"moved", b.moved, true}});
  const std::int64_t tokens = dim(b.x, 1), heads = dim(b.x, 2);
  linear_attention::ChunkSumsParams params = {};
  params.x = floats(b.x);
  params.y = optional_floats(b.y);
  params.sums = floats(b.sums);
  params.moved = optional_floats(b.moved);
  params.x_batch_stride = dim(b.x, 0) == 1 ? 0 : tokens * heads;
  params.x_token_stride = tokens == 1 ? 0 : heads;
  params.x_head_stride = heads == 1 ? 0 : 1;
  params.scale = options.scale;
  params.least = options.least;
  return launch(device, stream, kChunkSums, *sizes, &params);
}

// -- Gradients of gates ---------------------------------------------------------------------------

struct GradientsBuffers {
  AnyBuffer as_query, as_key, to_state, through;
  AnyBuffer dgates;
};

Result<GateSizes> read_gradients(const GradientsBuffers& b) {
  if (Status status = check_rank("dgates", b.dgates, 3); !status.ok()) return status.error();
  const GateSizes s{dim(b.dgates, 0), dim(b.dgates, 1), dim(b.dgates, 2)};
  if (Status status =
          first_error({check_sizes(s), check_dtype("dgates", b.dgates, xffi::DataType::F32),
                       check_floats("as_query", b.as_query, {s.batch, s.num_heads, s.padded()}),
                       check_floats("as_key", b.as_key, {s.batch, s.num_heads, s.padded()}),
                       check_floats("to_state", b.to_state, {s.batch, s.num_heads, s.padded()}),
                       check_floats("through", b.through, {s.batch, s.num_heads, s.padded()})});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_gradients(int device, const GradientsBuffers& buffers) {
  const auto sizes = read_gradients(buffers);
  return sizes.ok() ? load(kernels, Gate{kGateGradients}, device) : sizes.error();
}

Status execute_gradients(int device, runtime::cuda::Stream stream, const GradientsBuffers& b) {
  const auto sizes = read_gradients(b);
  if (!sizes.ok()) return sizes.error();
  if (sizes->batch == 0) return {};
  declare_arrays({{"as_query", b.as_query, false},
                  {"as_key", b.as_key, false},
                  {"to_state", b.to_state, false},
                  {"through", b.through, false},
                  {"dgates", b.dgates, true}});
  linear_attention::GateGradientsParams params = {};
  params.as_query = floats(b.as_query);
  params.as_key = floats(b.as_key);
  params.to_state = floats(b.to_state);
  params.through = floats(b.through);
  params.dgates = floats(b.dgates);
  return launch(device, stream, kGateGradients, *sizes, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error sums_initialize(std::int32_t device, AnyBuffer x, AnyBuffer y, Ret sums, Ret moved,
                            ChunkSumsOptions options) {
  return to_ffi(kSumsName, initialize_sums(device, {x, y, *sums, *moved}, options));
}

xffi::Error sums_execute(std::int32_t device, runtime::cuda::Stream stream, AnyBuffer x,
                         AnyBuffer y, Ret sums, Ret moved, ChunkSumsOptions options) {
  return to_ffi(kSumsName, explore([&] {
                  return execute_sums(device, stream, {x, y, *sums, *moved}, options);
                }));
}

xffi::Error gradients_initialize(std::int32_t device, AnyBuffer as_query, AnyBuffer as_key,
                                 AnyBuffer to_state, AnyBuffer through, Ret dgates) {
  return to_ffi(kGradientsName,
                initialize_gradients(device, {as_query, as_key, to_state, through, *dgates}));
}

xffi::Error gradients_execute(std::int32_t device, runtime::cuda::Stream stream, AnyBuffer as_query,
                              AnyBuffer as_key, AnyBuffer to_state, AnyBuffer through, Ret dgates) {
  return to_ffi(kGradientsName, explore([&] {
                  return execute_gradients(device, stream,
                                           {as_query, as_key, to_state, through, *dgates});
                }));
}

template <typename Binding>
auto bind_sums(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // x
      .template Arg<AnyBuffer>()  // y, or of size 0
      .template Ret<AnyBuffer>()  // sums
      .template Ret<AnyBuffer>()  // moved, of size 0 without y
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

XLA_FFI_DEFINE_HANDLER(
    kSumsInitialize, sums_initialize,
    bind_sums(xffi::Ffi::Bind<xffi::ExecutionStage::kInitialize>().Ctx<DeviceContext>()));
XLA_FFI_DEFINE_HANDLER(kSumsExecute, sums_execute,
                       bind_sums(xffi::Ffi::Bind().Ctx<DeviceContext>().Ctx<StreamContext>()),
                       {xffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(
    kGradientsInitialize, gradients_initialize,
    bind_gradients(xffi::Ffi::Bind<xffi::ExecutionStage::kInitialize>().Ctx<DeviceContext>()));
XLA_FFI_DEFINE_HANDLER(kGradientsExecute, gradients_execute,
                       bind_gradients(xffi::Ffi::Bind().Ctx<DeviceContext>().Ctx<StreamContext>()),
                       {xffi::Traits::kCmdBufferCompatible});

}  // namespace

const Target kLinearAttentionChunkSumsTarget = {kSumsName, kSumsInitialize, kSumsExecute};
const Target kLinearAttentionGateGradientsTarget = {kGradientsName, kGradientsInitialize,
                                                    kGradientsExecute};

}  // namespace tk::ffi
