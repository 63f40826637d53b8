// The target tk_hedgehog_attention_document_states_v1: sums of packed documents before far tiles,
// and their gradients.
#include "ffi/handlers.h"
#include "ffi/hedgehog_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_hedgehog_attention_document_states_v1";

using Kind = HedgehogKernel::Kind;
using hedgehog_attention::kFeatures;
using hedgehog_attention::kMap;

struct Buffers {
  AnyBuffer keys, values, k_map, delta, first, from, from_normalizer;
  DocumentBuffers documents;
  AnyBuffer stored, normalizers, to, to_normalizer;
};

struct Call {
  HedgehogSizes sizes;  // whose heads are those of keys and values here
  HedgehogKernel kernel;
  std::int64_t states;  // shares that there are states of
};

Result<Call> read(const Buffers& b, const HedgehogDocumentStatesOptions& options) {
  if (Status status = check_rank("keys", b.keys, 4); !status.ok()) return status.error();
  const auto sizes = read_hedgehog_sizes(b.keys, b.values, dim(b.keys, 2));
  if (!sizes.ok()) return sizes.error();
  HedgehogSizes s = *sizes;
  s.documents = true;
  const bool stores = is_given(b.stored);
  const bool ends = is_given(b.to);
  if (!stores && !ends && !s.empty()) return invalid("neither stored nor to is asked for");
  if (stores != is_given(b.normalizers) || ends != is_given(b.to_normalizer) ||
      is_given(b.from) != is_given(b.from_normalizer)) {
    return invalid("states and their normalizers go together");
  }
  const AnyBuffer* with_states = ends ? &b.to : is_given(b.from) ? &b.from : nullptr;
  if (with_states != nullptr) {
    if (Status status = check_rank("to", *with_states, 5); !status.ok()) return status.error();
  }
  const std::int64_t states = with_states == nullptr ? options.shares : dim(*with_states, 2);
  if (states < 1 || states > options.shares) {
    return invalid("states are of " + std::to_string(states) + " shares; expected 1 to the " +
                   std::to_string(options.shares) + " there are");
  }
  if (Status status = first_error(
          {b.documents.given() ? check_documents(b.documents, s)
                               : Status(invalid("tiles are not given")),
           check_shares(options.shares, s), check_first(b.first, s),
           options.reverse
               ? first_error({check_like("keys", b.keys, b.values,
                                         {s.batch, s.seqlen, s.num_heads, kFeatures}),
                              check_floats("delta", b.delta,
                                           {s.batch, s.num_heads,
                                            s.most_tiles() * hedgehog_attention::kChunk})})
               : check_like("k_map", b.k_map, b.keys, {s.num_heads, s.key_dim, kMap}),
           stores ? check_like("stored", b.stored, b.keys,
                               {s.batch, s.num_heads, s.chunks(), s.padded_values(), kFeatures})
                  : Status(),
           check_optional_floats("normalizers", b.normalizers,
                                 {s.batch, s.num_heads, s.chunks(), kFeatures}),
           check_optional_floats("from", b.from,
                                 {s.batch, s.num_heads, states, s.value_dim, kFeatures}),
           check_optional_floats("from_normalizer", b.from_normalizer,
                                 {s.batch, s.num_heads, states, kFeatures}),
           check_optional_floats("to", b.to,
                                 {s.batch, s.num_heads, states, s.value_dim, kFeatures}),
           check_optional_floats("to_normalizer", b.to_normalizer,
                                 {s.batch, s.num_heads, states, kFeatures})});
      !status.ok()) {
    return status.error();
  }
  return Call{s, s.kernel(options.reverse ? Kind::kReverseDocumentStates : Kind::kDocumentStates),
              states};
}

Status initialize(const Device& device, const Buffers& buffers,
                  const HedgehogDocumentStatesOptions& options) {
  const auto call = read(buffers, options);
  return call.ok() ? load_hedgehog(device, call->kernel) : call.error();
}

