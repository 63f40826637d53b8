// The Python module tk_jax._extension.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "ffi/attention_kernels.h"
#include "ffi/based_attention_kernels.h"
#include "ffi/handlers.h"
#include "ffi/hedgehog_attention_kernels.h"
#include "ffi/host_headers.h"
#include "ffi/kernel_settings.h"
#include "ffi/linear_attention_kernels.h"
#include "ffi/matmul_kernels.h"
#include "ffi/spec_dict.h"
#include "ffi/state_step_kernels.h"
#include "runtime/compile.h"
#include "runtime/driver.h"
#include "runtime/kernel_cache.h"
#include "runtime/nvrtc.h"
#include "runtime/settings.h"
#include "runtime/sha256.h"

namespace nb = nanobind;

namespace tk::ffi {
namespace {

[[noreturn]] void raise(const Error& error) {
  if (error.kind == ErrorKind::kInvalidArgument) throw nb::value_error(error.message.c_str());
  if (error.kind == ErrorKind::kUnsupported) {
    PyErr_SetString(PyExc_NotImplementedError, error.message.c_str());
    throw nb::python_error();
  }
  throw std::runtime_error(error.message);
}

nb::dict registrations() {
  nb::dict targets;
  for (const Target* target : kTargets) {
    nb::dict stages;
    stages["initialize"] = nb::capsule(reinterpret_cast<void*>(target->initialize));
    stages["execute"] = nb::capsule(reinterpret_cast<void*>(target->execute));
    targets[target->name] = stages;
  }
  return targets;
}

nb::dict struct_fields() {
  nb::dict fields;
  fields["AttentionOptions"] = nb::cast(SettingsFields<attention::Options>::names());
  fields["AttentionForwardConfig"] = nb::cast(SettingsFields<attention::ForwardConfig>::names());
  fields["AttentionBackwardConfig"] = nb::cast(SettingsFields<attention::BackwardConfig>::names());
  fields["MatmulOptions"] = nb::cast(SettingsFields<matmul::Options>::names());
  fields["MatmulConfig"] = nb::cast(SettingsFields<matmul::Config>::names());
  fields["ChunkSumsOptions"] = nb::cast(SettingsFields<ChunkSumsOptions>::names());
  fields["StepOptions"] = nb::cast(SettingsFields<StepOptions>::names());
  fields["StatesOptions"] = nb::cast(SettingsFields<StatesOptions>::names());
  fields["OutputsOptions"] = nb::cast(SettingsFields<OutputsOptions>::names());
  fields["SpreadOptions"] = nb::cast(SettingsFields<SpreadOptions>::names());
  fields["GradientsOptions"] = nb::cast(SettingsFields<GradientsOptions>::names());
  fields["GradientsConfig"] = nb::cast(SettingsFields<GradientsConfig>::names());
  fields["WalkConfig"] = nb::cast(SettingsFields<linear_attention::WalkConfig>::names());
  fields["BasedStatesOptions"] = nb::cast(SettingsFields<BasedStatesOptions>::names());
  fields["BasedOutputsOptions"] = nb::cast(SettingsFields<BasedOutputsOptions>::names());
  fields["BasedConfig"] = nb::cast(SettingsFields<BasedConfig>::names());
  fields["HedgehogSumsOptions"] = nb::cast(SettingsFields<HedgehogSumsOptions>::names());
  fields["HedgehogOutputsOptions"] = nb::cast(SettingsFields<HedgehogOutputsOptions>::names());
  fields["HedgehogGradientsOptions"] = nb::cast(SettingsFields<HedgehogGradientsOptions>::names());
  fields["HedgehogStepOptions"] = nb::cast(SettingsFields<HedgehogStepOptions>::names());
  fields["HedgehogDocumentStatesOptions"] =
      nb::cast(SettingsFields<HedgehogDocumentStatesOptions>::names());
  fields["StateStepOptions"] = nb::cast(SettingsFields<StateStepOptions>::names());
  fields["StateStepConfig"] = nb::cast(SettingsFields<StateStepConfig>::names());
  fields["KernelSettings"] = nb::cast(SettingsFields<KernelSettings>::names());
  return fields;
}

// -- Specialisations as dicts ---------------------------------------------------------------------

nb::dict to_dict(const Result<KernelSpec>& result) {
  if (!result.ok()) raise(result.error());
  return spec_to_dict(*result);
}

template <typename T>
T get(const nb::dict& dict, const char* name, T otherwise) {
  return dict.contains(name) ? nb::cast<T>(dict[name]) : otherwise;
}

KernelSpec to_spec(const nb::dict& dict) {
  KernelSpec spec;
  spec.symbol = nb::cast<std::string>(dict["symbol"]);
  spec.header = get<std::string>(dict, "header", "");
  spec.source = get<std::string>(dict, "source", "");
  spec.function = nb::cast<std::string>(dict["function"]);
  spec.params_type = get<std::string>(dict, "params_type", "tk::KernelParams");
  spec.threads = nb::cast<int>(dict["threads"]);
  spec.shared_bytes = get<int>(dict, "shared_bytes", 0);
  spec.cluster_size = get<int>(dict, "cluster_size", 1);
  spec.min_blocks = get<int>(dict, "min_blocks", 1);
  return spec;
}

runtime::DataType to_dtype(const std::string& name) {
  if (name == "bfloat16") return runtime::DataType::kBFloat16;
  if (name == "float16") return runtime::DataType::kFloat16;
  throw nb::value_error(("dtype " + name + "; expected bfloat16 or float16").c_str());
}

attention::Mask to_mask(const std::string& name) {
  if (name == "none") return attention::Mask::kNone;
  if (name == "causal") return attention::Mask::kCausal;
  if (name == "band") return attention::Mask::kBand;
  throw nb::value_error(("mask " + name + "; expected none, causal or band").c_str());
}

unsigned to_features(const std::vector<std::string>& names,
                     unsigned (*bit_of)(std::string_view) = feature_of) {
  unsigned features = 0;
  for (const std::string& name : names) {
    const unsigned bit = bit_of(name);
    if (bit == 0) throw nb::value_error(("no feature is called " + name).c_str());
    features |= bit;
  }
  return features;
}

long field(const nb::dict& config, const char* name) { return nb::cast<long>(config[name]); }

nb::list attention_forward_specs(const std::string& dtype, long head_dim, long head_dim_v,
                                 const std::string& mask, const std::vector<std::string>& features,
                                 const nb::dict& config) {
  const AttentionForwardKernel kernel{
      to_dtype(dtype),
      attention::tile_head_dim(head_dim),
      attention::tile_head_dim(head_dim_v),
      to_mask(mask),
      to_features(features),
      {field(config, "block_q"), field(config, "block_kv"), field(config, "stages")}};
  nb::list specs;
  specs.append(to_dict(kernel.spec()));
  return specs;
}

nb::list attention_backward_specs(const std::string& dtype, long head_dim, long head_dim_v,
                                  const std::string& mask, const std::vector<std::string>& features,
                                  bool deterministic, const nb::dict& config) {
  const AttentionBackwardKernels kernels{
      to_dtype(dtype),
      attention::tile_head_dim(head_dim),
      attention::tile_head_dim(head_dim_v),
      to_mask(mask),
      to_features(features),
      deterministic,
      {field(config, "block_q"), field(config, "block_kv"), field(config, "stages"),
       field(config, "dq_block_kv"), field(config, "dq_stages")}};
  nb::list specs;
  specs.append(to_dict(kernels.prepare_spec()));
  specs.append(to_dict(kernels.main_spec()));
  specs.append(to_dict(kernels.last_spec()));
  return specs;
}

nb::list attention_bias_specs(const std::string& dtype, long head_dim, long head_dim_v,
                              const std::string& mask, const std::vector<std::string>& features) {
  const AttentionBiasKernel kernel{to_dtype(dtype), attention::tile_head_dim(head_dim),
                                   attention::tile_head_dim(head_dim_v), to_mask(mask),
                                   to_features(features)};
  nb::list specs;
  specs.append(to_dict(kernel.spec()));
  return specs;
}

// Of the kernels named by `kernel`: those of gates are the same for all settings, those between
// segments for all of a dtype.
nb::list linear_attention_specs(const std::string& kernel, const std::string& dtype, long key_dim,
                                const std::vector<std::string>& features, const nb::dict& config) {
  using Walk = LinearAttentionWalkKernel::Walk;
  const long tile = linear_attention::tile_dim(key_dim);
  nb::list specs;
  using Gate = LinearAttentionGateKernel::Name;
  for (const auto& [name, gate, takes_steps] :
       {std::tuple{"chunk_sums", Gate::kChunkSums, false},
        std::tuple{"gate_gradients", Gate::kGateGradients, false},
        std::tuple{"head_sums", Gate::kHeadSums, false},
        std::tuple{"step_gates", Gate::kStepGates, true},
        std::tuple{"step_gradients", Gate::kStepGradients, true}}) {
    if (kernel != name) continue;
    specs.append(to_dict(LinearAttentionGateKernel{gate}.spec()));
    // Raw steps may be float32 or of the inputs' dtype.
    if (takes_steps) specs.append(to_dict(LinearAttentionGateKernel{gate, to_dtype(dtype)}.spec()));
    return specs;
  }
  using Segment = LinearAttentionSegmentKernel::Name;
  const auto spec = [&]() -> Result<KernelSpec> {
    if (kernel == "segment_starts") return LinearAttentionSegmentKernel{Segment::kStarts}.spec();
    for (const auto& [name, spread] : {std::pair{"spread_states", Segment::kSpreadStates},
                                       std::pair{"spread_out", Segment::kSpreadOut}}) {
      if (kernel == name) return LinearAttentionSegmentKernel{spread, to_dtype(dtype)}.spec();
    }
    const unsigned bits = to_features(features, linear_attention_feature_of);
    if (kernel == "gradients") {
      return LinearAttentionGradientsKernel{
          to_dtype(dtype), tile, bits, {field(config, "stages"), field(config, "key_stages")}}
          .spec();
    }
    const auto walk = [&] {
      if (kernel == "states") return Walk::kStates;
      if (kernel == "reverse_states") return Walk::kReverseStates;
      if (kernel == "segment_sums") return Walk::kSegmentSums;
      if (kernel == "reverse_segment_sums") return Walk::kReverseSegmentSums;
      if (kernel == "outputs") return Walk::kOutputs;
      throw nb::value_error(("no kernel is called " + kernel).c_str());
    }();
    return LinearAttentionWalkKernel{
        walk,
        to_dtype(dtype),
        tile,
        bits,
        {field(config, "consumers"), field(config, "stages"), field(config, "helpers")}}
        .spec();
  }();
  specs.append(to_dict(spec));
  return specs;
}

// Of the kernels named by `kernel`.
nb::list hedgehog_attention_specs(const std::string& kernel, const std::string& dtype, long key_dim,
                                  long value_dim, bool documents) {
  using Kind = HedgehogKernel::Kind;
  const auto kind = [&] {
    if (kernel == "sums") return Kind::kSums;
    if (kernel == "outputs") return Kind::kOutputs;
    if (kernel == "queries") return Kind::kQueries;
    if (kernel == "keys") return Kind::kKeys;
    if (kernel == "document_states") return Kind::kDocumentStates;
    if (kernel == "reverse_document_states") return Kind::kReverseDocumentStates;
    if (kernel == "step") return Kind::kStep;
    throw nb::value_error(("no kernel is called " + kernel).c_str());
  }();
  nb::list specs;
  specs.append(to_dict(HedgehogKernel{kind, to_dtype(dtype), hedgehog_attention::tile_dim(key_dim),
                                      hedgehog_attention::tile_dim(value_dim), documents}
                           .spec()));
  return specs;
}

nb::list based_attention_specs(const std::string& kernel, const std::string& dtype, long dim,
                               bool documents, bool normalize, const nb::dict& config) {
  using Name = BasedAttentionKernel::Name;
  const auto name = [&] {
    if (kernel == "states") return Name::kStates;
    if (kernel == "outputs") return Name::kOutputs;
    if (kernel == "walked_gradients") return Name::kWalkedGradients;
    if (kernel == "chunk_outputs") return Name::kChunkOutputs;
    if (kernel == "gradients") return Name::kGradients;
    throw nb::value_error(("no kernel is called " + kernel).c_str());
  }();
  nb::list specs;
  BasedAttentionKernel chosen = {
      name,
      to_dtype(dtype),
      dim,
      documents,
      {field(config, "stages")},
      normalize && (name == Name::kOutputs || name == Name::kWalkedGradients)};
  specs.append(to_dict(chosen.spec()));
  if (name == Name::kWalkedGradients) {
    chosen.reverse = true;
    specs.append(to_dict(chosen.spec()));
  }
  return specs;
}

nb::list matmul_specs(const std::string& dtype, bool transpose_a, bool transpose_b,
                      const nb::dict& config) {
  const MatmulKernel kernel{
      to_dtype(dtype),
      {transpose_a, transpose_b},
      {field(config, "block_m"), field(config, "block_n"), field(config, "block_k"),
       field(config, "stages"), field(config, "cluster_m"), field(config, "group_m")}};
  nb::list specs;
  specs.append(to_dict(kernel.spec()));
  return specs;
}

// Of states [K, V] with `values_last`, of [V, K] without; `whole` rows of them are runs of four.
nb::list state_step_specs(const std::string& key_dtype, const std::string& value_dtype,
                          bool values_last, bool whole, bool normalize, long queries, bool taylor,
                          const nb::dict& config) {
  const auto type = [](const std::string& name) {
    return name == "float32" ? runtime::DataType::kFloat32 : to_dtype(name);
  };
  nb::list specs;
  specs.append(to_dict(StateStepKernel{type(key_dtype), type(value_dtype), values_last, whole,
                                       normalize, field(config, "columns"), queries, taylor}
                           .spec()));
  return specs;
}

// -- Tools ----------------------------------------------------------------------------------------

nb::dict compile_kernel(const nb::dict& spec_dict, bool use_cache,
                        const std::optional<std::string>& ship_to) {
  const KernelSpec spec = to_spec(spec_dict);
  const auto lookup = use_cache ? runtime::Lookup::kAllowed : runtime::Lookup::kSkipped;
  auto compiled = [&] {
    nb::gil_scoped_release release;
    return ship_to ? runtime::ship(spec, *ship_to, lookup) : runtime::compile(spec, lookup);
  }();
  if (!compiled.ok()) raise(compiled.error());
  static constexpr const char* kOrigins[] = {"shipped", "cache", "compiled"};
  nb::dict out;
  out["cubin"] = nb::bytes(compiled->cubin.data(), compiled->cubin.size());
  out["log"] = compiled->log;
  out["seconds"] = compiled->seconds;
  out["origin"] = kOrigins[static_cast<int>(compiled->origin)];
  return out;
}

nb::dict kernel_keys(const nb::dict& spec) {
  const auto keys = runtime::kernel_keys(to_spec(spec));
  if (!keys.ok()) raise(keys.error());
  nb::dict out;
  out["shipped"] = keys->shipped;
  out["cache"] = keys->cache;
  return out;
}

nb::dict driver_info() {
  nb::dict out;
  out["version"] = nb::none();
  out["devices"] = nb::list();
  out["error"] = nb::none();
  const auto version = runtime::driver_version();
  if (!version.ok()) {
    out["error"] = version.error().message;
    return out;
  }
  out["version"] = *version;
  const auto devices = runtime::list_devices();
  if (!devices.ok()) {
    out["error"] = devices.error().message;
    return out;
  }
  nb::list list;
  for (const runtime::Device& device : *devices) {
    nb::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = nb::make_tuple(device.capability_major, device.capability_minor);
    entry["multiprocessors"] = device.multiprocessors;
    const Status supported = runtime::check_supported(device);
    entry["problem"] = supported.ok() ? nb::none() : nb::cast(supported.error().message);
    list.append(entry);
  }
  out["devices"] = list;
  return out;
}

nb::dict nvrtc_info() {
  nb::dict out;
  const auto version = runtime::nvrtc_version();
  if (!version.ok()) {
    out["version"] = nb::none();
    out["path"] = nb::none();
    out["error"] = version.error().message;
    return out;
  }
  out["version"] = nb::make_tuple(version->major, version->minor);
  out["path"] = version->path;
  out["error"] = nb::none();
  return out;
}

nb::dict cache_info() {
  const runtime::CacheInfo info = runtime::cache_info();
  nb::dict out;
  out["path"] = info.path;
  out["usable"] = info.usable;
  out["problem"] = info.problem;
  return out;
}

}  // namespace

NB_MODULE(_extension, module) {
  using namespace nb::literals;
  module.doc() = "FFI targets of tk_jax, and the runtime behind them.";
  runtime::set_host_headers(kHostHeaders);
  module.def("registrations", &registrations, "{target: {stage: capsule}}");
  module.def("ffi_api_version",
             [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  module.def("struct_fields", &struct_fields, "{settings class: names of its fields, in order}");

  module.def("set_source_root", &runtime::set_source_root, "path"_a);
  module.def("set_shipped_dirs", &runtime::set_shipped_dirs, "folders"_a);
  module.def("set_nvrtc_paths", &runtime::set_nvrtc_paths, "folders"_a);
  module.def("set_cache_dir", &runtime::set_cache_dir, "path"_a.none());

  module.def("attention_forward_specs", &attention_forward_specs, nb::kw_only(), "dtype"_a,
             "head_dim"_a, "head_dim_v"_a, "mask"_a, "features"_a, "config"_a);
  module.def("attention_backward_specs", &attention_backward_specs, nb::kw_only(), "dtype"_a,
             "head_dim"_a, "head_dim_v"_a, "mask"_a, "features"_a, "deterministic"_a, "config"_a);
  module.def("attention_bias_specs", &attention_bias_specs, nb::kw_only(), "dtype"_a, "head_dim"_a,
             "head_dim_v"_a, "mask"_a, "features"_a);
  module.def("linear_attention_specs", &linear_attention_specs, nb::kw_only(), "kernel"_a,
             "dtype"_a, "key_dim"_a, "features"_a, "config"_a);
  module.def("based_attention_specs", &based_attention_specs, nb::kw_only(), "kernel"_a, "dtype"_a,
             "dim"_a, "documents"_a, "normalize"_a, "config"_a);
  module.def("hedgehog_attention_specs", &hedgehog_attention_specs, nb::kw_only(), "kernel"_a,
             "dtype"_a, "key_dim"_a, "value_dim"_a, "documents"_a = false);
  module.def("matmul_specs", &matmul_specs, nb::kw_only(), "dtype"_a, "transpose_a"_a,
             "transpose_b"_a, "config"_a);
  module.def("state_step_specs", &state_step_specs, nb::kw_only(), "key_dtype"_a, "value_dtype"_a,
             "values_last"_a, "whole"_a, "normalize"_a, "queries"_a, "taylor"_a, "config"_a);

  module.def("compile", &compile_kernel, "spec"_a, nb::kw_only(), "use_cache"_a = true,
             "ship_to"_a = nb::none(), "{cubin, log, seconds, origin}; needs no GPU");
  module.def("kernel_keys", &kernel_keys, "spec"_a);
  module.def("translation_unit",
             [](const nb::dict& spec) { return runtime::translation_unit(to_spec(spec)); });
  module.def("driver_info", &driver_info);
  module.def("nvrtc_info", &nvrtc_info);
  module.def("cache_info", &cache_info);
  module.def("sha256", [](const nb::bytes& data) {
    return runtime::sha256_hex({data.c_str(), data.size()});
  });
}

}  // namespace tk::ffi
