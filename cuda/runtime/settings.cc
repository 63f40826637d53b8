#include "runtime/settings.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <utility>

namespace tk::runtime {
namespace {

std::mutex mutex;

Settings& storage() {
  static Settings* instance = new Settings;
  return *instance;
}

}  // namespace

Settings settings() {
  std::lock_guard lock(mutex);
  return storage();
}

void set_source_root(std::string path) {
  std::lock_guard lock(mutex);
  storage().source_root = std::move(path);
}

void set_host_headers(std::span<const HostHeader> headers) {
  std::lock_guard lock(mutex);
  storage().host_headers = headers;
}

void set_shipped_dirs(std::vector<std::string> folders) {
  std::lock_guard lock(mutex);
  storage().shipped_dirs = std::move(folders);
}

void set_nvrtc_paths(std::vector<std::string> folders) {
  std::lock_guard lock(mutex);
  storage().nvrtc_paths = std::move(folders);
}

void set_cache_dir(std::optional<std::string> path) {
  std::lock_guard lock(mutex);
  storage().cache_dir = std::move(path);
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

void warn_once(const std::string& message) {
  static std::set<std::string>* seen = new std::set<std::string>;
  std::lock_guard lock(mutex);
  if (seen->insert(message).second) {
    std::fprintf(stderr, "tk_jax: warning: %s\n", message.c_str());
  }
}

}  // namespace tk::runtime