Status execute(const Execution& on, const Buffers& b,
               const HedgehogDocumentStatesOptions& options) {
  const auto call = read(b, options);
  if (!call.ok()) return call.error();
  const HedgehogSizes& s = call->sizes;
  if (s.empty()) return {};
  const auto kernel = find_hedgehog(on.device, call->kernel);
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"keys", b.keys, false},
                  {"values", b.values, false},
                  {"k_map", b.k_map, false},
                  {"delta", b.delta, false},
                  {"first", b.first, false},
                  {"from", b.from, false},
                  {"from_normalizer", b.from_normalizer, false},
                  {"tiles", b.documents.tiles, false},
                  {"counts", b.documents.counts, false},
                  {"windows", b.documents.windows, false},
                  {"stored", b.stored, true},
                  {"normalizers", b.normalizers, true},
                  {"to", b.to, true},
                  {"to_normalizer", b.to_normalizer, true}});
  hedgehog_attention::DocumentStatesParams params = {};
  if (Status status = first_error(
          {encode_tokens(&params.keys, b.keys, s), encode_tokens(&params.values, b.values, s),
           options.reverse ? Status() : encode_head_maps(&params.k_map, b.k_map, s),
           is_given(b.stored) ? encode_chunk_states(&params.stored, b.stored, s) : Status()});
      !status.ok()) {
    return status;
  }
  params.normalizers = optional_floats(b.normalizers);
  params.first = optional_ints(b.first);
  params.delta = optional_floats(b.delta);
  params.from = optional_floats(b.from);
  params.from_normalizer = optional_floats(b.from_normalizer);
  params.to = optional_floats(b.to);
  params.to_normalizer = optional_floats(b.to_normalizer);
  params.num_heads = static_cast<int>(s.num_heads);
  params.value_dim = static_cast<int>(s.value_dim);
  params.chunks = static_cast<int>(s.chunks());
  params.states = static_cast<int>(call->states);
  params.documents = kernel_documents(b.documents, s, options.shares, 1);
  return runtime::launch(**kernel, on.stream, {s.num_heads, call->states, s.batch}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error call(Stage stage, AnyBuffer keys, AnyBuffer values, AnyBuffer k_map, AnyBuffer delta,
                 AnyBuffer first, AnyBuffer from, AnyBuffer from_normalizer, AnyBuffer tiles,
                 AnyBuffer counts, AnyBuffer windows, Ret stored, Ret normalizers, Ret to,
                 Ret to_normalizer, HedgehogDocumentStatesOptions options) {
  const Buffers buffers = {keys,
                           values,
                           k_map,
                           delta,
                           first,
                           from,
                           from_normalizer,
                           {tiles, counts, windows},
                           *stored,
                           *normalizers,
                           *to,
                           *to_normalizer};
  return run_stage(
      kName, stage, [&](const Device& device) { return initialize(device, buffers, options); },
      [&](const Execution& on) { return execute(on, buffers, options); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // keys
      .template Arg<AnyBuffer>()  // values
      .template Arg<AnyBuffer>()  // k_map, or of size 0 (reverse)
      .template Arg<AnyBuffer>()  // delta, or of size 0 (forward)
      .template Arg<AnyBuffer>()  // first, or of size 0
      .template Arg<AnyBuffer>()  // from, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // from_normalizer, or of size 0 for zeros
      .template Arg<AnyBuffer>()  // tiles
      .template Arg<AnyBuffer>()  // counts
      .template Arg<AnyBuffer>()  // windows
      .template Ret<AnyBuffer>()  // stored, or of size 0
      .template Ret<AnyBuffer>()  // normalizers, or of size 0
      .template Ret<AnyBuffer>()  // to, or of size 0
      .template Ret<AnyBuffer>()  // to_normalizer, or of size 0
      .template Attr<HedgehogDocumentStatesOptions>("options");
}

}  // namespace

TK_DEFINE_TARGET(kHedgehogDocumentStatesTarget, kName, call, bind);

}  // namespace tk::ffi
