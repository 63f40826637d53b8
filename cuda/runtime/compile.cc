#include "runtime/compile.h"

#include <chrono>

#include "runtime/kernel_cache.h"
#include "runtime/nvrtc.h"
#include "runtime/settings.h"
#include "runtime/sha256.h"

namespace tk::runtime {
namespace {

Result<std::string> shipped_key(const KernelSpec& spec) {
  const Settings now = settings();
  if (now.source_root.empty()) {
    return Error{ErrorKind::kInternal, "the kernels' source folder was never set"};
  }
  const auto sources = source_digest(now);
  if (!sources.ok()) return sources.error();
  Sha256 hash;
  hash.update_field(*sources);
  hash.update_field(translation_unit(spec));
  for (const std::string& option : compile_options()) hash.update_field(option);
  return hash.hex_digest();
}

std::string cache_key(const std::string& shipped, const NvrtcVersion& version) {
  Sha256 hash;
  hash.update_field(shipped);
  hash.update_field(std::to_string(version.major) + "." + std::to_string(version.minor));
  return hash.hex_digest();
}

}  // namespace

Result<KernelKeys> kernel_keys(const KernelSpec& spec) {
  const auto shipped = shipped_key(spec);
  if (!shipped.ok()) return shipped.error();
  const auto version = nvrtc_version();
  if (!version.ok()) return version.error();
  return KernelKeys{*shipped, cache_key(*shipped, *version)};
}

Result<Compiled> compile(const KernelSpec& spec, Lookup lookup) {
  const auto start = std::chrono::steady_clock::now();
  const auto finish = [&](std::string cubin, std::string log, Origin origin) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return Compiled{std::move(cubin), std::move(log), elapsed.count(), origin};
  };
  if (const Status status = check_spec(spec); !status.ok()) return status.error();
  const auto shipped = shipped_key(spec);
  if (!shipped.ok()) return shipped.error();

  // Shipped cubins come first and need no compiler at all.
  if (lookup == Lookup::kAllowed) {
    for (const std::string& folder : settings().shipped_dirs) {
      if (auto entry = read_shipped(folder, *shipped)) {
        return finish(std::move(entry->cubin), std::move(entry->log), Origin::kShipped);
      }
    }
  }
  const auto version = nvrtc_version();
  if (!version.ok()) return version.error();
  const std::string key = cache_key(*shipped, *version);
  if (lookup == Lookup::kAllowed) {
    if (auto entry = read_cache(key)) {
      return finish(std::move(entry->cubin), std::move(entry->log), Origin::kCache);
    }
  }
  const std::string root = settings().source_root;
  std::vector<std::string> options = compile_options();
  options.push_back("--include-path=" + root + "/include");
  options.push_back("--include-path=" + root);
  // The compiler looks for headers beside the file that includes them first: without a folder in
  // its name, that would be wherever the process was started.
  const std::string name = root + "/" + spec.symbol + ".cu";
  auto output = nvrtc_compile(translation_unit(spec), name, options);
  if (!output.ok()) return output.error();
  write_cache(key, {output->cubin, output->log});
  return finish(std::move(output->cubin), std::move(output->log), Origin::kCompiled);
}

Result<Compiled> ship(const KernelSpec& spec, const std::string& folder, Lookup lookup) {
  auto compiled = compile(spec, lookup);
  if (!compiled.ok()) return compiled.error();
  const auto key = shipped_key(spec);
  if (!key.ok()) return key.error();
  const Status written = write_shipped(folder, *key, {compiled->cubin, compiled->log});
  if (!written.ok()) return written.error();
  return compiled;
}

}  // namespace tk::runtime
