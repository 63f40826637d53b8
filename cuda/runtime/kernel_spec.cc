#include "runtime/kernel_spec.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <regex>
#include <string_view>

#include "runtime/sha256.h"

namespace tk::runtime {
namespace {

namespace fs = std::filesystem;

bool is_identifier(const std::string& text) {
  if (text.empty() || std::isdigit(static_cast<unsigned char>(text[0]))) return false;
  return std::all_of(text.begin(), text.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '_'; });
}

// Characters of a qualified name with template arguments, and no others.
bool is_name_expression(const std::string& text) {
  if (text.empty()) return false;
  return std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) || std::string_view("_:<>, -.").find(c) != std::string_view::npos;
  });
}

// Whether a path stays below the folders that the source digest covers.
bool is_covered(std::string_view path) {
  return !path.starts_with('/') && path.find("..") == std::string_view::npos;
}

// The first line of the text that includes a file outside of the sources, or nothing: a change to
// that file would go unnoticed, and an old kernel be found under the same key.
std::string outside_include(const std::string& text) {
  static const std::regex pattern(R"(^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]*))",
                                  std::regex::ECMAScript | std::regex::multiline);
  for (std::sregex_iterator it(text.begin(), text.end(), pattern), end; it != end; ++it) {
    if (!is_covered((*it)[1].str())) return it->str();
  }
  return "";
}

// A header that is not listed is the kernels' alone.
bool is_changed(std::span<const HostHeader> headers, std::string_view path, std::string_view text) {
  const auto found = std::find_if(headers.begin(), headers.end(),
                                  [&](const HostHeader& header) { return header.path == path; });
  return found != headers.end() && found->digest != sha256_hex(text);
}

Error invalid(const KernelSpec& spec, const std::string& what) {
  return {ErrorKind::kInvalidArgument, "kernel " + spec.symbol + ": " + what};
}

}  // namespace

std::size_t hash_value(const KernelSpec& spec) {
  const std::hash<std::string> hash;
  std::size_t value = hash(spec.symbol);
  for (const std::string* text : {&spec.header, &spec.source, &spec.function, &spec.params_type}) {
    value = value * 31 + hash(*text);
  }
  for (const int number : {spec.threads, spec.shared_bytes, spec.cluster_size, spec.min_blocks}) {
    value = value * 31 + static_cast<std::size_t>(number);
  }
  return value;
}

Status check_spec(const KernelSpec& spec) {
  if (!is_identifier(spec.symbol)) return invalid(spec, "the symbol is not an identifier");
  if (!is_name_expression(spec.function)) {
    return invalid(spec, "the function is not a name expression: " + spec.function);
  }
  if (!is_name_expression(spec.params_type)) {
    return invalid(spec, "the parameter type is not a name: " + spec.params_type);
  }
  if (spec.header.find_first_of("\"\n\\") != std::string::npos || !is_covered(spec.header)) {
    return invalid(spec, "the header is not a path below the kernels' sources: " + spec.header);
  }
  if (const std::string line = outside_include(spec.source); !line.empty()) {
    return invalid(spec, "the source includes a file of its own (" + line +
                             "); pass that file's text instead");
  }
  if (spec.header.empty() && spec.source.empty()) {
    return invalid(spec, "neither a header nor source text is given");
  }
  if (spec.threads < 32 || spec.threads > 1024 || spec.threads % 32 != 0) {
    return invalid(spec, "threads is " + std::to_string(spec.threads) +
                             "; expected a multiple of 32 from 32 to 1024");
  }
  if (spec.shared_bytes < 0 || spec.shared_bytes > kMaxSharedBytes) {
    return invalid(spec, "needs " + std::to_string(spec.shared_bytes) +
                             " bytes of shared memory; a block has " +
                             std::to_string(kMaxSharedBytes));
  }
  if (spec.cluster_size < 1 || spec.cluster_size > 8) {
    return invalid(spec,
                   "cluster_size is " + std::to_string(spec.cluster_size) + "; expected 1 to 8");
  }
  if (spec.min_blocks < 1 || spec.min_blocks > 32) {
    return invalid(spec, "min_blocks is " + std::to_string(spec.min_blocks) + "; expected 1 to 32");
  }
  return {};
}

std::string translation_unit(const KernelSpec& spec) {
  std::string text;
  if (!spec.header.empty()) text += "#include \"" + spec.header + "\"\n";
  if (!spec.source.empty()) text += spec.source + "\n";
  text += "extern \"C\" __global__ void __launch_bounds__(" + std::to_string(spec.threads) + ", " +
          std::to_string(spec.min_blocks) + ")\n" + spec.symbol + "(const __grid_constant__ " +
          spec.params_type + " params) {\n  " + spec.function + "(params);\n}\n";
  return text;
}

std::vector<std::string> compile_options() {
  return {
      "--std=c++20",          "--gpu-architecture=sm_90a", "--device-as-default-execution-space",
      "--generate-line-info", "--ptxas-options=-v",        "--ptxas-options=--warn-on-spills"};
}

Result<std::string> source_digest(const Settings& settings) {
  const std::string& root = settings.source_root;
  std::vector<std::string> paths;
  for (const char* part : {"include", "kernels"}) {
    std::error_code error;
    const fs::path folder = fs::path(root) / part;
    for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end;
         it.increment(error)) {
      const std::string extension = it->path().extension().string();
      if (extension == ".h" || extension == ".cuh") paths.push_back(it->path().string());
    }
    if (error) {
      return Error{ErrorKind::kFailedPrecondition, "the kernels' sources cannot be read at " +
                                                       folder.string() + ": " + error.message() +
                                                       ". Reinstall tk_jax."};
    }
  }
  std::sort(paths.begin(), paths.end());
  Sha256 hash;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
    if (!file) {
      return Error{ErrorKind::kFailedPrecondition, "cannot read the kernel source " + path};
    }
    const std::string name = fs::path(path).lexically_relative(root).string();
    if (is_changed(settings.host_headers, name, text)) {
      return Error{ErrorKind::kFailedPrecondition,
                   path +
                       " has changed since tk_jax was built: kernels compiled from it would not "
                       "read their parameters as tk_jax passes them. Build tk_jax again "
                       "(`pip install --editable '.[test]'`, or `pip install .`, in the source "
                       "folder) or reinstall it."};
    }
    hash.update_field(name);
    hash.update_field(text);
  }
  return hash.hex_digest();
}

}  // namespace tk::runtime
