#include "runtime/kernel_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <utility>

#include "runtime/settings.h"
#include "runtime/sha256.h"

namespace tk::runtime {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "tk_jax kernel 1\n";
constexpr const char* kExtension = ".tkcubin";
constexpr std::size_t kDigestSize = 64;
constexpr off_t kMaxEntryBytes = off_t{256} << 20;

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  FileDescriptor(FileDescriptor&& other) : fd_(std::exchange(other.fd_, -1)) {}
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  bool open() const { return fd_ >= 0; }
  int get() const { return fd_; }

 private:
  int fd_;
};

// -- The file format: magic, digest of the rest, key, the log's size, log, cubin ------------------

std::string serialize(const std::string& key, const CacheEntry& entry) {
  const std::string body =
      key + "\n" + std::to_string(entry.log.size()) + "\n" + entry.log + entry.cubin;
  return std::string(kMagic) + sha256_hex(body) + "\n" + body;
}

std::optional<CacheEntry> parse(const std::string& key, std::string_view text) {
  if (!text.starts_with(kMagic)) return std::nullopt;
  text.remove_prefix(kMagic.size());
  if (text.size() < kDigestSize + 1) return std::nullopt;
  const std::string_view digest = text.substr(0, kDigestSize);
  text.remove_prefix(kDigestSize + 1);
  if (sha256_hex(text) != digest) return std::nullopt;

  // The digest covers the key: a file renamed to another kernel's name is refused here.
  if (!text.starts_with(key + "\n")) return std::nullopt;
  text.remove_prefix(key.size() + 1);
  std::size_t log_size = 0;
  std::size_t position = 0;
  while (position < text.size() && text[position] >= '0' && text[position] <= '9') {
    log_size = log_size * 10 + static_cast<std::size_t>(text[position++] - '0');
  }
  if (position == 0 || position >= text.size() || text[position] != '\n') return std::nullopt;
  text.remove_prefix(position + 1);
  if (log_size > text.size()) return std::nullopt;
  return CacheEntry{std::string(text.substr(log_size)), std::string(text.substr(0, log_size))};
}

std::optional<std::string> read_all(int fd) {
  struct stat info;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size > kMaxEntryBytes) {
    return std::nullopt;
  }
  std::string text(static_cast<std::size_t>(info.st_size), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t count = read(fd, text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return std::nullopt;
    done += static_cast<std::size_t>(count);
  }
  return text;
}

bool write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = write(fd, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    text.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

bool written_by_owner_only(const struct stat& info) {
  return info.st_uid == geteuid() && (info.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

// -- The folder -----------------------------------------------------------------------------------

// In one step, so that no reader sees half of it. Says why it cannot be written.
std::string write_entry(const FileDescriptor& folder, const std::string& key,
                        const CacheEntry& entry, mode_t mode) {
  static std::atomic<int> counter = 0;
  const std::string temporary =
      "." + key + "." + std::to_string(getpid()) + "." + std::to_string(counter++) + ".tmp";
  const FileDescriptor file(openat(folder.get(), temporary.c_str(),
                                   O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode));
  const bool written =
      file.open() && write_all(file.get(), serialize(key, entry)) &&
      renameat(folder.get(), temporary.c_str(), folder.get(), (key + kExtension).c_str()) == 0;
  if (written) return "";
  const std::string reason = std::strerror(errno);
  if (file.open()) unlinkat(folder.get(), temporary.c_str(), 0);
  return reason;
}

std::string chosen_path() {
  std::string path = settings().cache_dir.value_or(environment("TK_JAX_CACHE_DIR"));
  if (settings().cache_dir.has_value() || !path.empty()) return path == "off" ? "" : path;
  path = environment("XDG_CACHE_HOME");
  if (!path.empty()) return path + "/tk_jax";
  path = environment("HOME");
  return path.empty() ? "" : path + "/.cache/tk_jax";
}

// Creates the missing part of `path`, for the user alone.
void create_folders(const fs::path& path) {
  fs::path partial;
  for (const fs::path& part : path) {
    partial /= part;
    mkdir(partial.c_str(), 0700);
  }
}

// Opens the folder and checks the opened folder itself, so that nothing can be swapped in between.
FileDescriptor open_folder(CacheInfo& info) {
  info.path = chosen_path();
  if (info.path.empty()) {
    info.problem = "turned off, or neither TK_JAX_CACHE_DIR nor HOME is set";
    return FileDescriptor(-1);
  }
  create_folders(info.path);
  FileDescriptor folder(open(info.path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat status;
  if (!folder.open() || fstat(folder.get(), &status) != 0) {
    info.problem = std::strerror(errno);
    return FileDescriptor(-1);
  }
  if (!written_by_owner_only(status)) {
    info.problem = status.st_uid != geteuid()
                       ? "it belongs to another user"
                       : "other users can write to it (chmod go-w fixes that)";
    return FileDescriptor(-1);
  }
  info.usable = true;
  return folder;
}

void warn_unusable(const CacheInfo& info) {
  if (info.path.empty()) return;
  warn_once("the kernel cache " + info.path + " is not used: " + info.problem +
            ". Kernels are compiled again in every process; set TK_JAX_CACHE_DIR to a folder of "
            "your own.");
}

}  // namespace

CacheInfo cache_info() {
  CacheInfo info;
  open_folder(info);
  return info;
}

std::optional<CacheEntry> read_cache(const std::string& key) {
  CacheInfo info;
  const FileDescriptor folder = open_folder(info);
  if (!folder.open()) {
    warn_unusable(info);
    return std::nullopt;
  }
  const FileDescriptor file(
      openat(folder.get(), (key + kExtension).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  struct stat status;
  if (!file.open() || fstat(file.get(), &status) != 0 || !written_by_owner_only(status)) {
    return std::nullopt;
  }
  const std::optional<std::string> text = read_all(file.get());
  return text ? parse(key, *text) : std::nullopt;
}

void write_cache(const std::string& key, const CacheEntry& entry) {
  CacheInfo info;
  const FileDescriptor folder = open_folder(info);
  if (!folder.open()) return;
  const std::string reason = write_entry(folder, key, entry, 0600);
  if (reason.empty()) return;
  warn_once("compiled kernels cannot be kept in " + info.path + ": " + reason +
            ". They are compiled again in every process.");
}

std::optional<CacheEntry> read_shipped(const std::string& folder, const std::string& key) {
  const std::string path = folder + "/" + key + kExtension;
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.open()) return std::nullopt;
  const std::optional<std::string> text = read_all(file.get());
  return text ? parse(key, *text) : std::nullopt;
}

Status write_shipped(const std::string& folder, const std::string& key, const CacheEntry& entry) {
  const auto failed = [&](const std::string& reason) {
    return Error{ErrorKind::kFailedPrecondition,
                 "compiled kernels cannot be written to " + folder + ": " + reason};
  };
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) return failed(error.message());
  const FileDescriptor opened(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!opened.open()) return failed(std::strerror(errno));
  const std::string reason = write_entry(opened, key, entry, 0644);
  return reason.empty() ? Status() : failed(reason);
}

}  // namespace tk::runtime
