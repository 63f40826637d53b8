// The targets tk_linear_attention_segment_starts_v1 and tk_linear_attention_spread_v1: what joins
// the segments of a sequence that are walked through side by side.
#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/linear_attention_kernels.h"
#include "ffi/linear_attention_problem.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kStartsName = "tk_linear_attention_segment_starts_v1";
constexpr const char* kSpreadName = "tk_linear_attention_spread_v1";

using Name = LinearAttentionSegmentKernel::Name;
runtime::KernelTable<KernelKey> kernels;

// -- Starts of segments ---------------------------------------------------------------------------

constexpr LinearAttentionSegmentKernel kStarts = {Name::kStarts};

struct StartsBuffers {
  AnyBuffer first, kept, added, starts;
};
struct StartsSizes {
  std::int64_t batch, num_heads, segments, size;
};

Result<StartsSizes> read_starts(const StartsBuffers& b) {
  if (Status status = check_rank("starts", b.starts, 5); !status.ok()) return status.error();
  const auto at = [&](std::size_t i) { return dim(b.starts, i); };
  const StartsSizes s{at(0), at(1), at(2), at(3) * at(4)};
  if (s.segments < 2 || s.num_heads < 1 || s.size < 1 ||
      s.size % linear_attention::kStartsColumns != 0) {
    return invalid("starts has shape " + shape_text(b.starts) +
                   "; expected several segments of states of a multiple of " +
                   std::to_string(linear_attention::kStartsColumns) + " numbers");
  }
  if (Status status = first_error(
          {check_floats("starts", b.starts, {at(0), at(1), at(2), at(3), at(4)}),
           check_optional_floats("first", b.first, {at(0), at(1), at(3), at(4)}),
           check_floats("kept", b.kept, {at(0), at(1), s.segments - 1}),
           check_floats("added", b.added, {at(0), at(1), s.segments - 1, at(3), at(4)})});
      !status.ok()) {
    return status.error();
  }
  if (int_product({s.batch, s.num_heads, s.segments}) < 0 || s.size > kMaxInt) {
    return unsupported("more than 2^31 - 1 states: starts " + shape_text(b.starts));
  }
  if (Status status = check_grid("times 1024 numbers of a state",
                                 ceil_div(s.size, linear_attention::kStartsElements));
      !status.ok()) {
    return status.error();
  }
  return s;
}

Status initialize_starts(const Device& device, const StartsBuffers& buffers) {
  const auto sizes = read_starts(buffers);
  return sizes.ok() ? load(kernels, kStarts, device) : sizes.error();
}

Status execute_starts(const Execution& on, const StartsBuffers& b) {
  const auto s = read_starts(b);
  if (!s.ok()) return s.error();
  if (s->batch == 0) return {};
  const auto kernel = find_loaded(kernels, kStarts, on.device);
  if (!kernel.ok()) return kernel.error();
  declare_arrays({{"first", b.first, false},
                  {"kept", b.kept, false},
                  {"added", b.added, false},
                  {"starts", b.starts, true}});
  linear_attention::SegmentStartsParams params = {};
  params.first = optional_floats(b.first);
  params.kept = floats(b.kept);
  params.added = floats(b.added);
  params.starts = floats(b.starts);
  params.segments = static_cast<int>(s->segments);
  params.size = static_cast<int>(s->size);
  return runtime::launch(
      **kernel, on.stream,
      {s->batch * s->num_heads, ceil_div(s->size, linear_attention::kStartsElements), 1}, &params);
}

// -- Spread ---------------------------------------------------------------------------------------

// `results` is out [B, T, H, V], or states as they are stored, [B, runs, H, slices * 64, K]: with
// `like` [B, T, H, V] in either case, for its sizes.
struct SpreadBuffers {
  AnyBuffer like, marks, ends, results;
  AnyBuffer new_ends, new_results;
};
struct SpreadCall {
  LinearAttentionSizes sizes;
  LinearAttentionSegmentKernel kernel;
  std::int64_t segments;
};

