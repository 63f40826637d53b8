// Plain accesses to shared and global memory, and products, which own registers while they run.
#include <algorithm>

#include "interpreter/machine.h"

namespace tk::interpreter {
namespace {

Access plain_access(const char* what, Location at) {
  const Warp& warp = machine().warp();
  return {AccessKind::kPlain,   warp.plain(), warp.clock[warp.plain()], warp.published(), what, at,
          warp.block->index[0], warp.index};
}

GlobalAccess plain_global(GlobalUse use, Location at) {
  const Warp& warp = machine().warp();
  return {use, false, 0, warp.plain(), warp.clock[warp.plain()], warp.published_global(), at, ""};
}

}  // namespace

// -- Shared memory --------------------------------------------------------------------------------
std::byte* shared_base(std::size_t bytes_used, Location at) {
  Block& block = machine().block();
  constexpr std::size_t kAlignmentSlack = 1024;
  if (bytes_used + kAlignmentSlack > block.shared_bytes) {
    fail(FaultKind::kBudget,
         "the kernel uses " + std::to_string(bytes_used) +
             " bytes of shared memory and 1024 to align them; the launch gives " +
             std::to_string(block.shared_bytes),
         at);
  }
  return block.shared;
}
std::byte* shared_pointer(std::uint32_t address) { return machine().block().shared + address; }
std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(pointer) -
                                    machine().block().shared);
}
Chunks chunks_of(std::uint32_t address, int bytes) {
  Chunks chunks;
  const std::uint32_t last = (address + bytes - 1) / kChunkBytes;
  for (std::uint32_t chunk = address / kChunkBytes; chunk <= last; ++chunk) chunks.push_back(chunk);
  return chunks;
}

void read_shared(const Chunks& chunks, const char* what, Location at) {
  act_as_warp();
  read_shared_alone(chunks, what, at);
}
void read_shared_alone(const Chunks& chunks, const char* what, Location at) {
  Machine& m = machine();
  m.yield();
  m.block().shadow.read(m.cluster().log, m.warp().clock, chunks, plain_access(what, at));
}
void write_shared(const Chunks& chunks, const char* what, Location at) {
  act_as_warp();
  write_shared_alone(chunks, what, at);
}
void write_shared_alone(const Chunks& chunks, const char* what, Location at) {
  Machine& m = machine();
  m.yield();
  m.block().shadow.write(m.cluster().log, m.warp().clock, chunks, plain_access(what, at));
}
void publish_shared(Location) {
  Warp& warp = machine().warp();
  // A fence orders whatever its thread knows of, other warps' stores included.
  for (const auto& other : machine().block().warps) {
    warp.clock.raise(other->published(), warp.clock[other->plain()]);
  }
  const std::uint32_t now = warp.clock[warp.plain()];
  warp.clock.raise(warp.published(), now);
  warp.clock.raise(warp.plain(), now + 1);
}

// -- Global memory --------------------------------------------------------------------------------
void read_global(std::span<const GlobalSpan> spans, Location at) {
  act_as_warp();
  read_global_alone(spans, at);
}
void read_global_alone(std::span<const GlobalSpan> spans, Location at) {
  Machine& m = machine();
  m.yield();
  std::vector<GlobalSpan> shared;
  for (const GlobalSpan& span : spans) {
    if (m.memory().check_inside(span.begin, span.bytes, GlobalUse::kRead, at)) {
      shared.push_back(span);
    }
  }
  if (!shared.empty()) m.account(std::move(shared), plain_global(GlobalUse::kRead, at));
}
void write_global(std::span<const GlobalSpan> spans, const std::function<void()>& store,
                  Location at) {
  if (spans.empty()) return;
  Machine& m = machine();
  m.yield();
  for (const GlobalSpan& span : spans) {
    m.memory().check_inside(span.begin, span.bytes, GlobalUse::kWrite, at);
  }
  m.account({spans.begin(), spans.end()}, plain_global(GlobalUse::kWrite, at));
  m.exclusive(store, at);
}
void publish_global(Location) {
  Warp& warp = machine().warp();
  const std::uint32_t now = warp.clock[warp.plain()];
  warp.clock.raise(warp.published_global(), now);
  warp.clock.raise(warp.plain(), now + 1);
}

