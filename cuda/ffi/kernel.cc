// The target tk_kernel_v1: any kernel whose one parameter is tk::KernelParams.
#include <algorithm>
#include <span>
#include <vector>

#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/kernel_settings.h"
#include "runtime/launch.h"
#include "tk/kernel_params.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_kernel_v1";

runtime::KernelTable<KernelSpec> kernels;

// The attributes that are arrays, which XLA passes beside the dictionary.
struct Lists {
  xffi::Span<const std::int64_t> map_tiles;  // rows and columns for each buffer; 0, 0: no map
  xffi::Span<const float> scalars;
};

Result<KernelSpec> read_spec(const KernelSettings& settings) {
  KernelSpec spec;
  spec.symbol = settings.symbol;
  spec.header = settings.header;
  spec.source = settings.source;
  spec.function = settings.function;
  spec.params_type = "tk::KernelParams";
  if (settings.threads > 1024 || settings.shared_bytes > runtime::kMaxSharedBytes ||
      settings.cluster_size > 8 ||
      std::min({settings.threads, settings.shared_bytes, settings.cluster_size}) < 0) {
    return invalid("threads " + std::to_string(settings.threads) + ", shared_bytes " +
                   std::to_string(settings.shared_bytes) + " or cluster_size " +
                   std::to_string(settings.cluster_size) + " is out of range");
  }
  spec.threads = static_cast<int>(settings.threads);
  spec.shared_bytes = static_cast<int>(settings.shared_bytes);
  spec.cluster_size = static_cast<int>(settings.cluster_size);
  return spec;
}

Result<KernelSpec> checked(const KernelSpec& spec) {
  if (Status status = runtime::check_spec(spec); !status.ok()) return status.error();
  return spec;
}

Result<KernelParams> read_params(std::span<const AnyBuffer> buffers, const Lists& lists) {
  KernelParams params = {};
  if (buffers.size() > kMaxKernelBuffers) {
    return invalid(std::to_string(buffers.size()) + " arguments and results; a kernel takes " +
                   std::to_string(kMaxKernelBuffers));
  }
  if (lists.map_tiles.size() != 2 * buffers.size()) {
    return invalid("map_tiles has " + std::to_string(lists.map_tiles.size()) +
                   " numbers; expected rows and columns for each of " +
                   std::to_string(buffers.size()) + " buffers");
  }
  constexpr std::size_t kMaxScalars = std::size(KernelParams{}.scalars);
  if (lists.scalars.size() > kMaxScalars) {
    return invalid(std::to_string(lists.scalars.size()) + " scalars; a kernel takes " +
                   std::to_string(kMaxScalars));
  }
  std::copy(lists.scalars.begin(), lists.scalars.end(), params.scalars);
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const auto dims = buffers[i].dimensions();
    if (dims.size() > kMaxKernelRank) {
      return invalid("buffer " + std::to_string(i) + " has shape " + shape_text(buffers[i]) +
                     "; at most " + std::to_string(kMaxKernelRank) + " dimensions are passed on");
    }
    params.buffers[i].data = buffers[i].untyped_data();
    params.buffers[i].rank = static_cast<int>(dims.size());
    std::fill_n(params.buffers[i].shape, kMaxKernelRank, 1);
    std::copy(dims.begin(), dims.end(), params.buffers[i].shape);
  }
  return params;
}

// The map of one buffer for tiles of `rows` x `columns`: boxes of one panel, dimensions from last
// to first, whose rows are the second to last. A vector's box is its tile, without swizzle.
Status encode_map(TensorMap* map, const AnyBuffer& buffer, std::int64_t rows,
                  std::int64_t columns) {
  const auto dtype = data_type(buffer);
  if (!dtype.ok()) return dtype.error();
  const auto shape = buffer.dimensions();
  const std::size_t rank = shape.size();
  const int bytes = runtime::element_bytes(*dtype);
  if (rank == 0 || buffer.element_count() == 0 || rows < 1 || rows > 256 || columns < 1 ||
      columns > 65536 || (rank == 1 && rows != 1)) {
    return invalid("no tensor map of tiles (" + std::to_string(rows) + ", " +
                   std::to_string(columns) + ") over shape " + shape_text(buffer));
  }
  std::int64_t dims[kMaxKernelRank], strides[kMaxKernelRank], box[kMaxKernelRank];
  std::int64_t stride = bytes;
  for (std::size_t i = 0; i < rank; ++i) {
    dims[i] = shape[rank - 1 - i];
    stride *= dims[i];
    strides[i] = stride;
    box[i] = 1;
  }
  const int tile_columns = static_cast<int>(columns);
  box[0] = rank == 1 ? columns : panel_columns(tile_columns, bytes);
  if (rank > 1) box[1] = rows;
  const int swizzle = rank == 1 ? 0 : swizzle_bytes(tile_columns, bytes);
  return runtime::encode_tensor_map(
      map, buffer.untyped_data(),
      {*dtype, {dims, rank}, {strides, rank - 1}, {box, rank}, swizzle});
}

