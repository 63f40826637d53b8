// Where the runtime finds things. Set from Python at import; read when a kernel is not loaded yet.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tk::runtime {

// A header below the source root that handlers were compiled with, as kernels have to be.
struct HostHeader {
  std::string_view path;
  std::string_view digest;  // of its bytes: SHA-256
};

struct Settings {
  std::string source_root;  // holds include/ and kernels/
  std::span<const HostHeader> host_headers;
  std::vector<std::string> shipped_dirs;  // cubins compiled beforehand, in order
  std::vector<std::string> nvrtc_paths;   // folders that may hold libnvrtc, in order
  std::optional<std::string> cache_dir;   // unset: from the environment; empty: no cache
};

Settings settings();

void set_source_root(std::string path);
void set_host_headers(std::span<const HostHeader> headers);  // not copied
void set_shipped_dirs(std::vector<std::string> folders);
void set_nvrtc_paths(std::vector<std::string> folders);
void set_cache_dir(std::optional<std::string> path);

// The value of an environment variable, or an empty string.
std::string environment(const char* name);

// Prints "tk_jax: warning: <message>" to stderr, once for each message.
void warn_once(const std::string& message);

}  // namespace tk::runtime
