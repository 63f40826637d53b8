#include "interpreter/crew.h"

#include <sched.h>

#include <algorithm>

namespace tk::interpreter {
namespace {

// Batches follow each other within microseconds, sooner than a thread that sleeps wakes up.
constexpr int kSpins = 2000;

template <typename T>
void wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

Crew::Crew(int threads) {
  for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

Crew::~Crew() {
  over_ = true;
  batch_.fetch_add(1, std::memory_order_release);
  batch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Crew::run(std::size_t count, const std::function<void(std::size_t)>& job) {
  if (threads_.empty() || count < 2) {
    for (std::size_t i = 0; i < count; ++i) job(i);
    return;
  }
  job_ = &job;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
  batch_.fetch_add(1, std::memory_order_release);
  batch_.notify_all();
  take_jobs();
  for (int busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) wait_while(busy_, busy);
}

void Crew::work() {
  for (unsigned batch = 0;; ++batch) {
    wait_while(batch_, batch);
    if (over_) return;
    take_jobs();
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_all();
  }
}

void Crew::take_jobs() {
  for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*job_)(i);
}

}  // namespace tk::interpreter