// -- Products -------------------------------------------------------------------------------------
void issue_product(Product product, Location at) {
  Machine& m = machine();
  act_as_warp();
  m.yield();
  Warp& warp = m.warp();
  const std::uint32_t number = warp.next_product++;
  const auto own = [&](const RegisterRange& range, bool accumulator) {
    for (OwnedRegisters& owned : warp.owned) {
      if (owned.range.begin != range.begin) continue;
      // Products that add to the same sums follow one another; operands may be read many times.
      if (owned.accumulator != accumulator) {
        fail(FaultKind::kBusyRegisters,
             std::string("a product ") + (accumulator ? "writes" : "reads") +
                 " registers that the product at " + text(owned.at) +
                 (owned.accumulator ? " writes" : " reads") + ", which nobody waited for",
             at);
      }
      owned.number = number;
      owned.at = at;
      return;
    }
    warp.owned.push_back({range, number, accumulator, at});
  };
  own(product.acc, true);
  if (product.operand.begin != nullptr) own(product.operand, false);
  int registers = 0;
  for (const OwnedRegisters& owned : warp.owned) registers += owned.range.registers;
  if (registers > warp.registers) {
    fail(FaultKind::kBudget,
         "products in flight own " + std::to_string(registers) +
             " registers of a thread; its role has " + std::to_string(warp.registers),
         at);
  }
  const Access access = {AccessKind::kProduct,
                         warp.product_reads(),
                         number,
                         0,
                         "a product reads a tile",
                         at,
                         warp.block->index[0],
                         warp.index};
  m.block().shadow.read(m.cluster().log, warp.clock, product.shared, access);
  product.shared.clear();
  warp.products.push_back({std::move(product), number, warp.product_group, false, at});
}

void commit_products(Location) { ++machine().warp().product_group; }

void wait_products(int pending, std::span<const void* const> tiles, Location) {
  Machine& m = machine();
  m.yield();
  Warp& warp = m.warp();
  while (!warp.products.empty() && warp.products.front().group + pending < warp.product_group) {
    if (!warp.products.front().computed) Machine::compute_next(warp);
    warp.clock.raise(warp.product_reads(), warp.products.front().number);
    warp.products.pop_front();
  }
  const std::uint32_t oldest =
      warp.products.empty() ? warp.next_product : warp.products.front().number;
  std::erase_if(warp.owned, [&](const OwnedRegisters& owned) {
    return owned.number < oldest &&
           std::find(tiles.begin(), tiles.end(), owned.range.begin) != tiles.end();
  });
}

void check_registers(const void* begin, const char* what, Location at) {
  const Warp& warp = machine().warp();
  for (const OwnedRegisters& owned : warp.owned) {
    if (owned.range.begin != begin) continue;
    const bool done = warp.products.empty() || owned.number < warp.products.front().number;
    fail(FaultKind::kBusyRegisters,
         std::string("registers ") + what +
             (done ? " before a wait has named them: the product at " : " while the product at ") +
             text(owned.at) +
             (done                ? " may be done, but the compiler does not know"
              : owned.accumulator ? " still writes them"
                                  : " still reads them"),
         at);
  }
}

void forget_registers(const void* begin) noexcept {
  Warp& warp = machine().warp();
  const auto owned =
      std::find_if(warp.owned.begin(), warp.owned.end(),
                   [&](const OwnedRegisters& other) { return other.range.begin == begin; });
  if (owned == warp.owned.end()) return;
  if (!warp.products.empty() && owned->number >= warp.products.front().number) {
    fail_later(FaultKind::kBusyRegisters,
               "registers go out of scope while this product still uses them", owned->at);
  }
  warp.owned.erase(owned);
}

}  // namespace tk::interpreter
