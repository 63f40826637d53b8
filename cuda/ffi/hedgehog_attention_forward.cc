// The targets tk_hedgehog_attention_sums_v1 and tk_hedgehog_attention_outputs_v1: the forward pass.
#include "ffi/handlers.h"
#include "ffi/hedgehog_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kSumsName = "tk_hedgehog_attention_sums_v1";
constexpr const char* kOutputsName = "tk_hedgehog_attention_outputs_v1";

using Kind = HedgehogKernel::Kind;
using hedgehog_attention::kFeatures;
using hedgehog_attention::kMap;

// -- Sums -----------------------------------------------------------------------------------------

struct SumsBuffers {
  AnyBuffer k, v, k_map, first;
  AnyBuffer sums, normalizer;
};

// Of the first segments: at most of all but the last.
Result<HedgehogSizes> read_sums(const SumsBuffers& b, const HedgehogSumsOptions& options) {
  if (Status status = first_error({check_rank("k", b.k, 4), check_rank("sums", b.sums, 5)});
      !status.ok()) {
    return status.error();
  }
  const auto sizes = read_hedgehog_sizes(b.k, b.v, dim(b.k, 2));
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  if (Status status = check_segments(options.chunks_of_segment, s); !status.ok()) {
    return status.error();
  }
  const std::int64_t segments = dim(b.sums, 2);
  const std::int64_t followed = ceil_div(s.chunks(), options.chunks_of_segment) - 1;
  if (segments < 1 || segments > followed) {
    return invalid("sums are of " + std::to_string(segments) + " segments; expected 1 to the " +
                   std::to_string(followed) + " that another one follows");
  }
  if (Status status =
          first_error({check_like("k_map", b.k_map, b.k, {s.num_kv_heads, s.key_dim, kMap}),
                       check_first(b.first, s),
                       check_floats("sums", b.sums,
                                    {s.batch, s.num_kv_heads, segments, s.value_dim, kFeatures}),
                       check_floats("normalizer", b.normalizer,
                                    {s.batch, s.num_kv_heads, segments, kFeatures})});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_sums(const Device& device, const SumsBuffers& buffers,
                       const HedgehogSumsOptions& options) {
  const auto sizes = read_sums(buffers, options);
  return sizes.ok() ? load_hedgehog(device, sizes->kernel(Kind::kSums)) : sizes.error();
}

Status execute_sums(const Execution& on, const SumsBuffers& b, const HedgehogSumsOptions& options) {
  const auto sizes = read_sums(b, options);
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  if (s.empty()) return {};
  const auto kernel = find_hedgehog(on.device, s.kernel(Kind::kSums));
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"k", b.k, false},
                  {"v", b.v, false},
                  {"k_map", b.k_map, false},
                  {"first", b.first, false},
                  {"sums", b.sums, true},
                  {"normalizer", b.normalizer, true}});
  hedgehog_attention::SumsParams params = {};
  if (Status status =
          first_error({encode_tokens(&params.k, b.k, s), encode_tokens(&params.v, b.v, s),
                       encode_head_maps(&params.k_map, b.k_map, s)});
      !status.ok()) {
    return status;
  }
  params.first = optional_ints(b.first);
  params.sums = floats(b.sums);
  params.normalizer = floats(b.normalizer);
  set_sizes(&params, s);
  params.chunks_of_segment = static_cast<int>(options.chunks_of_segment);
  params.segments = static_cast<int>(dim(b.sums, 2));
  return runtime::launch(**kernel, on.stream, {s.num_kv_heads, params.segments, s.batch}, &params);
}

// -- Outputs --------------------------------------------------------------------------------------

struct OutputsBuffers {
  AnyBuffer q, k, v, q_map, k_map, weights, first, sums, normalizer;
  DocumentBuffers documents;
  AnyBuffer out;
};

std::int64_t segments_of(const HedgehogSizes& s, const HedgehogOutputsOptions& options) {
  return s.documents ? options.shares / options.chunks_of_segment
                     : ceil_div(s.chunks(), options.chunks_of_segment);
}

