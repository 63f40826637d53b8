// Kernels loaded on a device, found again without a lock.
#pragma once

#include <array>
#include <atomic>
#include <mutex>
#include <utility>

#include "runtime/driver.h"
#include "runtime/kernel_spec.h"
#include "runtime/status.h"

namespace tk::runtime {

struct Kernel {
  cuda::Function function = nullptr;
  int threads = 0;
  int shared_bytes = 0;
  int cluster_size = 1;
};

// Compiles or finds the cubin and loads it on the device, whose context becomes current meanwhile.
Result<Kernel> load_kernel(const KernelSpec& spec, const Device& device);

// The kernels that one FFI target has loaded so far, by specialisation and device. Entries are
// only ever added, at the head of a bucket's list: readers need no lock, pointers stay good.
// Key has operator== and a hash_value found by argument-dependent look-up.
template <typename Key>
class KernelTable {
 public:
  const Kernel* find(const Key& key, int device) const {
    const auto& head = buckets_[hash_value(key) % kBuckets];
    for (const Node* node = head.load(std::memory_order_acquire); node; node = node->next) {
      if (node->device == device && node->key == key) return &node->kernel;
    }
    return nullptr;
  }

  // Loads what is not there yet. Only then is make_spec() called, which returns the spec or why
  // there can be none.
  template <typename MakeSpec>
  Result<const Kernel*> load(const Key& key, const Device& device, MakeSpec&& make_spec) {
    if (const Kernel* kernel = find(key, device.ordinal)) return kernel;
    std::lock_guard lock(mutex_);
    if (const Kernel* kernel = find(key, device.ordinal)) return kernel;
    const Result<KernelSpec> spec = make_spec();
    if (!spec.ok()) return spec.error();
    auto kernel = load_kernel(*spec, device);
    if (!kernel.ok()) return kernel.error();
    auto& head = buckets_[hash_value(key) % kBuckets];
    Node* node = new Node{key, device.ordinal, *kernel, head.load(std::memory_order_relaxed)};
    head.store(node, std::memory_order_release);
    return &node->kernel;
  }

 private:
  struct Node {
    Key key;
    int device;
    Kernel kernel;
    const Node* next;
  };
  static constexpr std::size_t kBuckets = 64;

  std::array<std::atomic<const Node*>, kBuckets> buckets_ = {};
  std::mutex mutex_;
};

}  // namespace tk::runtime
