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
  AnyBuffer query, features, token_key, token_value, keys, values, k_map, beta, sums, divisors,
      length;
  AnyBuffer out, next_keys, next_values;
};

Result<HedgehogSizes> read(const Buffers& b) {
  if (Status status = check_rank("query", b.query, 3); !status.ok()) return status.error();
  const auto sizes = read_hedgehog_sizes(b.keys, b.values, dim(b.query, 1));
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  const std::int64_t key_tile = hedgehog_attention::tile_dim(s.key_dim);
  if (Status status = first_error(
          {check_dims("keys", b.keys, {s.batch, 2 * kChunk, s.num_kv_heads, s.key_dim}),
           check_like("next_keys", b.next_keys, b.keys,
                      {s.batch, 2 * kChunk, s.num_kv_heads, s.key_dim}),
           check_like("next_values", b.next_values, b.keys,
                      {s.batch, 2 * kChunk, s.num_kv_heads, s.value_dim}),
           check_floats("query", b.query, {s.batch, s.num_heads, key_tile}),
           check_floats("features", b.features, {s.batch, s.num_heads, kFeatures}),
           check_floats("token_key", b.token_key, {s.batch, s.num_kv_heads, key_tile}),
           check_floats("token_value", b.token_value, {s.batch, s.num_kv_heads, s.padded_values()}),
           check_like("k_map", b.k_map, b.keys, {s.num_kv_heads, s.key_dim, kMap}),
           check_floats("beta", b.beta, {s.num_heads}),
           check_floats("sums", b.sums, {s.batch, s.num_heads, s.value_dim}),
           check_floats("divisors", b.divisors, {s.batch, s.num_heads}),
           check_dims("length", b.length, {s.batch}),
           check_dtype("length", b.length, xffi::DataType::S32),
           check_like("out", b.out, b.keys, {s.batch, s.num_heads, s.value_dim})});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize(int device, const Buffers& buffers) {
  const auto sizes = read(buffers);
  return sizes.ok() ? load_hedgehog(device, sizes->kernel(HedgehogKernel::Kind::kStep))
                    : sizes.error();
}

Status check_in_place(const char* name, const AnyBuffer& next, const char* of,
                      const AnyBuffer& buffer) {
  if (next.untyped_data() == buffer.untyped_data()) return {};
  return invalid(std::string(name) + " is not where " + of + " is; expected one aliased with it");
}

Status execute(int device_ordinal, runtime::cuda::Stream stream, const Buffers& b) {
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
  const auto device = runtime::open_device(device_ordinal);
  if (!device.ok()) return device.error();
  const auto kernel = find_hedgehog(**device, s.kernel(HedgehogKernel::Kind::kStep));
  if (!kernel.ok()) return kernel.error();
  const runtime::ScopedContext context(**device);
  declare_arrays({{"query", b.query, false},
                  {"features", b.features, false},
                  {"token_key", b.token_key, false},
                  {"token_value", b.token_value, false},
                  {"keys", b.keys, false},
                  {"values", b.values, false},
                  {"k_map", b.k_map, false},
                  {"beta", b.beta, false},
                  {"sums", b.sums, false},
                  {"divisors", b.divisors, false},
                  {"length", b.length, false},
                  {"out", b.out, true},
                  {"next_keys", b.next_keys, true},
                  {"next_values", b.next_values, true}});
  hedgehog_attention::StepParams params = {};
  if (Status status = first_error({encode_tokens(&params.keys, b.keys, s),
                                   encode_tokens(&params.values, b.values, s),
                                   encode_head_maps(&params.k_map, b.k_map, s)});
      !status.ok()) {
    return status;
  }
  params.query = floats(b.query);
  params.features = floats(b.features);
  params.token_key = floats(b.token_key);
  params.token_value = floats(b.token_value);
  params.beta = floats(b.beta);
  params.sums = floats(b.sums);
  params.divisors = floats(b.divisors);
  params.length = static_cast<const int*>(b.length.untyped_data());
  params.out = b.out.untyped_data();
  params.num_heads = static_cast<int>(s.num_heads);
  params.num_kv_heads = static_cast<int>(s.num_kv_heads);
  params.value_dim = static_cast<int>(s.value_dim);
  return runtime::launch(**kernel, stream, {s.num_kv_heads, 1, s.batch}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error ffi_initialize(std::int32_t device, AnyBuffer query, AnyBuffer features,
                           AnyBuffer token_key, AnyBuffer token_value, AnyBuffer keys,
                           AnyBuffer values, AnyBuffer k_map, AnyBuffer beta, AnyBuffer sums,
                           AnyBuffer divisors, AnyBuffer length, Ret out, Ret next_keys,
                           Ret next_values) {
  return to_ffi(
      kName, initialize(device, {query, features, token_key, token_value, keys, values, k_map, beta,
                                 sums, divisors, length, *out, *next_keys, *next_values}));
}

xffi::Error ffi_execute(std::int32_t device, runtime::cuda::Stream stream, AnyBuffer query,
                        AnyBuffer features, AnyBuffer token_key, AnyBuffer token_value,
                        AnyBuffer keys, AnyBuffer values, AnyBuffer k_map, AnyBuffer beta,
                        AnyBuffer sums, AnyBuffer divisors, AnyBuffer length, Ret out,
                        Ret next_keys, Ret next_values) {
  return to_ffi(kName, explore([&] {
                  return execute(device, stream,
                                 {query, features, token_key, token_value, keys, values, k_map,
                                  beta, sums, divisors, length, *out, *next_keys, *next_values});
                }));
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()   // query
      .template Arg<AnyBuffer>()   // features
      .template Arg<AnyBuffer>()   // token_key
      .template Arg<AnyBuffer>()   // token_value
      .template Arg<AnyBuffer>()   // keys
      .template Arg<AnyBuffer>()   // values
      .template Arg<AnyBuffer>()   // k_map
      .template Arg<AnyBuffer>()   // beta
      .template Arg<AnyBuffer>()   // sums
      .template Arg<AnyBuffer>()   // divisors
      .template Arg<AnyBuffer>()   // length
      .template Ret<AnyBuffer>()   // out
      .template Ret<AnyBuffer>()   // next_keys
      .template Ret<AnyBuffer>();  // next_values
}

XLA_FFI_DEFINE_HANDLER(
    kInitialize, ffi_initialize,
    bind(xffi::Ffi::Bind<xffi::ExecutionStage::kInitialize>().Ctx<DeviceContext>()));
XLA_FFI_DEFINE_HANDLER(kExecute, ffi_execute,
                       bind(xffi::Ffi::Bind().Ctx<DeviceContext>().Ctx<StreamContext>()),
                       {xffi::Traits::kCmdBufferCompatible});

}  // namespace

const Target kHedgehogStepTarget = {kName, kInitialize, kExecute};

}  // namespace tk::ffi
