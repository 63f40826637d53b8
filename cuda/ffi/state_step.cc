// The target tk_state_step_v1: one token's step of states, in place.
#include "ffi/handlers.h"
#include "ffi/state_step_kernels.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_state_step_v1";

runtime::KernelTable<KernelKey> kernels;

struct Buffers {
  AnyBuffer q, k, v;
  AnyBuffer decays, weights, skip;  // or of size 0
  AnyBuffer numerators, divisors;   // both or neither
  AnyBuffer state, normalizer;      // the latter where the options say so
  AnyBuffer out, next_state, next_normalizer;
};

struct Sizes {
  runtime::DataType key_dtype, value_dtype;
  std::int64_t batch, num_heads, key_heads, query_heads, key_dim, value_dim, queries;
  std::int64_t given_dim;  // of q and k

  bool empty() const { return batch == 0; }
};

bool is_given(const AnyBuffer& buffer) { return buffer.element_count() != 0; }

// Of float32 and these dimensions, of which each may be 1 for all; or of size 0.
Status check_gate(const char* name, const AnyBuffer& buffer,
                  std::initializer_list<std::int64_t> dims) {
  if (Status status = check_dtype(name, buffer, xffi::DataType::F32); !status.ok()) return status;
  if (!is_given(buffer)) return {};
  if (Status status = check_rank(name, buffer, dims.size()); !status.ok()) return status;
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (dim(buffer, i) != dims.begin()[i] && dim(buffer, i) != 1) {
      return invalid(std::string(name) + " has shape " + shape_text(buffer) + "; expected 1 or " +
                     std::to_string(dims.begin()[i]) + " along axis " + std::to_string(i));
    }
  }
  return {};
}

Status check_floats(const char* name, const AnyBuffer& buffer,
                    std::initializer_list<std::int64_t> expected) {
  return first_error(
      {check_dims(name, buffer, expected), check_dtype(name, buffer, xffi::DataType::F32)});
}

Status check_divides(const char* name, std::int64_t heads, std::int64_t all) {
  if (heads > 0 && all % heads == 0) return {};
  return invalid(std::string(name) + " has " + std::to_string(heads) +
                 " heads; expected a divisor of the " + std::to_string(all) + " heads of v");
}

Result<Sizes> read(const Buffers& b, const StateStepOptions& options) {
  if (Status status =
          first_error({check_rank("q", b.q, 3), check_rank("k", b.k, 3), check_rank("v", b.v, 3)});
      !status.ok()) {
    return status.error();
  }
  const auto key_dtype = data_type(b.k), value_dtype = data_type(b.v);
  if (!key_dtype.ok()) return key_dtype.error();
  if (!value_dtype.ok()) return value_dtype.error();
  Sizes s{*key_dtype,  *value_dtype, dim(b.v, 0), dim(b.v, 1), dim(b.k, 1),
          dim(b.q, 1), dim(b.k, 2),  dim(b.v, 2), 1,           dim(b.k, 2)};
  if (s.num_heads < 1 || s.key_dim < 1 || s.value_dim < 1) {
    return invalid("v " + shape_text(b.v) + " and k " + shape_text(b.k) +
                   "; expected nothing but the batch to be empty");
  }
  if (options.taylor) {
    if (s.given_dim > state_step::kMaxTaylorDim) {
      return unsupported("features of " + std::to_string(s.given_dim) +
                         " values; the kernels take up to " +
                         std::to_string(state_step::kMaxTaylorDim));
    }
    s.key_dim = state_step::taylor_features(s.given_dim);
  }
  if (s.query_heads > s.num_heads && s.query_heads % s.num_heads == 0) {
    s.queries = s.query_heads / s.num_heads;
  } else if (Status status = check_divides("q", s.query_heads, s.num_heads); !status.ok()) {
    return status.error();
  }
  const std::int64_t out_heads = s.num_heads * s.queries;
  const std::int64_t rows = options.values_last ? s.key_dim : s.value_dim;
  const std::int64_t columns = options.values_last ? s.value_dim : s.key_dim;
  if (Status status = first_error(
          {check_divides("k", s.key_heads, s.num_heads),
           check_dims("q", b.q, {s.batch, s.query_heads, s.given_dim}),
           check_dtype("q", b.q, b.k.element_type()),
           check_dims("k", b.k, {s.batch, s.key_heads, s.given_dim}),
           check_gate("decays", b.decays, {s.batch, s.num_heads}),
           check_gate("weights", b.weights, {s.batch, s.num_heads}),
           check_gate("skip", b.skip, {s.batch, s.num_heads, s.value_dim}),
           check_floats("state", b.state, {s.batch, s.num_heads, rows, columns}),
           check_floats("next_state", b.next_state, {s.batch, s.num_heads, rows, columns}),
           check_dims("out", b.out, {s.batch, out_heads, s.value_dim}),
           check_dtype("out", b.out, b.v.element_type())});
      !status.ok()) {
    return status.error();
  }
  if (options.normalize) {
    if (Status status = first_error(
            {check_floats("normalizer", b.normalizer, {s.batch, s.num_heads, s.key_dim}),
             check_floats("next_normalizer", b.next_normalizer,
                          {s.batch, s.num_heads, s.key_dim})});
        !status.ok()) {
      return status.error();
    }
  }
  if (is_given(b.numerators) != is_given(b.divisors) ||
      (is_given(b.divisors) && !options.normalize)) {
    return invalid("numerators and divisors are given together, where out is divided");
  }
  if (is_given(b.numerators)) {
    if (Status status = first_error(
            {check_floats("numerators", b.numerators, {s.batch, out_heads, s.value_dim}),
             check_floats("divisors", b.divisors, {s.batch, out_heads})});
        !status.ok()) {
      return status.error();
    }
  }
  if (options.values_last && (is_given(b.weights) || is_given(b.skip))) {
    return invalid("weights and skip are those of states with values in rows");
  }
  if (options.taylor && is_given(b.decays)) {
    return invalid("decays are those of states whose features are given");
  }
  if (s.key_dim > kMaxInt - state_step::kRows || s.value_dim > kMaxInt - state_step::kRows ||
      int_product({s.batch, s.num_heads, ceil_div(s.value_dim, 16)}) < 0) {
    return unsupported("more than 2^31 - 1 blocks: v " + shape_text(b.v));
  }
  return s;
}