void declare_buffers(std::span<const AnyBuffer> buffers, std::size_t num_args) {
  std::vector<std::string> names;
  std::vector<CallArray> arrays;
  for (std::size_t i = 0; i < buffers.size(); ++i) names.push_back("buffer " + std::to_string(i));
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    arrays.push_back({names[i].c_str(), buffers[i], i >= num_args});
  }
  declare_call_arrays(arrays);
}

Status initialize(const Device& device, std::span<const AnyBuffer> buffers,
                  const KernelSettings& settings, const Lists& lists) {
  const auto spec = read_spec(settings);
  if (!spec.ok()) return spec.error();
  if (const auto params = read_params(buffers, lists); !params.ok()) return params.error();
  return load(kernels, *spec, device, [&] { return checked(*spec); });
}

Status execute(const Execution& on, std::span<const AnyBuffer> buffers, std::size_t num_args,
               const KernelSettings& settings, const Lists& lists) {
  const auto spec = read_spec(settings);
  if (!spec.ok()) return spec.error();
  auto params = read_params(buffers, lists);
  if (!params.ok()) return params.error();
  const auto results = buffers.subspan(num_args);
  if (std::all_of(results.begin(), results.end(),
                  [](const AnyBuffer& result) { return result.element_count() == 0; })) {
    return {};
  }
  const auto kernel = find_loaded(kernels, *spec, on.device, [&] { return checked(*spec); });
  if (!kernel.ok()) return kernel.error();
  if (kInterpreted) declare_buffers(buffers, num_args);
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const std::int64_t rows = lists.map_tiles[2 * i], columns = lists.map_tiles[2 * i + 1];
    if (rows == 0 && columns == 0) continue;
    if (Status status = encode_map(&params->maps[i], buffers[i], rows, columns); !status.ok()) {
      return status;
    }
  }
  return runtime::launch(**kernel, on.stream, {settings.grid_x, settings.grid_y, settings.grid_z},
                         &*params);
}

// All arguments, then all results. AnyBuffer decoding fails for tokens alone.
Result<std::vector<AnyBuffer>> gather(xffi::RemainingArgs args, xffi::RemainingRets rets) {
  std::vector<AnyBuffer> buffers;
  for (std::size_t i = 0; i < args.size(); ++i) {
    const auto buffer = args.get<AnyBuffer>(i);
    if (!buffer) return invalid("argument " + std::to_string(i) + " is not an array");
    buffers.push_back(*buffer);
  }
  for (std::size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<AnyBuffer>(i);
    if (!buffer) return invalid("result " + std::to_string(i) + " is not an array");
    buffers.push_back(**buffer);
  }
  return buffers;
}

xffi::Error call(Stage stage, xffi::RemainingArgs args, xffi::RemainingRets rets,
                 const KernelSettings& settings, xffi::Span<const std::int64_t> map_tiles,
                 xffi::Span<const float> scalars) {
  const auto buffers = gather(args, rets);
  if (!buffers.ok()) return to_ffi(kName, buffers.error());
  const Lists lists = {map_tiles, scalars};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return initialize(device, *buffers, settings, lists); },
      [&](const Execution& on) { return execute(on, *buffers, args.size(), settings, lists); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<KernelSettings>("settings")
      .template Attr<xffi::Span<const std::int64_t>>("map_tiles")
      .template Attr<xffi::Span<const float>>("scalars");
}

}  // namespace

TK_DEFINE_TARGET(kKernelTarget, kName, call, bind);

}  // namespace tk::ffi
