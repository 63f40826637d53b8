// The targets tk_hedgehog_attention_queries_v1 and tk_hedgehog_attention_keys_v1: the backward
// pass.
#include "ffi/handlers.h"
#include "ffi/hedgehog_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kQueriesName = "tk_hedgehog_attention_queries_v1";
constexpr const char* kKeysName = "tk_hedgehog_attention_keys_v1";

using Kind = HedgehogKernel::Kind;
using hedgehog_attention::kFeatures;
using hedgehog_attention::kMap;

// A number for each token of each head of q.
Status check_vector(const char* name, const AnyBuffer& buffer, const HedgehogSizes& s) {
  return check_floats(name, buffer,
                      {s.batch, s.num_heads, s.places() * hedgehog_attention::kChunk});
}
// A state for each chunk, and its normalizer.
Status check_states(const char* name, const AnyBuffer& states, const char* normalizers_name,
                    const AnyBuffer& normalizers, const AnyBuffer& k, const HedgehogSizes& s) {
  return first_error(
      {check_like(name, states, k,
                  {s.batch, s.num_kv_heads, s.chunks(), s.padded_values(), kFeatures}),
       check_floats(normalizers_name, normalizers,
                    {s.batch, s.num_kv_heads, s.chunks(), kFeatures})});
}

// -- Queries --------------------------------------------------------------------------------------

struct QueriesBuffers {
  AnyBuffer q, k, v, dout, q_map, states, normalizers, alpha, beta, first;
  DocumentBuffers documents;
  AnyBuffer dq, features, dscores, largest, peaks, dbeta, dalpha, divisors, delta;
};

Result<HedgehogSizes> read_queries(const QueriesBuffers& b) {
  if (Status status = check_rank("q", b.q, 4); !status.ok()) return status.error();
  const auto sizes = read_hedgehog_sizes(b.k, b.v, dim(b.q, 2));
  if (!sizes.ok()) return sizes.error();
  HedgehogSizes s = *sizes;
  s.documents = b.documents.given();
  if (Status status = first_error(
          {check_documents(b.documents, s),
           check_like("q", b.q, b.k, {s.batch, s.seqlen, s.num_heads, s.key_dim}),
           check_like("dout", b.dout, b.k, {s.batch, s.seqlen, s.num_heads, s.value_dim}),
           check_like("q_map", b.q_map, b.k, {s.num_heads, s.key_dim, kMap}),
           check_states("states", b.states, "normalizers", b.normalizers, b.k, s),
           check_vector("divisors", b.divisors, s), check_vector("delta", b.delta, s),
           check_floats("alpha", b.alpha, {s.num_heads}),
           check_floats("beta", b.beta, {s.num_heads}), check_first(b.first, s),
           check_like("dq", b.dq, b.k, {s.batch, s.seqlen, s.num_heads, s.key_dim}),
           check_like("features", b.features, b.k, {s.batch, s.seqlen, s.num_heads, kFeatures}),
           check_like("dscores", b.dscores, b.k, {s.batch, s.seqlen, s.num_heads, kMap}),
           check_vector("largest", b.largest, s), check_vector("peaks", b.peaks, s),
           check_vector("dbeta", b.dbeta, s), check_vector("dalpha", b.dalpha, s)});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_queries(const Device& device, const QueriesBuffers& buffers) {
  const auto sizes = read_queries(buffers);
  return sizes.ok() ? load_hedgehog(device, sizes->kernel(Kind::kQueries)) : sizes.error();
}

Status execute_queries(const Execution& on, const QueriesBuffers& b,
                       const HedgehogGradientsOptions& options) {
  const auto sizes = read_queries(b);
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  if (s.empty()) return {};
  const auto kernel = find_hedgehog(on.device, s.kernel(Kind::kQueries));
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"dout", b.dout, false},
                  {"q_map", b.q_map, false},
                  {"states", b.states, false},
                  {"normalizers", b.normalizers, false},
                  {"alpha", b.alpha, false},
                  {"beta", b.beta, false},
                  {"first", b.first, false},
                  {"tiles", b.documents.tiles, false},
                  {"counts", b.documents.counts, false},
                  {"windows", b.documents.windows, false},
                  {"dq", b.dq, true},
                  {"features", b.features, true},
                  {"dscores", b.dscores, true},
                  {"largest", b.largest, true},
                  {"peaks", b.peaks, true},
                  {"dbeta", b.dbeta, true},
                  {"dalpha", b.dalpha, true},
                  {"divisors", b.divisors, true},
                  {"delta", b.delta, true}});
  hedgehog_attention::QueriesParams params = {};
  if (Status status = first_error(
          {encode_tokens(&params.q, b.q, s), encode_tokens(&params.dq, b.dq, s),
           encode_tokens(&params.k, b.k, s), encode_tokens(&params.v, b.v, s),
           encode_tokens(&params.dout, b.dout, s), encode_tokens(&params.features, b.features, s),
           encode_tokens(&params.dscores, b.dscores, s),
           encode_head_maps(&params.q_map, b.q_map, s),
           encode_chunk_states(&params.states, b.states, s)});
      !status.ok()) {
    return status;
  }
  params.first = optional_ints(b.first);
  params.alpha = floats(b.alpha);
  params.beta = floats(b.beta);
  params.normalizers = floats(b.normalizers);
  params.divisors = floats(b.divisors);
  params.delta = floats(b.delta);
  params.largest = floats(b.largest);
  params.peaks = floats(b.peaks);
  params.dbeta = floats(b.dbeta);
  params.dalpha = floats(b.dalpha);
  set_sizes(&params, s);
  params.num_heads = static_cast<int>(s.num_heads);
  params.scale = options.scale;
  params.documents = kernel_documents(b.documents, s, 1, 1);
  params.dq_rows = token_rows(b.dq);
  params.features_rows = token_rows(b.features);
  params.dscores_rows = token_rows(b.dscores);
  return runtime::launch(**kernel, on.stream, {s.places(), s.num_heads, s.batch}, &params);
}

