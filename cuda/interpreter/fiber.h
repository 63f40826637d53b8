// A function with a stack of its own, run a part at a time.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>

namespace tk::interpreter {

class Fiber {
 public:
  explicit Fiber(std::function<void()> body);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the body until it suspends itself or returns. It may not throw.
  void resume();
  // Called by the body: back to whoever resumed it.
  void suspend();
  bool finished() const { return finished_; }

 private:
  static void enter(unsigned low, unsigned high);

  std::function<void()> body_;
  void* stack_;
  ucontext_t context_;
  ucontext_t caller_;
  bool finished_ = false;
};

}  // namespace tk::interpreter