StateStepKernel kernel_of(const Sizes& s, const StateStepOptions& options,
                          const StateStepConfig& config) {
  const std::int64_t columns = options.values_last ? s.value_dim : s.key_dim;
  return {s.key_dtype,       s.value_dtype,  options.values_last, columns % 4 == 0,
          options.normalize, config.columns, s.queries,           options.taylor};
}

Status initialize(const Device& device, const Buffers& buffers, const StateStepOptions& options,
                  const StateStepConfig& config) {
  const auto sizes = read(buffers, options);
  if (!sizes.ok()) return sizes.error();
  return load(kernels, kernel_of(*sizes, options, config), device);
}

float* floats(const AnyBuffer& buffer) { return static_cast<float*>(buffer.untyped_data()); }

// Strides of 0 along axes of size 1.
state_step::Gate gate(const AnyBuffer& buffer) {
  if (!is_given(buffer)) return {};
  state_step::Gate gate = {floats(buffer), 0, 0, 0};
  long* strides[] = {&gate.batch_stride, &gate.head_stride, &gate.value_stride};
  long size = 1;
  for (std::size_t i = buffer.dimensions().size(); i-- > 0;) {
    *strides[i] = dim(buffer, i) == 1 ? 0 : size;
    size *= dim(buffer, i);
  }
  return gate;
}

Status execute(const Execution& on, const Buffers& b, const StateStepOptions& options,
               const StateStepConfig& config) {
  const auto sizes = read(b, options);
  if (!sizes.ok()) return sizes.error();
  const Sizes& s = *sizes;
  if (s.empty()) return {};
  if (Status status = first_error(
          {check_in_place("next_state", b.next_state, "state", b.state),
           check_in_place("next_normalizer", b.next_normalizer, "normalizer", b.normalizer)});
      !status.ok()) {
    return status;
  }
  const auto kernel = find_loaded(kernels, kernel_of(s, options, config), on.device);
  if (!kernel.ok()) return kernel.error();
  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"decays", b.decays, false},
                  {"weights", b.weights, false},
                  {"skip", b.skip, false},
                  {"numerators", b.numerators, false},
                  {"divisors", b.divisors, false},
                  {"state", b.state, false},
                  {"normalizer", b.normalizer, false},
                  {"out", b.out, true},
                  {"next_state", b.next_state, true},
                  {"next_normalizer", b.next_normalizer, true}});
  state_step::StepParams params = {};
  params.q = b.q.untyped_data();
  params.k = b.k.untyped_data();
  params.v = b.v.untyped_data();
  params.decays = gate(b.decays);
  params.weights = gate(b.weights);
  params.skip = gate(b.skip);
  params.state = floats(b.state);
  if (options.normalize) {
    params.normalizer = floats(b.normalizer);
  }
  if (is_given(b.numerators)) {
    params.numerators = floats(b.numerators);
    params.divisors = floats(b.divisors);
  }
  params.out = b.out.untyped_data();
  params.num_heads = static_cast<int>(s.num_heads);
  params.key_heads = static_cast<int>(s.key_heads);
  params.query_heads = static_cast<int>(s.query_heads);
  params.key_dim = static_cast<int>(s.key_dim);
  params.value_dim = static_cast<int>(s.value_dim);
  const std::int64_t of_part = !options.values_last ? state_step::kRows
                               : options.normalize  ? s.value_dim
                                                    : config.columns;
  params.columns_of_part = static_cast<int>(of_part);
  params.parts = static_cast<int>(ceil_div(s.value_dim, of_part));
  params.taylor_dim = static_cast<int>(s.given_dim);
  params.taylor_scale = options.scale;
  params.scale = options.taylor ? 1.0f : options.scale;
  return runtime::launch(**kernel, on.stream, {s.batch * s.num_heads * params.parts, 1, 1},
                         &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error call(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer decays,
                 AnyBuffer weights, AnyBuffer skip, AnyBuffer numerators, AnyBuffer divisors,
                 AnyBuffer state, AnyBuffer normalizer, Ret out, Ret next_state,
                 Ret next_normalizer, StateStepOptions options, StateStepConfig config) {
  const Buffers buffers = {
      q,     k,          v,    decays,      weights,         skip, numerators, divisors,
      state, normalizer, *out, *next_state, *next_normalizer};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return initialize(device, buffers, options, config); },
      [&](const Execution& on) { return execute(on, buffers, options, config); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // decays, or of size 0
      .template Arg<AnyBuffer>()  // weights, or of size 0
      .template Arg<AnyBuffer>()  // skip, or of size 0
      .template Arg<AnyBuffer>()  // numerators, or of size 0
      .template Arg<AnyBuffer>()  // divisors, or of size 0
      .template Arg<AnyBuffer>()  // state
      .template Arg<AnyBuffer>()  // normalizer
      .template Ret<AnyBuffer>()  // out
      .template Ret<AnyBuffer>()  // next_state
      .template Ret<AnyBuffer>()  // next_normalizer
      .template Attr<StateStepOptions>("options")
      .template Attr<StateStepConfig>("config");
}

}  // namespace

TK_DEFINE_TARGET(kStateStepTarget, kName, call, bind);

}  // namespace tk::ffi
