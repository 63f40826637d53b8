#include "ffi/ffi_util.h"

#include <algorithm>

namespace tk::ffi {
namespace {

xffi::ErrorCode code_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return xffi::ErrorCode::kInvalidArgument;
    case ErrorKind::kUnsupported:
      return xffi::ErrorCode::kUnimplemented;
    case ErrorKind::kFailedPrecondition:
      return xffi::ErrorCode::kFailedPrecondition;
    case ErrorKind::kInternal:
      return xffi::ErrorCode::kInternal;
  }
  return xffi::ErrorCode::kInternal;
}

std::string dims_text(const std::int64_t* begin, const std::int64_t* end) {
  std::string text;
  for (const std::int64_t* it = begin; it != end; ++it) {
    text += (text.empty() ? "" : ", ") + std::to_string(*it);
  }
  return "(" + text + ")";
}

}  // namespace

xffi::Error to_ffi(const char* target, const Error& error) {
  return xffi::Error(code_of(error.kind), std::string(target) + ": " + error.message);
}

xffi::Error to_ffi(const char* target, const Status& status) {
  return status.ok() ? xffi::Error::Success() : to_ffi(target, status.error());
}

std::size_t hash_value(const KernelKey& key) {
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const std::int64_t value : key.values) {
    hash = (hash ^ static_cast<std::uint64_t>(value)) * 0x100000001b3;
  }
  return hash ^ (hash >> 32);
}

Error invalid(std::string message) { return {ErrorKind::kInvalidArgument, std::move(message)}; }

Error unsupported(std::string message) { return {ErrorKind::kUnsupported, std::move(message)}; }

std::string shape_text(const AnyBuffer& buffer) {
  return dims_text(buffer.dimensions().begin(), buffer.dimensions().end());
}

Status check_dims(const char* name, const AnyBuffer& buffer,
                  std::initializer_list<std::int64_t> expected) {
  const auto dims = buffer.dimensions();
  if (std::equal(dims.begin(), dims.end(), expected.begin(), expected.end())) return {};
  return invalid(std::string(name) + " has shape " + shape_text(buffer) + "; expected " +
                 dims_text(expected.begin(), expected.end()));
}

Status check_rank(const char* name, const AnyBuffer& buffer, std::size_t rank) {
  if (buffer.dimensions().size() == rank) return {};
  return invalid(std::string(name) + " has shape " + shape_text(buffer) + "; expected " +
                 std::to_string(rank) + " dimensions");
}

Status check_dtype(const char* name, const AnyBuffer& buffer, xffi::DataType expected) {
  if (buffer.element_type() == expected) return {};
  return invalid(std::string(name) + " has FFI data type " +
                 std::to_string(static_cast<int>(buffer.element_type())) + "; expected " +
                 std::to_string(static_cast<int>(expected)));
}

Status check_in_place(const char* name, const AnyBuffer& result, const char* operand_name,
                      const AnyBuffer& operand) {
  if (operand.element_count() == 0 || result.untyped_data() == operand.untyped_data()) return {};
  return invalid(std::string(name) + " is not where " + operand_name +
                 " is; expected one aliased with it");
}

Status first_error(std::initializer_list<Status> statuses) {
  for (const Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return {};
}

std::int64_t int_product(std::initializer_list<std::int64_t> factors) {
  std::int64_t product = 1;
  for (const std::int64_t factor : factors) {
    if (factor < 0 || factor > kMaxInt) return -1;
    product *= factor;  // below 2^62
    if (product > kMaxInt) return -1;
  }
  return product;
}

Result<runtime::DataType> data_type(const AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case xffi::DataType::BF16:
      return runtime::DataType::kBFloat16;
    case xffi::DataType::F16:
      return runtime::DataType::kFloat16;
    case xffi::DataType::F32:
      return runtime::DataType::kFloat32;
    case xffi::DataType::S32:
      return runtime::DataType::kInt32;
    default:
      return unsupported("FFI data type " +
                         std::to_string(static_cast<int>(buffer.element_type())) +
                         " is not one of bfloat16, float16, float32, int32");
  }
}

const char* type_name(runtime::DataType type) {
  switch (type) {
    case runtime::DataType::kBFloat16:
      return "tk::bf16";
    case runtime::DataType::kFloat16:
      return "tk::fp16";
    case runtime::DataType::kFloat32:
      return "float";
    case runtime::DataType::kInt32:
      return "int";
  }
  return "";
}

const char* type_suffix(runtime::DataType type) {
  switch (type) {
    case runtime::DataType::kBFloat16:
      return "bf16";
    case runtime::DataType::kFloat16:
      return "fp16";
    case runtime::DataType::kFloat32:
      return "fp32";
    case runtime::DataType::kInt32:
      return "int32";
  }
  return "";
}

}  // namespace tk::ffi
