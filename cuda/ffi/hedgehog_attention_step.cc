// The target tk_hedgehog_attention_step_v1: one token and the latest two windows.
#include "ffi/handlers.h"
#include "ffi/hedgehog_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_hedgehog_attention_step_v1";

using hedgehog_attention::kChunk;
using hedgehog_attention::kFeatures;
using hedgehog_attention::kMap;

struct Buffers {
  AnyBuffer query, token_key, token_value, keys, values, q_map, k_map, alpha, beta, length;
  AnyBuffer features, key_features, value, decays, numerators, divisors, next_keys, next_values;
};

Result<HedgehogSizes> read(const Buffers& b) {
  if (Status status = check_rank("query", b.query, 3); !status.ok()) return status.error();
  const auto sizes = read_hedgehog_sizes(b.keys, b.values, dim(b.query, 1));
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  const auto check_tokens = [&](const char* name, const AnyBuffer& buffer, std::int64_t heads,
                                std::int64_t size) {
    return check_like(name, buffer, b.keys, {s.batch, heads, size});
  };
  const auto check_heads = [&](const char* name, const AnyBuffer& buffer) {
    return check_floats(name, buffer, {s.num_heads});
  };
  if (Status status = first_error(
          {check_dims("keys", b.keys, {s.batch, 2 * kChunk, s.num_kv_heads, s.key_dim}),
           check_like("next_keys", b.next_keys, b.keys,
                      {s.batch, 2 * kChunk, s.num_kv_heads, s.key_dim}),
           check_like("next_values", b.next_values, b.keys,
                      {s.batch, 2 * kChunk, s.num_kv_heads, s.value_dim}),
           check_tokens("query", b.query, s.num_heads, s.key_dim),
           check_tokens("token_key", b.token_key, s.num_kv_heads, s.key_dim),
           check_tokens("token_value", b.token_value, s.num_kv_heads, s.value_dim),
           check_like("q_map", b.q_map, b.keys, {s.num_heads, s.key_dim, kMap}),
           check_like("k_map", b.k_map, b.keys, {s.num_kv_heads, s.key_dim, kMap}),
           check_heads("alpha", b.alpha), check_heads("beta", b.beta),
           check_dims("length", b.length, {s.batch}),
           check_dtype("length", b.length, xffi::DataType::S32),
           check_floats("features", b.features, {s.batch, s.num_heads, kFeatures}),
           check_floats("key_features", b.key_features, {s.batch, s.num_kv_heads, kFeatures}),
           check_tokens("value", b.value, s.num_kv_heads, s.value_dim),
           check_floats("decays", b.decays, {s.batch, s.num_kv_heads}),
           check_floats("numerators", b.numerators, {s.batch, s.num_heads, s.value_dim}),
           check_floats("divisors", b.divisors, {s.batch, s.num_heads})});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize(const Device& device, const Buffers& buffers) {
  const auto sizes = read(buffers);
  return sizes.ok() ? load_hedgehog(device, sizes->kernel(HedgehogKernel::Kind::kStep))
                    : sizes.error();
}

Status execute(const Execution& on, const Buffers& b, const HedgehogStepOptions& options) {
  const auto sizes = read(b);
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  if (s.empty()) return {};
  if (Status status =
          first_error({check_in_place("next_keys", b.next_keys, "keys", b.keys),
                       check_in_place("next_values", b.next_values, "values", b.values)});
      !status.ok()) {
    return status;
  }
  const auto kernel = find_hedgehog(on.device, s.kernel(HedgehogKernel::Kind::kStep));
  if (!kernel.ok()) return kernel.error();
  declare_arrays({{"query", b.query, false},
                  {"token_key", b.token_key, false},
                  {"token_value", b.token_value, false},
                  {"keys", b.keys, false},
                  {"values", b.values, false},
                  {"q_map", b.q_map, false},
                  {"k_map", b.k_map, false},
                  {"alpha", b.alpha, false},
                  {"beta", b.beta, false},
                  {"length", b.length, false},
                  {"features", b.features, true},
                  {"key_features", b.key_features, true},
                  {"value", b.value, true},
                  {"decays", b.decays, true},
                  {"numerators", b.numerators, true},
                  {"divisors", b.divisors, true},
                  {"next_keys", b.next_keys, true},
                  {"next_values", b.next_values, true}});
  hedgehog_attention::StepParams params = {};
  if (Status status = first_error({encode_tokens(&params.keys, b.keys, s),
                                   encode_tokens(&params.values, b.values, s),
                                   encode_head_maps(&params.q_map, b.q_map, s),
                                   encode_head_maps(&params.k_map, b.k_map, s)});
      !status.ok()) {
    return status;
  }
  params.old_keys = b.keys.untyped_data();
  params.old_values = b.values.untyped_data();
  params.query = b.query.untyped_data();
  params.token_key = b.token_key.untyped_data();
  params.token_value = b.token_value.untyped_data();
  params.alpha = floats(b.alpha);
  params.beta = floats(b.beta);
  params.length = static_cast<const int*>(b.length.untyped_data());
  params.features = floats(b.features);
  params.key_features = floats(b.key_features);
  params.value = b.value.untyped_data();
  params.decays = floats(b.decays);
  params.numerators = floats(b.numerators);
  params.divisors = floats(b.divisors);
  params.num_heads = static_cast<int>(s.num_heads);
  params.num_kv_heads = static_cast<int>(s.num_kv_heads);
  params.key_dim = static_cast<int>(s.key_dim);
  params.value_dim = static_cast<int>(s.value_dim);
  params.scale = options.scale;
  return runtime::launch(**kernel, on.stream, {s.num_kv_heads, 1, s.batch}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error call(Stage stage, AnyBuffer query, AnyBuffer token_key, AnyBuffer token_value,
                 AnyBuffer keys, AnyBuffer values, AnyBuffer q_map, AnyBuffer k_map,
                 AnyBuffer alpha, AnyBuffer beta, AnyBuffer length, Ret features, Ret key_features,
                 Ret value, Ret decays, Ret numerators, Ret divisors, Ret next_keys,
                 Ret next_values, HedgehogStepOptions options) {
  const Buffers buffers = {query,  token_key, token_value, keys,      values,     q_map,
                           k_map,  alpha,     beta,        length,    *features,  *key_features,
                           *value, *decays,   *numerators, *divisors, *next_keys, *next_values};
  return run_stage(
      kName, stage, [&](const Device& device) { return initialize(device, buffers); },
      [&](const Execution& on) { return execute(on, buffers, options); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // query
      .template Arg<AnyBuffer>()  // token_key
      .template Arg<AnyBuffer>()  // token_value
      .template Arg<AnyBuffer>()  // keys
      .template Arg<AnyBuffer>()  // values
      .template Arg<AnyBuffer>()  // q_map
      .template Arg<AnyBuffer>()  // k_map
      .template Arg<AnyBuffer>()  // alpha
      .template Arg<AnyBuffer>()  // beta
      .template Arg<AnyBuffer>()  // length
      .template Ret<AnyBuffer>()  // features
      .template Ret<AnyBuffer>()  // key_features
      .template Ret<AnyBuffer>()  // value
      .template Ret<AnyBuffer>()  // decays
      .template Ret<AnyBuffer>()  // numerators
      .template Ret<AnyBuffer>()  // divisors
      .template Ret<AnyBuffer>()  // next_keys
      .template Ret<AnyBuffer>()  // next_values
      .template Attr<HedgehogStepOptions>("options");
}

}  // namespace

TK_DEFINE_TARGET(kHedgehogStepTarget, kName, call, bind);

}  // namespace tk::ffi
