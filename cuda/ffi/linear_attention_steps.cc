// The targets tk_linear_attention_step_gates_v1, tk_linear_attention_step_gradients_v1 and
// tk_linear_attention_head_sums_v1: what a state-space model's steps are before and after
// everything else.
#include <array>

#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_gates.h"

namespace tk::ffi {
namespace {

constexpr const char* kGatesName = "tk_linear_attention_step_gates_v1";
constexpr const char* kGradientsName = "tk_linear_attention_step_gradients_v1";
constexpr const char* kHeadSumsName = "tk_linear_attention_head_sums_v1";
constexpr std::int64_t kHeadParts = linear_attention::kHeadParts;

using Name = LinearAttentionGateKernel::Name;
runtime::KernelTable<KernelKey> kernels;

// -- Steps ----------------------------------------------------------------------------------------

struct StepBuffers {
  AnyBuffer raw, rates, biases;  // [B, T, H]; [B or 1, H]; the same, or of size 0
};

Status check_heads(const char* name, const AnyBuffer& buffer, const GateSizes& s) {
  if (Status status = check_rank(name, buffer, 2); !status.ok()) return status;
  return check_floats(name, buffer, {dim(buffer, 0) == 1 ? 1 : s.batch, s.num_heads});
}

Result<GateSizes> read_steps(const StepBuffers& b) {
  if (Status status = check_rank("raw", b.raw, 3); !status.ok()) return status.error();
  const GateSizes s{dim(b.raw, 0), dim(b.raw, 1), dim(b.raw, 2)};
  if (Status status = first_error({check_gate_sizes(s), check_heads("rates", b.rates, s)});
      !status.ok()) {
    return status.error();
  }
  const Status status = is_given(b.biases) ? check_heads("biases", b.biases, s)
                                           : check_dtype("biases", b.biases, xffi::DataType::F32);
  if (!status.ok()) return status.error();
  return s;
}

linear_attention::Steps kernel_steps(const StepBuffers& b, const StepOptions& options) {
  const auto batch_stride = [](const AnyBuffer& buffer) {
    return is_given(buffer) && dim(buffer, 0) != 1 ? dim(buffer, 1) : 0;
  };
  linear_attention::Steps steps = {};
  steps.raw = b.raw.untyped_data();
  steps.rates = floats(b.rates);
  steps.biases = optional_floats(b.biases);
  steps.rates_stride = batch_stride(b.rates);
  steps.biases_stride = batch_stride(b.biases);
  steps.softplus = options.softplus;
  steps.least = options.least;
  steps.most = options.most;
  steps.least_log_decay = options.least_log_decay;
  return steps;
}

struct Call {
  GateSizes sizes;
  LinearAttentionGateKernel kernel;
};

Result<Call> with_kernel(const GateSizes& sizes, Name name, const AnyBuffer& raw) {
  const auto dtype = data_type(raw);
  if (!dtype.ok()) return dtype.error();
  return Call{sizes, {name, *dtype}};
}

// -- Gates ----------------------------------------------------------------------------------------

struct GatesBuffers {
  StepBuffers steps;
  AnyBuffer skip;  // [H], or of size 0
  AnyBuffer sums, weights;
  AnyBuffer skip_columns;  // [H, columns], or of size 0
};

Result<Call> read_gates(const GatesBuffers& b) {
  const auto s = read_steps(b.steps);
  if (!s.ok()) return s.error();
  if (Status status =
          first_error({check_optional_floats("skip", b.skip, {s->num_heads}),
                       check_floats("sums", b.sums, {s->batch, s->num_heads, s->padded()}),
                       check_floats("weights", b.weights, {s->batch, s->num_heads, s->padded()})});
      !status.ok()) {
    return status.error();
  }
  if (is_given(b.skip) != is_given(b.skip_columns)) {
    return invalid("skip and skip_columns go together");
  }
  if (is_given(b.skip)) {
    if (Status status = check_rank("skip_columns", b.skip_columns, 2); !status.ok()) {
      return status.error();
    }
    const std::int64_t columns = dim(b.skip_columns, 1);
    if (Status status = check_floats("skip_columns", b.skip_columns, {s->num_heads, columns});
        !status.ok()) {
      return status.error();
    }
    if (columns % linear_attention::kSlice != 0 || int_product({columns}) < 0) {
      return invalid("skip_columns has " + std::to_string(columns) +
                     " columns; expected a multiple of 64");
    }
  }
  return with_kernel(*s, Name::kStepGates, b.steps.raw);
}

Status execute_gates(const Execution& on, const GatesBuffers& b, const StepOptions& options) {
  const auto call = read_gates(b);
  if (!call.ok()) return call.error();
  if (call->sizes.batch == 0) return {};
  declare_arrays({{"raw", b.steps.raw, false},
                  {"rates", b.steps.rates, false},
                  {"biases", b.steps.biases, false},
                  {"skip", b.skip, false},
                  {"sums", b.sums, true},
                  {"weights", b.weights, true},
                  {"skip_columns", b.skip_columns, true}});
  linear_attention::StepGatesParams params = {};
  params.steps = kernel_steps(b.steps, options);
  params.skip = optional_floats(b.skip);
  params.sums = floats(b.sums);
  params.weights = floats(b.weights);
  params.skip_columns = optional_floats(b.skip_columns);
  params.columns = is_given(b.skip) ? static_cast<int>(dim(b.skip_columns, 1)) : 0;
  return launch_gates(kernels, call->kernel, on, call->sizes, &params);
}

// -- Gradients ------------------------------------------------------------------------------------

struct GradientsBuffers {
  StepBuffers steps;
  GatePartBuffers parts;
  AnyBuffer dweights;
  AnyBuffer dskip;  // [B, H, chunks, columns], or of size 0
  AnyBuffer draw, head_parts;
};

Result<Call> read_gradients(const GradientsBuffers& b) {
  const auto s = read_steps(b.steps);
  if (!s.ok()) return s.error();
  if (Status status =
          first_error({check_gate_parts(b.parts, *s),
                       check_floats("dweights", b.dweights, {s->batch, s->num_heads, s->padded()}),
                       check_like("draw", b.draw, b.steps.raw, {s->batch, s->seqlen, s->num_heads}),
                       check_floats("head_parts", b.head_parts,
                                    {s->batch, s->chunks(), kHeadParts, s->num_heads}),
                       check_dtype("dskip", b.dskip, xffi::DataType::F32)});
      !status.ok()) {
    return status.error();
  }
  if (is_given(b.dskip)) {
    if (Status status = check_rank("dskip", b.dskip, 4); !status.ok()) return status.error();
    const std::int64_t columns = dim(b.dskip, 3);
    if (Status status =
            check_dims("dskip", b.dskip, {s->batch, s->num_heads, s->chunks(), columns});
        !status.ok()) {
      return status.error();
    }
    if (columns % linear_attention::kSlice != 0 || int_product({columns}) < 0) {
      return invalid("dskip has " + std::to_string(columns) +
                     " columns; expected a multiple of 64");
    }
  }
  return with_kernel(*s, Name::kStepGradients, b.steps.raw);
}

Status execute_gradients(const Execution& on, const GradientsBuffers& b,
                         const StepOptions& options) {
  const auto call = read_gradients(b);
  if (!call.ok()) return call.error();
  if (call->sizes.batch == 0) return {};
  declare_arrays({{"raw", b.steps.raw, false},
                  {"rates", b.steps.rates, false},
                  {"biases", b.steps.biases, false},
                  {"as_query", b.parts.as_query, false},
                  {"as_key", b.parts.as_key, false},
                  {"to_state", b.parts.to_state, false},
                  {"through", b.parts.through, false},
                  {"dweights", b.dweights, false},
                  {"dskip", b.dskip, false},
                  {"draw", b.draw, true},
                  {"head_parts", b.head_parts, true}});
  linear_attention::StepGradientsParams params = {};
  params.steps = kernel_steps(b.steps, options);
  params.parts = kernel_gate_parts(b.parts);
  params.dweights = floats(b.dweights);
  params.dskip = optional_floats(b.dskip);
  params.draw = b.draw.untyped_data();
  params.head_parts = floats(b.head_parts);
  params.columns = is_given(b.dskip) ? static_cast<int>(dim(b.dskip, 3)) : 0;
  return launch_gates(kernels, call->kernel, on, call->sizes, &params);
}

// -- Sums -----------------------------------------------------------------------------------------

struct HeadSumsBuffers {
  AnyBuffer head_parts;                    // [.., rows, kHeadParts, H]
  std::array<AnyBuffer, kHeadParts> sums;  // [.., H] each, or of size 0
};
struct HeadSumsSizes {
  std::int64_t batch, rows, num_heads;
};
constexpr LinearAttentionGateKernel kHeadSums = {Name::kHeadSums};

Result<HeadSumsSizes> read_head_sums(const HeadSumsBuffers& b) {
  const auto dims = b.head_parts.dimensions();
  if (dims.size() < 3 || dims[dims.size() - 2] != kHeadParts) {
    return invalid("head_parts has shape " + shape_text(b.head_parts) +
                   "; expected (.., rows, 3, H)");
  }
  HeadSumsSizes s{1, dims[dims.size() - 3], dims[dims.size() - 1]};
  for (std::size_t i = 0; i + 3 < dims.size(); ++i) s.batch *= dims[i];
  if (int_product({s.rows}) < 0 || int_product({s.num_heads}) < 0) {
    return unsupported("more than 2^31 - 1 rows or heads: " + shape_text(b.head_parts));
  }
  if (Status status = first_error({check_dtype("head_parts", b.head_parts, xffi::DataType::F32),
                                   check_grid("batch elements", s.batch)});
      !status.ok()) {
    return status.error();
  }
  for (const AnyBuffer& sums : b.sums) {
    if (Status status = check_dtype("sums", sums, xffi::DataType::F32); !status.ok()) {
      return status.error();
    }
    const auto found = static_cast<std::int64_t>(sums.element_count());
    if (is_given(sums) && found != s.batch * s.num_heads) {
      return invalid("sums has shape " + shape_text(sums) + "; expected that of head_parts, " +
                     shape_text(b.head_parts) + ", without its rows and parts");
    }
  }
  return s;
}

Status initialize_head_sums(const Device& device, const HeadSumsBuffers& buffers) {
  const auto sizes = read_head_sums(buffers);
  return sizes.ok() ? load(kernels, kHeadSums, device) : sizes.error();
}

Status execute_head_sums(const Execution& on, const HeadSumsBuffers& b) {
  const auto s = read_head_sums(b);
  if (!s.ok()) return s.error();
  if (s->batch == 0 || s->num_heads == 0) return {};
  declare_arrays({{"head_parts", b.head_parts, false},
                  {"drates", b.sums[0], true},
                  {"dbiases", b.sums[1], true},
                  {"dskip", b.sums[2], true}});
  linear_attention::HeadSumsParams params = {};
  params.head_parts = floats(b.head_parts);
  for (std::size_t i = 0; i < kHeadParts; ++i) params.sums[i] = optional_floats(b.sums[i]);
  params.rows = static_cast<int>(s->rows);
  params.num_heads = static_cast<int>(s->num_heads);
  const auto loaded = find_loaded(kernels, kHeadSums, on.device);
  if (!loaded.ok()) return loaded.error();
  return runtime::launch(
      **loaded, on.stream,
      {ceil_div(s->num_heads, linear_attention::kHeadsOfBlock), kHeadParts, s->batch}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error gates(Stage stage, AnyBuffer raw, AnyBuffer rates, AnyBuffer biases, AnyBuffer skip,
                  Ret sums, Ret weights, Ret skip_columns, StepOptions options) {
  const GatesBuffers buffers = {{raw, rates, biases}, skip, *sums, *weights, *skip_columns};
  return run_stage(
      kGatesName, stage,
      [&](const Device& device) { return load(kernels, read_gates(buffers), device); },
      [&](const Execution& on) { return execute_gates(on, buffers, options); });
}

xffi::Error gradients(Stage stage, AnyBuffer raw, AnyBuffer rates, AnyBuffer biases,
                      AnyBuffer as_query, AnyBuffer as_key, AnyBuffer to_state, AnyBuffer through,
                      AnyBuffer dweights, AnyBuffer dskip, Ret draw, Ret head_parts,
                      StepOptions options) {
  const GradientsBuffers buffers = {
      {raw, rates, biases}, {as_query, as_key, to_state, through}, dweights, dskip, *draw,
      *head_parts};
  return run_stage(
      kGradientsName, stage,
      [&](const Device& device) { return load(kernels, read_gradients(buffers), device); },
      [&](const Execution& on) { return execute_gradients(on, buffers, options); });
}

xffi::Error head_sums(Stage stage, AnyBuffer head_parts, Ret drates, Ret dbiases, Ret dskip) {
  const HeadSumsBuffers buffers = {head_parts, {*drates, *dbiases, *dskip}};
  return run_stage(
      kHeadSumsName, stage,
      [&](const Device& device) { return initialize_head_sums(device, buffers); },
      [&](const Execution& on) { return execute_head_sums(on, buffers); });
}

template <typename Binding>
auto bind_gates(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // raw
      .template Arg<AnyBuffer>()  // rates
      .template Arg<AnyBuffer>()  // biases, or of size 0
      .template Arg<AnyBuffer>()  // skip, or of size 0
      .template Ret<AnyBuffer>()  // sums
      .template Ret<AnyBuffer>()  // weights
      .template Ret<AnyBuffer>()  // skip_columns, of size 0 without skip
      .template Attr<StepOptions>("options");
}

template <typename Binding>
auto bind_gradients(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // raw
      .template Arg<AnyBuffer>()  // rates
      .template Arg<AnyBuffer>()  // biases, or of size 0
      .template Arg<AnyBuffer>()  // as_query
      .template Arg<AnyBuffer>()  // as_key
      .template Arg<AnyBuffer>()  // to_state
      .template Arg<AnyBuffer>()  // through
      .template Arg<AnyBuffer>()  // dweights
      .template Arg<AnyBuffer>()  // dskip, or of size 0
      .template Ret<AnyBuffer>()  // draw
      .template Ret<AnyBuffer>()  // head_parts
      .template Attr<StepOptions>("options");
}

template <typename Binding>
auto bind_head_sums(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()   // head_parts
      .template Ret<AnyBuffer>()   // drates, or of size 0
      .template Ret<AnyBuffer>()   // dbiases, or of size 0
      .template Ret<AnyBuffer>();  // dskip, or of size 0
}

}  // namespace

TK_DEFINE_TARGET(kLinearAttentionStepGatesTarget, kGatesName, gates, bind_gates);
TK_DEFINE_TARGET(kLinearAttentionStepGradientsTarget, kGradientsName, gradients, bind_gradients);
TK_DEFINE_TARGET(kLinearAttentionHeadSumsTarget, kHeadSumsName, head_sums, bind_head_sums);

}  // namespace tk::ffi
