// Compiled kernels on disk: one file for each, safe among processes, checked when read.
//
// Loading an entry runs it on the GPU, so entries are read only from a folder that belongs to the
// user and that nobody else can write to, and each carries the digest of its content.
#pragma once

#include <optional>
#include <string>

#include "runtime/status.h"

namespace tk::runtime {

struct CacheEntry {
  std::string cubin;
  std::string log;
};

struct CacheInfo {
  std::string path;     // empty where there is none
  bool usable = false;  // entries can be read
  std::string problem;  // why not
};

// The folder in force: set_cache_dir, else TK_JAX_CACHE_DIR ("off" for none), else
// $XDG_CACHE_HOME/tk_jax, else ~/.cache/tk_jax. Creates it where it is missing.
CacheInfo cache_info();

// The entry for `key`, or nothing where it is missing, damaged or not to be trusted. An unusable
// folder is reported once on stderr.
std::optional<CacheEntry> read_cache(const std::string& key);

// Adds an entry in one step, so that no reader sees half of it. Failing to is not an error: the
// next process compiles again.
void write_cache(const std::string& key, const CacheEntry& entry);

// The same file format in a folder that came with the package, or that the user names.
std::optional<CacheEntry> read_shipped(const std::string& folder, const std::string& key);
Status write_shipped(const std::string& folder, const std::string& key, const CacheEntry& entry);

}  // namespace tk::runtime