Result<SpreadCall> read_spread(const SpreadBuffers& b, const SpreadOptions& options) {
  if (Status status = first_error({check_rank("like", b.like, 4), check_rank("ends", b.ends, 5)});
      !status.ok()) {
    return status.error();
  }
  const auto dtype = data_type(b.like);
  if (!dtype.ok()) return dtype.error();
  const LinearAttentionSizes s{*dtype,         dim(b.like, 0), dim(b.like, 1), 1,
                               dim(b.like, 2), dim(b.ends, 4), dim(b.like, 3)};
  if (options.chunks_of_segment < 1 || options.stored_every < 0 ||
      options.chunks_of_segment >= s.chunks() || options.stored_every > kMaxInt) {
    return invalid("segments of " + std::to_string(options.chunks_of_segment) + " of " +
                   std::to_string(s.chunks()) + " chunks, stored every " +
                   std::to_string(options.stored_every) + "; expected several segments");
  }
  const std::int64_t segments = ceil_div(s.chunks(), options.chunks_of_segment);
  const bool is_of_states = options.stored_every > 0;
  if (Status status = first_error(
          {check_floats("ends", b.ends, {s.batch, s.num_heads, segments, s.value_dim, s.key_dim}),
           check_floats(
               "marks", b.marks,
               {s.batch, s.num_heads, segments, s.padded_values() / linear_attention::kMarkedRows}),
           is_of_states ? check_stored_states("results", b.results, b.like, s, options.stored_every)
                        : check_like("results", b.results, b.like,
                                     {s.batch, s.seqlen, s.num_heads, s.value_dim})});
      !status.ok()) {
    return status.error();
  }
  if (Status status = check_grid("segments", segments); !status.ok()) return status.error();
  return SpreadCall{s, {is_of_states ? Name::kSpreadStates : Name::kSpreadOut, s.dtype}, segments};
}

Status execute_spread(const Execution& on, const SpreadBuffers& b, const SpreadOptions& options) {
  const auto call = read_spread(b, options);
  if (!call.ok()) return call.error();
  const LinearAttentionSizes& s = call->sizes;
  if (s.empty()) return {};
  if (Status status =
          first_error({check_in_place("new_ends", b.new_ends, "ends", b.ends),
                       check_in_place("new_results", b.new_results, "results", b.results)});
      !status.ok()) {
    return status;
  }
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();
  declare_arrays({{"marks", b.marks, false},
                  {"ends", b.ends, false},
                  {"results", b.results, false},
                  {"new_ends", b.new_ends, true},
                  {"new_results", b.new_results, true}});
  linear_attention::SpreadParams params = {};
  params.marks = floats(b.marks);
  params.ends = floats(b.ends);
  params.results = b.results.untyped_data();
  params.reverse = options.reverse;
  params.seqlen = static_cast<int>(s.seqlen);
  params.num_heads = static_cast<int>(s.num_heads);
  params.key_dim = static_cast<int>(s.key_dim);
  params.value_dim = static_cast<int>(s.value_dim);
  params.chunks = static_cast<int>(s.chunks());
  params.chunks_of_segment = static_cast<int>(options.chunks_of_segment);
  params.stored_every = static_cast<int>(options.stored_every);
  return runtime::launch(**kernel, on.stream,
                         {s.num_heads * s.slices(), call->segments - 1, s.batch}, &params);
}

// -- Bindings -------------------------------------------------------------------------------------

using Ret = xffi::Result<AnyBuffer>;

xffi::Error starts(Stage stage, AnyBuffer first, AnyBuffer kept, AnyBuffer added, Ret starts) {
  const StartsBuffers buffers = {first, kept, added, *starts};
  return run_stage(
      kStartsName, stage, [&](const Device& device) { return initialize_starts(device, buffers); },
      [&](const Execution& on) { return execute_starts(on, buffers); });
}

xffi::Error spread(Stage stage, AnyBuffer like, AnyBuffer marks, AnyBuffer ends, AnyBuffer results,
                   Ret new_ends, Ret new_results, SpreadOptions options) {
  const SpreadBuffers buffers = {like, marks, ends, results, *new_ends, *new_results};
  return run_stage(
      kSpreadName, stage,
      [&](const Device& device) { return load(kernels, read_spread(buffers, options), device); },
      [&](const Execution& on) { return execute_spread(on, buffers, options); });
}

template <typename Binding>
auto bind_starts(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()   // first, or of size 0 for zeros
      .template Arg<AnyBuffer>()   // kept
      .template Arg<AnyBuffer>()   // added
      .template Ret<AnyBuffer>();  // starts
}

template <typename Binding>
auto bind_spread(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // like
      .template Arg<AnyBuffer>()  // marks
      .template Arg<AnyBuffer>()  // ends
      .template Arg<AnyBuffer>()  // results
      .template Ret<AnyBuffer>()  // ends, in place
      .template Ret<AnyBuffer>()  // results, in place
      .template Attr<SpreadOptions>("options");
}

}  // namespace

TK_DEFINE_TARGET(kLinearAttentionSegmentStartsTarget, kStartsName, starts, bind_starts);
TK_DEFINE_TARGET(kLinearAttentionSpreadTarget, kSpreadName, spread, bind_spread);

}  // namespace tk::ffi