// Of segments of whole shares.
Status check_document_segments(const HedgehogOutputsOptions& options, const HedgehogSizes& s) {
  if (options.chunks_of_segment < 1 || options.shares % options.chunks_of_segment != 0) {
    return invalid("chunks_of_segment is " + std::to_string(options.chunks_of_segment) +
                   "; expected a divisor of the " + std::to_string(options.shares) + " shares");
  }
  return check_shares(options.shares, s);
}

// Before the first segment; those that segments begin with are sums of states unless documents are
// packed.
std::int64_t start_states(const AnyBuffer& sums, std::int64_t segments,
                          const HedgehogOutputsOptions& options) {
  return dim(sums, 2) - options.states_of_segment * (segments - 1);
}

Status check_starts(const OutputsBuffers& b, std::int64_t segments, const HedgehogSizes& s,
                    const HedgehogOutputsOptions& options) {
  if (is_given(b.sums) != is_given(b.normalizer)) return invalid("sums and normalizer go together");
  if (options.states_of_segment < 0 || (s.documents && options.states_of_segment != 0)) {
    return invalid("states_of_segment is " + std::to_string(options.states_of_segment) +
                   "; expected none where documents are packed, and no fewer");
  }
  if (!is_given(b.sums)) return {};
  if (Status status = check_rank("sums", b.sums, 5); !status.ok()) return status;
  const std::int64_t states = dim(b.sums, 2);
  const std::int64_t first = start_states(b.sums, segments, options);
  if (s.documents ? states != segments : first != 0 && first != 1) {
    return invalid("sums are of " + std::to_string(states) + " states; expected " +
                   std::to_string(s.documents ? segments : states - first) +
                   (s.documents ? "" : ", or one more before the first segment"));
  }
  return first_error(
      {check_floats("sums", b.sums, {s.batch, s.num_kv_heads, states, s.value_dim, kFeatures}),
       check_floats("normalizer", b.normalizer, {s.batch, s.num_kv_heads, states, kFeatures})});
}

