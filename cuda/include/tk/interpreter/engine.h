// What the interpreter's operations ask of its engine (cuda/interpreter): who they are, what memory
// they may touch, and when asynchronous work gets done.
//
// A warp is a fibre. Every function here acts for the warp that is running.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "tk/base.cuh"
#include "tk/location.h"
#include "tk/tensor_map.h"

// Kernels that are compiled later, into libraries of their own, find these.
#pragma GCC visibility push(default)

namespace tk::interpreter {

enum class FaultKind {
  kBusyRegisters,       // registers touched while a product in flight owns them
  kUndefinedRegisters,  // registers read that nobody wrote
  kUnfinishedVector,    // a row or column vector whose lanes were not brought together
  kSharedUnwritten,     // shared memory read that nobody wrote
  kSharedReadEarly,     // shared memory read before what was written there is known to be
  kSharedOverwritten,   // shared memory written while somebody may still use what was there
  kMissingFence,        // the async proxy sees memory that was not published to it
  kBarrier,             // an mbarrier is misused
  kNamedBarrier,        // a named barrier is misused
  kDeadlock,
  kOutOfBounds,
  kGlobalUnwritten,  // global memory read that nobody wrote
  kGlobalRace,       // accesses to global memory that nothing orders
  kLostWrite,        // a copy overwrites another block's, which nobody has read
  kInFlightAtExit,   // a block exits before its operations are done
  kTensorMap,        // a tensor map does not fit its array or the tile
  kLanes,            // all lanes of a warp do what one should
  kBudget,           // more shared memory or registers than the launch gives
};
const char* fault_name(FaultKind kind);

// Ends the launch with a report.
[[noreturn]] void fail(FaultKind kind, const std::string& message, Location at);
// The same where nothing may be thrown; the launch ends at the warp's next operation.
void fail_later(FaultKind kind, const std::string& message, Location at) noexcept;

// -- Who ------------------------------------------------------------------------------------------
int warp_index();
int block_index(int axis);
int block_count(int axis);
int cluster_rank();
// For reports ("consumer 1"), with the registers of a thread.
void enter_role(std::string role, int registers);
// One lane acts for the warp until the next operation that takes all of them.
void act_as_one_lane();
void act_as_warp();
// Fails where 32 lanes would each do it.
void require_one_lane(const char* what, Location at);

// -- Shared memory --------------------------------------------------------------------------------
// Memory is tracked in chunks of this many bytes, which swizzling keeps whole.
constexpr int kChunkBytes = 16;
using Chunks = std::vector<uint32>;  // chunk numbers within the block's shared memory

// The block's memory, aligned as shared tiles want it.
std::byte* shared_base(std::size_t bytes_used, Location at);
std::byte* shared_pointer(uint32 address);
uint32 shared_address(const void* pointer);
Chunks chunks_of(uint32 address, int bytes);

// Ordinary accesses by the running warp; other warps may run before they happen.
void read_shared(const Chunks& chunks, const char* what, Location at);
void write_shared(const Chunks& chunks, const char* what, Location at);
// The same by one lane, or by several.
void read_shared_alone(const Chunks& chunks, const char* what, Location at);
void write_shared_alone(const Chunks& chunks, const char* what, Location at);
void publish_shared(Location at);

// -- Global memory --------------------------------------------------------------------------------
struct GlobalSpan {
  const void* begin;
  std::size_t bytes;
};
// Ordinary accesses by the running warp. `store` writes, when no other block does anything.
void read_global(std::span<const GlobalSpan> spans, Location at);
// The same by one lane or by all, whoever acts.
void read_global_alone(std::span<const GlobalSpan> spans, Location at);
void write_global(std::span<const GlobalSpan> spans, const std::function<void()>& store,
                  Location at);
void publish_global(Location at);
void reset_turns(int* counter, Location at);
void take_turn(const int* counter, int turn, Location at);
void pass_turn(int* counter, Location at);
int take_number(int* counter, Location at);
void wait_for_numbers(const int* counter, int count, Location at);

// -- Barriers -------------------------------------------------------------------------------------
void barrier_init(uint32 barrier, int arrivals, Location at);
void barrier_arrive(uint32 barrier, int block, Location at);  // block: -1 for one's own
void barrier_expect(uint32 barrier, int bytes, Location at);
void barrier_wait(uint32 barrier, uint32 phase, Location at);
void publish_barriers(Location at);
void named_barrier(int id, int threads, bool waits, Location at);
void block_sync(Location at);
void cluster_sync(Location at);
void warp_sync(Location at);

// -- Products -------------------------------------------------------------------------------------
// Registers that a product writes or reads while it is in flight.
struct RegisterRange {
  const void* begin;
  std::size_t bytes;
  int registers;  // of a thread
};
struct Product {
  RegisterRange acc;
  RegisterRange operand;  // begin is null where A comes from shared memory
  Chunks shared;
  std::function<void()> compute;
};
void issue_product(Product product, Location at);
void commit_products(Location at);
void wait_products(int pending, std::span<const void* const> tiles, Location at);

// Fails where a product in flight owns the registers. `begin` is an object's address.
void check_registers(const void* begin, const char* what, Location at);
// At the end of a tile's life.
void forget_registers(const void* begin) noexcept;

// -- Copies ---------------------------------------------------------------------------------------
// A panel of a shared tile.
struct Panel {
  uint32 address;
  int rows, columns, element_bytes, swizzle;
};
void load_box(const Panel& panel, const TensorMap& map, uint32 barrier, uint32 blocks,
              std::span<const int> coordinates, Location at);  // blocks: 0 for one's own
void store_box(const TensorMap& map, const Panel& panel, std::span<const int> coordinates, bool add,
               Location at);
void load_bytes(uint32 address, const void* from, int bytes, uint32 barrier, Location at);
void store_bytes(void* to, uint32 address, int bytes, bool add, Location at);
void commit_copies(Location at);
void wait_copies(int pending, bool only_read, Location at);
void check_tensor_map(const TensorMap& map, Location at);

}  // namespace tk::interpreter

#pragma GCC visibility pop
