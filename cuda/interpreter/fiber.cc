#include "interpreter/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

namespace tk::interpreter {
namespace {

// Register tiles live on it; pages that nobody touches cost nothing.
constexpr std::size_t kStackBytes = 2 << 20;
constexpr std::size_t kGuardBytes = 4096;

// Stacks of fibres that are gone, for those to come.
struct StackPool {
  std::vector<void*> free;
  ~StackPool() {
    for (void* stack : free) munmap(stack, kStackBytes);
  }
};
thread_local StackPool pool;

void* take_stack() {
  if (!pool.free.empty()) {
    void* stack = pool.free.back();
    pool.free.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, kGuardBytes, PROT_NONE);
  return stack;
}

}  // namespace

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)), stack_(take_stack()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::enter), 2,
              static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
}

Fiber::~Fiber() { pool.free.push_back(stack_); }

void Fiber::enter(unsigned low, unsigned high) {
  auto* self = reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(low) |
                                        static_cast<std::uintptr_t>(high) << 32);
  self->body_();
  self->finished_ = true;
  swapcontext(&self->context_, &self->caller_);
}

void Fiber::resume() { swapcontext(&caller_, &context_); }

void Fiber::suspend() { swapcontext(&context_, &caller_); }

}  // namespace tk::interpreter
