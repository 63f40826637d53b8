#include "runtime/nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <string_view>

#include "runtime/settings.h"

namespace tk::runtime {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLibraryNames[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
constexpr const char* kHowToInstall =
    "Install it with `pip install 'tk_jax[cuda13]'`, or point TK_JAX_NVRTC at libnvrtc.so.13.";

using Program = struct ProgramHandle*;

// The part of NVRTC's C interface that we call; every function returns 0 on success.
struct Nvrtc {
  const char* (*error_string)(int);
  int (*version)(int*, int*);
  int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  int (*destroy)(Program*);
  int (*compile)(Program, int, const char* const*);
  int (*cubin_size)(Program, std::size_t*);
  int (*cubin)(Program, char*);
  int (*log_size)(Program, std::size_t*);
  int (*log)(Program, char*);
  NvrtcVersion info;
};

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// libnvrtc opens its builtins by bare name, which fails for a folder that the loader does not
// know, such as a pip wheel's: they have to be in the process before.
void open_builtins(const fs::path& library) {
  const std::string name = library.filename().string();  // libnvrtc.so.13 or libnvrtc.so.13.0.88
  const std::size_t version = name.find(".so.");
  std::string prefix = "libnvrtc-builtins.so.";
  if (version != std::string::npos) {
    const std::string digits = name.substr(version + 4);
    prefix += digits.substr(0, digits.find('.')) + ".";
  }
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(library.parent_path(), error)) {
    if (entry.path().filename().string().starts_with(prefix)) {
      dlopen(entry.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
    }
  }
}

// Adds to `tried` why each candidate was not opened.
void* open_file(const fs::path& path, std::string& tried) {
  if (path.has_parent_path()) {
    std::error_code error;
    if (!fs::exists(path, error)) {
      tried += "\n  " + path.string() + ": no such file";
      return nullptr;
    }
    open_builtins(fs::canonical(path, error));  // without links, the name tells the version
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) tried += std::string("\n  ") + dlerror();
  return library;
}

void* open_library(std::string& path, std::string& tried) {
  std::vector<std::string> candidates;
  const std::string chosen = environment("TK_JAX_NVRTC");
  std::error_code error;
  if (!chosen.empty() && !fs::is_directory(chosen, error)) {
    candidates.push_back(chosen);
  } else {
    std::vector<std::string> folders = settings().nvrtc_paths;
    if (!chosen.empty()) folders = {chosen};
    for (const std::string& folder : folders) {
      for (const char* name : kLibraryNames)
        candidates.push_back((fs::path(folder) / name).string());
    }
    if (chosen.empty())
      candidates.insert(candidates.end(), std::begin(kLibraryNames), std::end(kLibraryNames));
  }
  for (const std::string& candidate : candidates) {
    if (void* library = open_file(candidate, tried)) {
      path = candidate;
      return library;
    }
  }
  return nullptr;
}

Result<const Nvrtc*> load_nvrtc() {
  static std::mutex mutex;
  static const Nvrtc* loaded = nullptr;
  std::lock_guard lock(mutex);
  if (loaded != nullptr) return loaded;

  std::string tried;
  Nvrtc nvrtc;
  void* library = open_library(nvrtc.info.path, tried);
  if (library == nullptr) {
    return Error{ErrorKind::kFailedPrecondition,
                 std::string("NVRTC, NVIDIA's run-time compiler, was not found. ") + kHowToInstall +
                     " Tried:" + tried};
  }
  const bool complete = find(library, "nvrtcGetErrorString", nvrtc.error_string) &&
                        find(library, "nvrtcVersion", nvrtc.version) &&
                        find(library, "nvrtcCreateProgram", nvrtc.create) &&
                        find(library, "nvrtcDestroyProgram", nvrtc.destroy) &&
                        find(library, "nvrtcCompileProgram", nvrtc.compile) &&
                        find(library, "nvrtcGetCUBINSize", nvrtc.cubin_size) &&
                        find(library, "nvrtcGetCUBIN", nvrtc.cubin) &&
                        find(library, "nvrtcGetProgramLogSize", nvrtc.log_size) &&
                        find(library, "nvrtcGetProgramLog", nvrtc.log);
  if (!complete || nvrtc.version(&nvrtc.info.major, &nvrtc.info.minor) != 0) {
    return Error{ErrorKind::kFailedPrecondition,
                 nvrtc.info.path + " is not a usable NVRTC. " + kHowToInstall};
  }
  if (nvrtc.info.major < 12) {
    return Error{ErrorKind::kFailedPrecondition, nvrtc.info.path + " is NVRTC " +
                                                     std::to_string(nvrtc.info.major) + "." +
                                                     std::to_string(nvrtc.info.minor) +
                                                     "; 12.0 or newer is needed. " + kHowToInstall};
  }
  loaded = new Nvrtc(nvrtc);
  return loaded;
}

}  // namespace

Result<NvrtcVersion> nvrtc_version() {
  const auto nvrtc = load_nvrtc();
  if (!nvrtc.ok()) return nvrtc.error();
  return (*nvrtc)->info;
}

Result<NvrtcOutput> nvrtc_compile(const std::string& source, const std::string& name,
                                  const std::vector<std::string>& options) {
  const auto loaded = load_nvrtc();
  if (!loaded.ok()) return loaded.error();
  const Nvrtc& nvrtc = **loaded;

  Program program = nullptr;
  if (const int code = nvrtc.create(&program, source.c_str(), name.c_str(), 0, nullptr, nullptr)) {
    return Error{ErrorKind::kInternal,
                 std::string("nvrtcCreateProgram failed: ") + nvrtc.error_string(code)};
  }
  std::vector<const char*> arguments;
  for (const std::string& option : options) arguments.push_back(option.c_str());
  int code = nvrtc.compile(program, static_cast<int>(arguments.size()), arguments.data());

  NvrtcOutput output;
  std::size_t size = 0;
  if (nvrtc.log_size(program, &size) == 0 && size > 1) {
    output.log.resize(size);
    nvrtc.log(program, output.log.data());
    // Without the terminating zeros: ptxas's part ends with one of its own.
    output.log.resize(output.log.find_last_not_of(std::string_view("\0\n ", 3)) + 1);
  }
  if (code == 0) code = nvrtc.cubin_size(program, &size);
  if (code == 0) {
    output.cubin.resize(size);
    code = nvrtc.cubin(program, output.cubin.data());
  }
  nvrtc.destroy(&program);
  if (code != 0) {
    return Error{ErrorKind::kInternal, "NVRTC " + std::to_string(nvrtc.info.major) + "." +
                                           std::to_string(nvrtc.info.minor) + " cannot compile " +
                                           name.substr(name.rfind('/') + 1) + ": " +
                                           nvrtc.error_string(code) + "\n" + output.log};
  }
  return output;
}

}  // namespace tk::runtime
