// Threads that share out numbered jobs, one batch after another.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

namespace tk::interpreter {

// As many processors as this process may use.
int available_processors();

class Crew {
 public:
  // With fewer than two threads, jobs run on the caller's.
  explicit Crew(int threads);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Calls job(0) .. job(count - 1), in any order and at once; returns when all are done. Jobs may
  // not throw.
  void run(std::size_t count, const std::function<void(std::size_t)>& job);

 private:
  void work();
  void take_jobs();

  std::vector<std::thread> threads_;  // beside the caller's
  const std::function<void(std::size_t)>* job_ = nullptr;
  std::size_t count_ = 0;
  std::atomic<std::size_t> next_{0};
  std::atomic<unsigned> batch_{0};  // raised when there is work, or when it is over
  std::atomic<int> busy_{0};        // threads that have not finished the batch
  bool over_ = false;
};

}  // namespace tk::interpreter
