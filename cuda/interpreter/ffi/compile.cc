#include "interpreter/ffi/compile.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <vector>

#include "interpreter/registry.h"
#include "runtime/kernel_cache.h"
#include "runtime/settings.h"
#include "runtime/sha256.h"

extern char** environ;

namespace tk::interpreter {
namespace {

namespace fs = std::filesystem;

using runtime::Error;
using runtime::ErrorKind;
using runtime::KernelSpec;
using runtime::Result;
using runtime::Status;

// Compiling takes longer than running what tests run.
constexpr const char* kOptions[] = {
    "-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DTK_INTERPRETER", "-w"};

std::string entry_name(std::size_t index) { return "tk_interpreter_run_" + std::to_string(index); }

std::string translation_unit(std::span<const KernelSpec> specs) {
  std::string text = "#include \"tk/interpreter/entry.h\"\n";
  if (!specs[0].header.empty()) text += "#include \"" + specs[0].header + "\"\n";
  // Lines of the source keep their numbers in errors and reports.
  if (!specs[0].source.empty()) text += "#line 1 \"<source>\"\n" + specs[0].source + "\n";
  for (std::size_t i = 0; i < specs.size(); ++i) {
    text += "TK_INTERPRETER_ENTRY(" + entry_name(i) + ", (" + specs[i].params_type + "), (" +
            specs[i].function + "))\n";
  }
  return text;
}

// A folder of this process alone, gone when it is not needed any more.
struct TemporaryFolder {
  std::string path;
  TemporaryFolder() {
    std::string name = (fs::temp_directory_path() / "tk_jax_XXXXXX").string();
    if (mkdtemp(name.data()) != nullptr) path = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    if (!path.empty()) fs::remove_all(path, ignored);
  }
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), std::istream_iterator<std::string>()};
}

// Runs a command; its exit status, or -1. What it says goes to the file `log`.
int run_command(const std::vector<std::string>& command, const std::string& log) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t pid = 0;
  const int failed = posix_spawnp(&pid, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) return -1;
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool on_path(const std::string& program) {
  if (program.find('/') != std::string::npos) return access(program.c_str(), X_OK) == 0;
  std::istringstream path(runtime::environment("PATH"));
  for (std::string folder; std::getline(path, folder, ':');) {
    if (access((folder + "/" + program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

// What the compiler calls itself: kernels of another are not taken from the cache.
std::string version_of(const std::string& compiler, const TemporaryFolder& folder) {
  std::vector<std::string> command = words(compiler);
  command.push_back("--version");
  const std::string log = folder.path + "/version";
  return run_command(command, log) == 0 ? read_file(log) : "";
}

Result<std::string> build(std::span<const KernelSpec> specs, const std::string& text,
                          const std::string& compiler, const TemporaryFolder& folder) {
  const std::string root = runtime::settings().source_root;
  const std::string source = folder.path + "/" + specs[0].symbol + ".cc";
  const std::string library = folder.path + "/kernel.so", log = folder.path + "/log";
  std::ofstream(source, std::ios::binary) << text;
  std::vector<std::string> command = words(compiler);
  command.insert(command.end(), std::begin(kOptions), std::end(kOptions));
  for (const std::string& word :
       {"-I" + root, "-I" + root + "/include", source, std::string("-o"), library}) {
    command.push_back(word);
  }
  if (const int status = run_command(command, log); status != 0) {
    return Error{ErrorKind::kInvalidArgument, "kernel " + specs[0].symbol +
                                                  ": the host's C++ compiler (" + compiler +
                                                  ") fails:\n" + read_file(log)};
  }
  return read_file(library);
}

// The engine's functions become visible to libraries that are opened from now on.
Status show_engine() {
  static const bool shown = [] {
    Dl_info here;
    return dladdr(reinterpret_cast<void*>(&show_engine), &here) != 0 &&
           dlopen(here.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD) != nullptr;
  }();
  if (shown) return {};
  return Error{ErrorKind::kInternal, "the interpreter's library does not find itself"};
}

// Opens a library that is a string, for good.
Result<void*> open_library(const std::string& bytes) {
  if (Status status = show_engine(); !status.ok()) return status.error();
  const int file = memfd_create("tk_jax_kernel", MFD_CLOEXEC);
  std::size_t done = 0;
  while (file >= 0 && done < bytes.size()) {
    const ssize_t count = write(file, bytes.data() + done, bytes.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    done += static_cast<std::size_t>(count);
  }
  void* library = nullptr;
  std::string problem;
  if (file < 0 || done < bytes.size()) {
    problem = std::strerror(errno);
  } else {
    library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) problem = dlerror();
  }
  // The descriptor stays open: a number that is used again would look like the same library.
  if (library != nullptr) return library;
  if (file >= 0) close(file);
  return Error{ErrorKind::kInternal, "a compiled kernel cannot be loaded: " + problem};
}

}  // namespace

std::string host_compiler() {
  for (const char* variable : {"TK_JAX_CXX", "CXX"}) {
    if (std::string chosen = runtime::environment(variable); !chosen.empty()) return chosen;
  }
  for (const char* name : {"c++", "g++", "clang++"}) {
    if (on_path(name)) return name;
  }
  return "";
}

Status compile_specialisations(std::span<const KernelSpec> specs) {
  if (specs.empty()) return {};
  for (const KernelSpec& spec : specs) {
    if (Status status = runtime::check_spec(spec); !status.ok()) return status;
    if (spec.header != specs[0].header || spec.source != specs[0].source) {
      return Error{ErrorKind::kInvalidArgument,
                   "kernels that are compiled together share header and source"};
    }
  }
  const std::string compiler = host_compiler();
  if (compiler.empty()) {
    return Error{ErrorKind::kUnsupported,
                 "the interpreter was built without " + specs[0].function +
                     ", and no C++ compiler is found to compile it: install g++ 12 or clang 14, "
                     "or later, or name one in CXX"};
  }
  const TemporaryFolder folder;
  if (folder.path.empty()) {
    return Error{ErrorKind::kInternal, std::string("no temporary folder: ") + std::strerror(errno)};
  }
  const auto sources = runtime::source_digest(runtime::settings());
  if (!sources.ok()) return sources.error();
  const std::string text = translation_unit(specs);
  runtime::Sha256 hash;
  hash.update_field("interpreter");
  hash.update_field(*sources);
  hash.update_field(text);
  for (const char* option : kOptions) hash.update_field(option);
  hash.update_field(compiler);
  hash.update_field(version_of(compiler, folder));
  const std::string key = hash.hex_digest();

  std::string bytes;
  if (auto entry = runtime::read_cache(key)) {
    bytes = std::move(entry->cubin);
  } else {
    auto built = build(specs, text, compiler, folder);
    if (!built.ok()) return built.error();
    bytes = std::move(*built);
    runtime::write_cache(key, {bytes, ""});
  }
  const auto library = open_library(bytes);
  if (!library.ok()) return library.error();
  for (std::size_t i = 0; i < specs.size(); ++i) {
    void* entry = dlsym(*library, entry_name(i).c_str());
    if (entry == nullptr) return Error{ErrorKind::kInternal, "no entry in a compiled kernel"};
    register_specialisation({specs[i].header, specs[i].source, specs[i].function},
                            reinterpret_cast<void (*)(const void*)>(entry));
  }
  return {};
}

}  // namespace tk::interpreter