// -- Keys -----------------------------------------------------------------------------------------

struct KeysBuffers {
  AnyBuffer q, k, v, dout, k_map, dstates, dnormalizers, divisors, delta, largest, peaks, beta,
      first;
  DocumentBuffers documents;
  AnyBuffer dk, dv, dscores;
};

Result<HedgehogSizes> read_keys(const KeysBuffers& b) {
  if (Status status = check_rank("q", b.q, 4); !status.ok()) return status.error();
  const auto sizes = read_hedgehog_sizes(b.k, b.v, dim(b.q, 2));
  if (!sizes.ok()) return sizes.error();
  HedgehogSizes s = *sizes;
  s.documents = b.documents.given();
  if (Status status = first_error(
          {check_documents(b.documents, s),
           check_like("q", b.q, b.k, {s.batch, s.seqlen, s.num_heads, s.key_dim}),
           check_like("dout", b.dout, b.k, {s.batch, s.seqlen, s.num_heads, s.value_dim}),
           check_like("k_map", b.k_map, b.k, {s.num_kv_heads, s.key_dim, kMap}),
           check_states("dstates", b.dstates, "dnormalizers", b.dnormalizers, b.k, s),
           check_vector("divisors", b.divisors, s), check_vector("delta", b.delta, s),
           check_vector("largest", b.largest, s), check_vector("peaks", b.peaks, s),
           check_floats("beta", b.beta, {s.num_heads}), check_first(b.first, s),
           check_like("dk", b.dk, b.k, {s.batch, s.seqlen, s.num_kv_heads, s.key_dim}),
           check_like("dv", b.dv, b.k, {s.batch, s.seqlen, s.num_kv_heads, s.value_dim}),
           check_like("dscores", b.dscores, b.k, {s.batch, s.seqlen, s.num_kv_heads, kMap})});
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_keys(const Device& device, const KeysBuffers& buffers) {
  const auto sizes = read_keys(buffers);
  return sizes.ok() ? load_hedgehog(device, sizes->kernel(Kind::kKeys)) : sizes.error();
}

Status execute_keys(const Execution& on, const KeysBuffers& b,
                    const HedgehogGradientsOptions& options) {
  const auto sizes = read_keys(b);
  if (!sizes.ok()) return sizes.error();
  const HedgehogSizes& s = *sizes;
  if (s.empty()) return {};
  const auto kernel = find_hedgehog(on.device, s.kernel(Kind::kKeys));
  if (!kernel.ok()) return kernel.error();

  declare_arrays({{"q", b.q, false},
                  {"k", b.k, false},
                  {"v", b.v, false},
                  {"dout", b.dout, false},
                  {"k_map", b.k_map, false},
                  {"dstates", b.dstates, false},
                  {"dnormalizers", b.dnormalizers, false},
                  {"divisors", b.divisors, false},
                  {"delta", b.delta, false},
                  {"largest", b.largest, false},
                  {"peaks", b.peaks, false},
                  {"beta", b.beta, false},
                  {"first", b.first, false},
                  {"tiles", b.documents.tiles, false},
                  {"counts", b.documents.counts, false},
                  {"windows", b.documents.windows, false},
                  {"dk", b.dk, true},
                  {"dv", b.dv, true},
                  {"dscores", b.dscores, true}});
  hedgehog_attention::KeysParams params = {};
  if (Status status =
          first_error({encode_tokens(&params.q, b.q, s), encode_tokens(&params.k, b.k, s),
                       encode_tokens(&params.v, b.v, s), encode_tokens(&params.dk, b.dk, s),
                       encode_tokens(&params.dv, b.dv, s), encode_tokens(&params.dout, b.dout, s),
                       encode_tokens(&params.dscores, b.dscores, s),
                       encode_head_maps(&params.k_map, b.k_map, s),
                       encode_chunk_states(&params.dstates, b.dstates, s)});
      !status.ok()) {
    return status;
  }
  params.first = optional_ints(b.first);
  params.beta = floats(b.beta);
  params.dnormalizers = floats(b.dnormalizers);
  params.divisors = floats(b.divisors);
  params.delta = floats(b.delta);
  params.largest = floats(b.largest);
  params.peaks = floats(b.peaks);
  set_sizes(&params, s);
  params.num_heads = static_cast<int>(s.num_heads);
  params.scale = options.scale;
  params.documents = kernel_documents(b.documents, s, 1, 1);
  params.dk_rows = token_rows(b.dk);
  params.dv_rows = token_rows(b.dv);
  params.dscores_rows = token_rows(b.dscores);
  return runtime::launch(**kernel, on.stream, {s.places(), s.num_kv_heads, s.batch}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error queries(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                    AnyBuffer q_map, AnyBuffer states, AnyBuffer normalizers, AnyBuffer alpha,
                    AnyBuffer beta, AnyBuffer first, AnyBuffer tiles, AnyBuffer counts,
                    AnyBuffer windows, Ret dq, Ret features, Ret dscores, Ret largest, Ret peaks,
                    Ret dbeta, Ret dalpha, Ret divisors, Ret delta,
                    HedgehogGradientsOptions options) {
  const QueriesBuffers buffers = {q,
                                  k,
                                  v,
                                  dout,
                                  q_map,
                                  states,
                                  normalizers,
                                  alpha,
                                  beta,
                                  first,
                                  {tiles, counts, windows},
                                  *dq,
                                  *features,
                                  *dscores,
                                  *largest,
                                  *peaks,
                                  *dbeta,
                                  *dalpha,
                                  *divisors,
                                  *delta};
  return run_stage(
      kQueriesName, stage,
      [&](const Device& device) { return initialize_queries(device, buffers); },
      [&](const Execution& on) { return execute_queries(on, buffers, options); });
}

template <typename Binding>
auto bind_queries(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // q_map
      .template Arg<AnyBuffer>()  // states
      .template Arg<AnyBuffer>()  // normalizers
      .template Arg<AnyBuffer>()  // alpha
      .template Arg<AnyBuffer>()  // beta
      .template Arg<AnyBuffer>()  // first, or of size 0
      .template Arg<AnyBuffer>()  // tiles, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // windows, or of size 0
      .template Ret<AnyBuffer>()  // dq
      .template Ret<AnyBuffer>()  // features
      .template Ret<AnyBuffer>()  // dscores
      .template Ret<AnyBuffer>()  // largest
      .template Ret<AnyBuffer>()  // peaks
      .template Ret<AnyBuffer>()  // dbeta
      .template Ret<AnyBuffer>()  // dalpha
      .template Ret<AnyBuffer>()  // divisors
      .template Ret<AnyBuffer>()  // delta
      .template Attr<HedgehogGradientsOptions>("options");
}

xffi::Error keys(Stage stage, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer dout,
                 AnyBuffer k_map, AnyBuffer dstates, AnyBuffer dnormalizers, AnyBuffer divisors,
                 AnyBuffer delta, AnyBuffer largest, AnyBuffer peaks, AnyBuffer beta,
                 AnyBuffer first, AnyBuffer tiles, AnyBuffer counts, AnyBuffer windows, Ret dk,
                 Ret dv, Ret dscores, HedgehogGradientsOptions options) {
  const KeysBuffers buffers = {
      q,        k,     v,       dout,  k_map, dstates, dnormalizers,
      divisors, delta, largest, peaks, beta,  first,   {tiles, counts, windows},
      *dk,      *dv,   *dscores};
  return run_stage(
      kKeysName, stage, [&](const Device& device) { return initialize_keys(device, buffers); },
      [&](const Execution& on) { return execute_keys(on, buffers, options); });
}

template <typename Binding>
auto bind_keys(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // k
      .template Arg<AnyBuffer>()  // v
      .template Arg<AnyBuffer>()  // dout
      .template Arg<AnyBuffer>()  // k_map
      .template Arg<AnyBuffer>()  // dstates
      .template Arg<AnyBuffer>()  // dnormalizers
      .template Arg<AnyBuffer>()  // divisors
      .template Arg<AnyBuffer>()  // delta
      .template Arg<AnyBuffer>()  // largest
      .template Arg<AnyBuffer>()  // peaks
      .template Arg<AnyBuffer>()  // beta
      .template Arg<AnyBuffer>()  // first, or of size 0
      .template Arg<AnyBuffer>()  // tiles, or of size 0
      .template Arg<AnyBuffer>()  // counts, or of size 0
      .template Arg<AnyBuffer>()  // windows, or of size 0
      .template Ret<AnyBuffer>()  // dk
      .template Ret<AnyBuffer>()  // dv
      .template Ret<AnyBuffer>()  // dscores
      .template Attr<HedgehogGradientsOptions>("options");
}

}  // namespace

TK_DEFINE_TARGET(kHedgehogQueriesTarget, kQueriesName, queries, bind_queries);
TK_DEFINE_TARGET(kHedgehogKeysTarget, kKeysName, keys, bind_keys);

}  // namespace tk::ffi