Result<HedgehogSizes> read_outputs(const OutputsBuffers& b, const HedgehogOutputsOptions& options) {
  if (Status status = check_rank("q", b.q, 4); !status.ok()) return status.error();
  const auto sizes = read_hedgehog_sizes(b.k, b.v, dim(b.q, 2));
  if (!sizes.ok()) return sizes.error();
  HedgehogSizes s = *sizes;
  s.documents = b.documents.given();
  if (Status status = first_error({check_documents(b.documents, s),
                                   s.documents ? check_document_segments(options, s)
                                               : check_segments(options.chunks_of_segment, s)});
      !status.ok()) {
    return status.error();
  }
  if (Status status = first_error(
          {check_like("q", b.q, b.k, {s.batch, s.seqlen, s.num_heads, s.key_dim}),
           check_like("q_map", b.q_map, b.k, {s.num_heads, s.key_dim, kMap}),
           check_like("k_map", b.k_map, b.k, {s.num_kv_heads, s.key_dim, kMap}),
           check_floats("weights", b.weights, {2, s.num_heads}), check_first(b.first, s),
           check_starts(b, segments_of(s, options), s, options),
           check_like("out", b.out, b.k, {s.batch, s.seqlen, s.num_heads, s.value_dim})});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_outputs(const Device& device, const OutputsBuffers& buffers,
                          const HedgehogOutputsOptions& options) {
  const auto sizes = read_outputs(buffers, options);
  return sizes.ok() ? load_hedgehog(device, sizes->kernel(Kind::kOutputs)) : sizes.error();
}

Status execute_outputs(const Execution& on, const OutputsBuffers& b,
                       const HedgehogOutputsOptions& options) {
  const auto sizes = read_outputs(b, options);
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  if (s.empty()) return {};
  const auto kernel = find_hedgehog(on.device, s.kernel(Kind::kOutputs));
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"q_map", b.q_map, false},
                  {"k_map", b.k_map, false},
                  {"weights", b.weights, false},
                  {"first", b.first, false},
                  {"sums", b.sums, false},
                  {"normalizer", b.normalizer, false},
                  {"tiles", b.documents.tiles, false},
                  {"counts", b.documents.counts, false},
                  {"windows", b.documents.windows, false},
                  {"out", b.out, true}});
  hedgehog_attention::OutputsParams params = {};
  if (Status status =
          first_error({encode_tokens(&params.q, b.q, s), encode_tokens(&params.k, b.k, s),
                       encode_tokens(&params.v, b.v, s), encode_tokens(&params.out, b.out, s),
                       encode_head_maps(&params.q_map, b.q_map, s),
                       encode_head_maps(&params.k_map, b.k_map, s)});
      !status.ok()) {
    return status;
  }
  params.first = optional_ints(b.first);
  params.alpha = floats(b.weights);
  params.beta = params.alpha + s.num_heads;
  params.sums = optional_floats(b.sums);
  params.normalizer = optional_floats(b.normalizer);
  if (is_given(b.sums)) {
    params.states = static_cast<int>(dim(b.sums, 2));
    params.start_states = static_cast<int>(start_states(b.sums, segments_of(s, options), options));
    params.states_of_segment = static_cast<int>(options.states_of_segment);
  }
  set_sizes(&params, s);
  params.num_heads = static_cast<int>(s.num_heads);
  params.chunks_of_segment = static_cast<int>(options.chunks_of_segment);
  params.scale = options.scale;
  params.documents = kernel_documents(b.documents, s, options.shares, options.chunks_of_segment);
  params.out_rows = token_rows(b.out);
  return runtime::launch(**kernel, on.stream, {s.num_heads, segments_of(s, options), s.batch},
                         &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error sums(Stage stage, AnyBuffer k, AnyBuffer v, AnyBuffer k_map, AnyBuffer first, Ret sums,
                 Ret normalizer, HedgehogSumsOptions options) {
  const SumsBuffers buffers = {k, v, k_map, first, *sums, *normalizer};
  return run_stage(
      kSumsName, stage,
      [&](const Device& device) { return initialize_sums(device, buffers, options); },
      [&](const Execution& on) { return execute_sums(on, buffers, options); });
}

xffi::Error outputs(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer q_map,
                    AnyBuffer k_map, AnyBuffer weights, AnyBuffer first, AnyBuffer sums,
                    AnyBuffer normalizer, AnyBuffer tiles, AnyBuffer counts, AnyBuffer windows,
                    Ret out, HedgehogOutputsOptions options) {
  const OutputsBuffers buffers = {
      q, k, v, q_map, k_map, weights, first, sums, normalizer, {tiles, counts, windows}, *out};
  return run_stage(
      kOutputsName, stage,
      [&](const Device& device) { return initialize_outputs(device, buffers, options); },
      [&](const Execution& on) { return execute_outputs(on, buffers, options); });
}

template <typename Binding>
auto bind_sums(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // k_map
      .template Arg<AnyBuffer>()  // first, or of size 0
      .template Ret<AnyBuffer>()  // sums
      .template Ret<AnyBuffer>()  // normalizer
      .template Attr<HedgehogSumsOptions>("options");
}

template <typename Binding>
auto bind_outputs(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // q_map
      .template Arg<AnyBuffer>()  // k_map
      .template Arg<AnyBuffer>()  // weights: alpha and beta
      .template Arg<AnyBuffer>()  // first, or of size 0
      .template Arg<AnyBuffer>()  // sums, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // normalizer, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // tiles, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // windows, or of size 0
      .template Ret<AnyBuffer>()  // out
      .template Attr<HedgehogOutputsOptions>("options");
}

}  // namespace

TK_DEFINE_TARGET(kHedgehogSumsTarget, kSumsName, sums, bind_sums);
TK_DEFINE_TARGET(kHedgehogOutputsTarget, kOutputsName, outputs, bind_outputs);

}  // namespace tk::ffi
