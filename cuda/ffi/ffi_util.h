// What every FFI handler needs: settings decoding, checks of buffers, errors, contexts.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/driver.h"
#include "runtime/kernel.h"
#include "runtime/status.h"
#include "runtime/tensor_map.h"
#include "tk/tensor_map.h"
#include "xla/ffi/api/ffi.h"

namespace tk::ffi {

namespace xffi = ::xla::ffi;

using runtime::Device;
using runtime::Error;
using runtime::ErrorKind;
using runtime::KernelSpec;
using runtime::Result;
using runtime::Status;
using xffi::AnyBuffer;

// The names of a settings struct's fields, in order; tests compare them with the dataclass.
template <typename T>
struct SettingsFields;

// Decodes `type` from a dictionary attribute with exactly these members, in the order of its
// fields. Outside every namespace.
#define TK_REGISTER_SETTINGS(type, ...)                                          \
  XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(type, __VA_ARGS__);                      \
  template <>                                                                    \
  struct tk::ffi::SettingsFields<type> {                                         \
    static std::vector<std::string> names() {                                    \
      using namespace ::xla::ffi;                                                \
      const auto members = ::xla::ffi::internal::StructMemberNames(__VA_ARGS__); \
      return {members.begin(), members.end()};                                   \
    }                                                                            \
  }

xffi::Error to_ffi(const char* target, const Error& error);
xffi::Error to_ffi(const char* target, const Status& status);

// -- Where calls run ------------------------------------------------------------------------------
// Handlers are compiled once; each of the two modules that link them defines these.

// Whether kernels run in the interpreter.
extern const bool kInterpreted;

// An array that a call's kernels may touch, and whether it is there to be read.
struct CallArray {
  const char* name;
  const AnyBuffer& buffer;
  bool is_result;
};

// Before a call's launches: these arrays are the memory they have, for the interpreter, which fills
// results with NaN. Nothing on a GPU.
void declare_call_arrays(std::span<const CallArray> arrays);
// Runs a call once; in the interpreter once for every schedule that is to be explored, up to the
// first that fails.
Status explore(const std::function<Status()>& call);

inline void declare_arrays(std::initializer_list<CallArray> arrays) {
  if (kInterpreted) declare_call_arrays({arrays.begin(), arrays.size()});
}

// -- Kernels --------------------------------------------------------------------------------------

// Integers that tell the specialisations of one kernel apart.
struct KernelKey {
  std::array<std::int64_t, 12> values = {};
  bool operator==(const KernelKey&) const = default;
};
std::size_t hash_value(const KernelKey& key);

// The kernel that the initialize stage loaded; never compiles. Only where there is none does it
// take the time to make the spec, to see whether the call was wrong from the start.
template <typename Key, typename MakeSpec>
Result<const runtime::Kernel*> find_loaded(runtime::KernelTable<Key>& table, const Key& key,
                                           const Device& device, MakeSpec&& make_spec) {
  if (const runtime::Kernel* kernel = table.find(key, device.ordinal)) return kernel;
  // XLA's CPU backend has no initialize stage, and there is nothing to compile.
  if (kInterpreted) return table.load(key, device, make_spec);
  if (const Result<KernelSpec> spec = make_spec(); !spec.ok()) return spec.error();
  return Error{ErrorKind::kInternal, "the kernel is not loaded on GPU " +
                                         std::to_string(device.ordinal) +
                                         ": execute ran before initialize"};
}

template <typename Kernel>
Result<const runtime::Kernel*> find_loaded(runtime::KernelTable<KernelKey>& table,
                                           const Kernel& kernel, const Device& device) {
  return find_loaded(table, kernel.key(), device, [&] { return kernel.spec(); });
}

// The initialize stage of a call of one kernel: loads what is not there yet.
template <typename Key, typename MakeSpec>
Status load(runtime::KernelTable<Key>& table, const Key& key, const Device& device,
            MakeSpec&& make_spec) {
  const auto kernel = table.load(key, device, make_spec);
  return kernel.ok() ? Status() : kernel.error();
}
template <typename Kernel>
Status load(runtime::KernelTable<KernelKey>& table, const Kernel& kernel, const Device& device) {
  return load(table, kernel.key(), device, [&] { return kernel.spec(); });
}
// The same of what a call's buffers were read as, or why they could not be.
template <typename Call>
Status load(runtime::KernelTable<KernelKey>& table, const Result<Call>& call,
            const Device& device) {
  return call.ok() ? load(table, call->kernel, device) : call.error();
}

// -- Stages ---------------------------------------------------------------------------------------

// Which stage of a call it is, and where: what a handler is told beside its buffers.
struct Stage {
  std::int32_t device;
  bool executes;
  runtime::cuda::Stream stream;  // of execute; none in the interpreter
};
struct InitializeStage {};
struct ExecuteStage {};

// Where an execute stage's kernels go; the device's context is current.
struct Execution {
  const Device& device;
  runtime::cuda::Stream stream;
};

// initialize(device) in the one stage, execute(execution) in the other.
template <typename Initialize, typename Execute>
xffi::Error run_stage(const char* target, const Stage& stage, Initialize&& initialize,
                      Execute&& execute) {
  const auto device = runtime::open_device(stage.device);
  if (!device.ok()) return to_ffi(target, device.error());
  if (!stage.executes) return to_ffi(target, initialize(**device));
  const runtime::ScopedContext context(**device);
  return to_ffi(target, explore([&] { return execute(Execution{**device, stage.stream}); }));
}

// Defines `target`, declared in handlers.h: function(stage, buffers.., attributes..) in both
// stages, called as `bind` of a binding says. In this namespace, after all that it names.
#define TK_DEFINE_TARGET(target, name, function, bind)                                           \
  XLA_FFI_DEFINE_HANDLER(                                                                        \
      target##Initialize, function,                                                              \
      bind(xffi::Ffi::Bind<xffi::ExecutionStage::kInitialize>().Ctx<InitializeStage>()));        \
  XLA_FFI_DEFINE_HANDLER(target##Execute, function, bind(xffi::Ffi::Bind().Ctx<ExecuteStage>()), \
                         {xffi::Traits::kCmdBufferCompatible});                                  \
  const Target target = {name, target##Initialize, target##Execute}

Error invalid(std::string message);
Error unsupported(std::string message);

std::string shape_text(const AnyBuffer& buffer);

// "q has shape (2, 3), expected (2, T, H, D)": the dimensions must be exactly these.
Status check_dims(const char* name, const AnyBuffer& buffer,
                  std::initializer_list<std::int64_t> expected);
Status check_rank(const char* name, const AnyBuffer& buffer, std::size_t rank);
Status check_dtype(const char* name, const AnyBuffer& buffer, xffi::DataType expected);
// Of kernels that know one address for what is before, `operand`, and after; nothing if it is
// empty.
Status check_in_place(const char* name, const AnyBuffer& result, const char* operand_name,
                      const AnyBuffer& operand);

// The first of several checks that fails.
Status first_error(std::initializer_list<Status> statuses);

inline std::int64_t dim(const AnyBuffer& buffer, std::size_t i) { return buffer.dimensions()[i]; }

constexpr std::int64_t ceil_div(std::int64_t x, std::int64_t y) { return (x + y - 1) / y; }

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();

// The product of non-negative factors, or -1 where it does not fit an int.
std::int64_t int_product(std::initializer_list<std::int64_t> factors);

Result<runtime::DataType> data_type(const AnyBuffer& buffer);
// "tk::bf16" and "bf16" for kernel arguments and symbols.
const char* type_name(runtime::DataType type);
const char* type_suffix(runtime::DataType type);
inline const char* bool_name(bool value) { return value ? "true" : "false"; }

}  // namespace tk::ffi

template <>
struct xla::ffi::CtxDecoding<tk::ffi::InitializeStage> {
  using Type = tk::ffi::Stage;
  template <typename Context>
  static std::optional<Type> Decode(const XLA_FFI_Api* api, Context* context,
                                    DiagnosticEngine& diagnostic) {
    if (tk::ffi::kInterpreted) return Type{};
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!device) return std::nullopt;
    return Type{*device, false, {}};
  }
};

template <>
struct xla::ffi::CtxDecoding<tk::ffi::ExecuteStage> {
  using Type = tk::ffi::Stage;
  template <typename Context>
  static std::optional<Type> Decode(const XLA_FFI_Api* api, Context* context,
                                    DiagnosticEngine& diagnostic) {
    using Stream = CtxDecoding<PlatformStream<tk::runtime::cuda::Stream>>;
    if (tk::ffi::kInterpreted) return Type{0, true, {}};
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    const auto stream = Stream::Decode(api, context, diagnostic);
    if (!device || !stream) return std::nullopt;
    return Type{*device, true, *stream};
  }
};
