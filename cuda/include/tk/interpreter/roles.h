// What a block gives its roles: shared memory, and registers by role.
#pragma once

#include "tk/interpreter/engine.h"

namespace tk::block {

template <typename Shared>
Shared& shared_memory(Location at = {}) {
  return *reinterpret_cast<Shared*>(interpreter::shared_base(sizeof(Shared), at));
}

template <int kRegisters>
void become_producer() {
  const int warp = interpreter::warp_index();
  interpreter::enter_role(warp == 0 ? "load" : warp == 1 ? "store" : "idle", kRegisters);
}
template <int kRegisters>
void become_consumer(int consumer) {
  interpreter::enter_role("consumer " + std::to_string(consumer), kRegisters);
}
template <int kRegisters>
void become_helper(int consumer) {
  become_consumer<kRegisters>(consumer);
}

}  // namespace tk::block
