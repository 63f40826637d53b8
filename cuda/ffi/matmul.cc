// The target tk_matmul_v1.
#include "kernels/matmul/matmul.h"

#include <algorithm>

#include "ffi/ffi_util.h"
#include "ffi/handlers.h"
#include "ffi/matmul_kernels.h"
#include "runtime/launch.h"

namespace tk::ffi {
namespace {

constexpr const char* kName = "tk_matmul_v1";
constexpr int kMapColumns = 64;  // of every box: 128 bytes

runtime::KernelTable<KernelKey> kernels;

struct Buffers {
  AnyBuffer a, b, c;
};

struct Call {
  MatmulKernel kernel;
  std::int64_t m, n, k, batch, batch_a, batch_b;
};

// What the copy engine asks of a row's length.
Status check_rows(const char* name, const AnyBuffer& buffer, runtime::DataType dtype) {
  if (dim(buffer, 2) * runtime::element_bytes(dtype) % 16 == 0) return {};
  return invalid("rows of " + std::string(name) + ", " + shape_text(buffer) +
                 ", are not a multiple of 16 bytes");
}

// a and b are [1 or batch, rows, columns] as stored, c is [batch, M, N].
Result<Call> read_call(const Buffers& buffers, const matmul::Options& options,
                       const matmul::Config& config) {
  const auto& [a, b, c] = buffers;
  if (Status status =
          first_error({check_rank("a", a, 3), check_rank("b", b, 3), check_rank("c", c, 3)});
      !status.ok()) {
    return status.error();
  }
  const auto dtype = data_type(a);
  if (!dtype.ok()) return dtype.error();
  Call call{{*dtype, options, config},
            dim(c, 1),
            dim(c, 2),
            dim(a, options.transpose_a ? 1 : 2),
            dim(c, 0),
            dim(a, 0),
            dim(b, 0)};
  const auto [m, n, k, batch] = std::array{call.m, call.n, call.k, call.batch};
  if (Status status = first_error(
          {options.transpose_a ? check_dims("a", a, {call.batch_a, k, m})
                               : check_dims("a", a, {call.batch_a, m, k}),
           options.transpose_b ? check_dims("b", b, {call.batch_b, n, k})
                               : check_dims("b", b, {call.batch_b, k, n}),
           check_dtype("b", b, a.element_type()), check_dtype("c", c, a.element_type()),
           check_rows("a", a, *dtype), check_rows("b", b, *dtype), check_rows("c", c, *dtype)});
      !status.ok()) {
    return status.error();
  }
  for (const std::int64_t own : {call.batch_a, call.batch_b}) {
    if (own != 1 && own != batch) {
      return invalid("an operand has batch " + std::to_string(own) + "; expected 1 or " +
                     std::to_string(batch));
    }
  }
  if (k == 0 && batch * m * n != 0) return invalid("a and b have no columns to sum over (K is 0)");
  return call;
}

// Tiles of a checked configuration, of which the kernel counts rows and columns in ints.
Result<std::int64_t> count_tiles(const Call& call) {
  const matmul::Config& config = call.kernel.config;
  const std::int64_t clusters = ceil_div(ceil_div(call.m, config.block_m), config.cluster_m);
  const std::int64_t tiles =
      int_product({clusters * config.cluster_m, ceil_div(call.n, config.block_n), call.batch});
  if (tiles < 0 || std::max({call.m, call.n, call.k}) > kMaxInt) {
    return unsupported("more than 2^31 - 1 tiles, or a dimension above that: m " +
                       std::to_string(call.m) + ", n " + std::to_string(call.n) + ", k " +
                       std::to_string(call.k) + ", batch " + std::to_string(call.batch));
  }
  return tiles;
}

// A map over [batch, rows, columns]: dimensions (columns, rows, batch).
Status encode_matrix(TensorMap* map, const AnyBuffer& buffer, runtime::DataType dtype,
                     std::int64_t rows_in_box) {
  const std::int64_t columns = dim(buffer, 2);
  const std::int64_t row_bytes = columns * runtime::element_bytes(dtype);
  const std::int64_t dims[] = {columns, dim(buffer, 1), dim(buffer, 0)};
  const std::int64_t strides[] = {row_bytes, dim(buffer, 1) * row_bytes};
  const std::int64_t box[] = {kMapColumns, rows_in_box, 1};
  return runtime::encode_tensor_map(map, buffer.untyped_data(), {dtype, dims, strides, box, 128});
}

Status initialize(const Device& device, const Buffers& buffers, const matmul::Options& options,
                  const matmul::Config& config) {
  const auto call = read_call(buffers, options, config);
  if (!call.ok()) return call.error();
  if (Status status = load(kernels, call->kernel, device); !status.ok()) return status;
  const auto tiles = count_tiles(*call);
  return tiles.ok() ? Status() : tiles.error();
}

Status execute(const Execution& on, const Buffers& buffers, const matmul::Options& options,
               const matmul::Config& config) {
  const auto call = read_call(buffers, options, config);
  if (!call.ok()) return call.error();
  if (buffers.c.element_count() == 0) return {};
  const auto kernel = find_loaded(kernels, call->kernel, on.device);
  if (!kernel.ok()) return kernel.error();
  const auto tiles = count_tiles(*call);
  if (!tiles.ok()) return tiles.error();

  declare_arrays({{"a", buffers.a, false}, {"b", buffers.b, false}, {"c", buffers.c, true}});

  matmul::Params params = {};
  const runtime::DataType dtype = call->kernel.dtype;
  if (Status status = first_error(
          {encode_matrix(&params.a, buffers.a, dtype,
                         options.transpose_a ? config.block_k : config.block_m),
           encode_matrix(&params.b, buffers.b, dtype,
                         options.transpose_b ? config.block_n / config.cluster_m : config.block_k),
           encode_matrix(&params.c, buffers.c, dtype, 64)});
      !status.ok()) {
    return status;
  }
  params.m = static_cast<int>(call->m);
  params.n = static_cast<int>(call->n);
  params.k = static_cast<int>(call->k);
  params.batch = static_cast<int>(call->batch);
  params.batch_a = static_cast<int>(call->batch_a);
  params.batch_b = static_cast<int>(call->batch_b);
  const std::int64_t resident = on.device.multiprocessors / config.cluster_m * config.cluster_m;
  return runtime::launch(**kernel, on.stream, {std::min(resident, *tiles)}, &params);
}

using Ret = xffi::Result<AnyBuffer>;

xffi::Error call(Stage stage, AnyBuffer a, AnyBuffer b, Ret c, matmul::Options options,
                 matmul::Config config) {
  const Buffers buffers = {a, b, *c};
  return run_stage(
      kName, stage,
      [&](const Device& device) { return initialize(device, buffers, options, config); },
      [&](const Execution& on) { return execute(on, buffers, options, config); });
}

template <typename Binding>
auto bind(Binding binding) {
  return std::move(binding)
      .template Arg<AnyBuffer>()  // a
      .template Arg<AnyBuffer>()  // b
      .template Ret<AnyBuffer>()  // c
      .template Attr<matmul::Options>("options")
      .template Attr<matmul::Config>("config");
}

}  // namespace

TK_DEFINE_TARGET(kMatmulTarget, kName, call, bind);

}  // namespace tk::ffi
