// Runs CUDA C++ kernels on the CPU: the kernels' own source, compiled by a host compiler as C++17.
//
// An OS thread runs one cluster of thread blocks at a time (usually one block); every CUDA thread is a fiber. Threads
// switch only where they wait, warp by warp, so the order in which warps get on is chosen, not measured. Warp
// collectives (shuffles, ldmatrix, mma) are exact lane by lane. Asynchronous copies and products land at the latest
// legal moment: a wait that is missing or one group short yields wrong numbers, not luck. Dynamic shared memory is
// filled with NaN and has its exact size; AddressSanitizer sees its end, ThreadSanitizer sees missing barriers.
//
//   EMULATOR_ORDER=forward|reverse|random   order of the warps, and of the lanes of a warp
//   EMULATOR_ASYNC=late|early|random        when asynchronous work lands
//   EMULATOR_SEED=n                         for random
//   EMULATOR_THREADS=n                      OS threads that share a grid's blocks
//
// A violation (deadlock, divergent collective, misaligned address, ...) ends the launch with emu::Failure.
// Not modelled: speed, registers, memory order weaker than the barriers' (use ThreadSanitizer), spinning on global
// memory (a block runs to its end before the next starts), static __shared__ variables (a compile error).
#pragma once
#include <cuda_bf16.h>  // also dim3, uint3, uint4, and empty __global__ and __device__
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "fiber.h"

#undef __shared__
#define __shared__ kernels_take_dynamic_shared_memory_only
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)
#undef __grid_constant__
#define __grid_constant__

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emu {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- options -------------------------------------------------------------------------------------------------------
enum class Order { kForward, kReverse, kRandom };
enum class Async { kLate, kEarly, kRandom };

struct Options {
  Order order = Order::kForward;
  Async async = Async::kLate;
  uint64_t seed = 1;
  int threads = 1;
};

inline std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

inline Order order_named(const std::string& name) {
  if (name == "forward") return Order::kForward;
  if (name == "reverse") return Order::kReverse;
  if (name == "random") return Order::kRandom;
  throw std::invalid_argument("order: expected forward, reverse or random, got " + name);
}

inline Async async_named(const std::string& name) {
  if (name == "late") return Async::kLate;
  if (name == "early") return Async::kEarly;
  if (name == "random") return Async::kRandom;
  throw std::invalid_argument("async: expected late, early or random, got " + name);
}

// Read from the environment once; a test may change them between launches.
inline Options& options() {
  static Options o{order_named(environment("EMULATOR_ORDER", "forward")),
                   async_named(environment("EMULATOR_ASYNC", "late")), std::stoull(environment("EMULATOR_SEED", "1")),
                   std::stoi(environment("EMULATOR_THREADS", "1"))};
  return o;
}

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- state ---------------------------------------------------------------------------------------------------------
// Groups of asynchronous work of one kind (cp.async, bulk stores, wgmma): opened, committed, waited for in order.
template <class Operation>
class AsyncGroups {
 public:
  void add(Operation op) { open_.push_back(std::move(op)); }
  void commit() {
    committed_.push_back(std::move(open_));
    open_.clear();
  }
  // The oldest group if more than `pending` are on their way.
  bool pop(size_t pending, std::vector<Operation>& group) {
    if (committed_.size() <= pending) return false;
    group = std::move(committed_.front());
    committed_.pop_front();
    return true;
  }
  bool empty() const { return committed_.empty() && open_.empty(); }
  void clear() {
    committed_.clear();
    open_.clear();
  }

 private:
  std::deque<std::vector<Operation>> committed_;
  std::vector<Operation> open_;
};

using Operation = std::function<void()>;

struct Copy {  // cp.async: `filled` bytes from `source`, zeros up to `bytes`
  void* destination;
  const void* source;
  unsigned bytes, filled;
  void operator()() const {
    if (filled < bytes) std::memset(destination, 0, bytes);
    if (filled) std::memcpy(destination, source, filled);
  }
};

struct Block;

struct Thread {
  enum State : uint8_t { kRuns, kWaits, kDone };
  Fiber fiber;
  State state = kRuns;
  const char* where = "";  // what it waits in
  int id = 0;              // inside its block
  uint3 index{};
  Block* block = nullptr;
  AsyncGroups<Copy> copies;
  AsyncGroups<Operation> stores;
  unsigned cluster_phase = 0;      // of the cluster barrier when it arrived
  bool wgmma_fenced = false;       // since its last commit
  bool grid_waited = true;         // the kernel ahead has ended as far as it knows
  std::vector<uint32_t> unfenced;  // 16-byte granules of shared memory written and not yet shown to the async proxy
};

struct Collective {  // lanes that have arrived, and their operands
  unsigned mask, here;
  const char* name;
  void* operands[32];
};

struct Warp {
  std::vector<Collective> pending;
  char token = 0;
};

struct Warpgroup {
  AsyncGroups<Operation> products;
  std::vector<char> operands;  // of the wgmma being gathered
};

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<Thread*> waiting;
  char token = 0;
};

struct Block {
  uint3 index{};
  int rank = 0;   // inside its cluster
  int alive = 0;  // threads that have not exited
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Barrier barriers[16];
  Barrier warpgroup_barriers[8];  // for the lock step of a warpgroup's collectives
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<uint16_t> unfenced;  // per granule of shared memory: 1 + the thread that wrote it
};

struct Cluster {  // what one OS thread runs
  Home home;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Block> blocks;
  int block_threads = 0, alive = 0;
  Thread* current = nullptr;
  std::function<void()> body;
  std::string failure;
  std::deque<Operation> in_flight;  // bulk copies: they land when no thread can run
  std::vector<std::pair<const void*, Thread*>> mbarrier_waits;
  Barrier barrier;  // barrier.cluster
  unsigned barrier_phase = 0;
  char launched = 0, ended = 0;
  uint64_t random_state = 1;
};

inline Cluster& cluster() {
  static thread_local Cluster c;
  return c;
}
inline Thread& self() { return *cluster().current; }
inline Block& block() { return *self().block; }

EMU_UNWATCHED inline unsigned random_bits() {
  uint64_t& s = cluster().random_state;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return static_cast<unsigned>(s >> 32);
}

// Whether asynchronous work issued now lands at once.
EMU_UNWATCHED inline bool lands_at_once() {
  return options().async == Async::kEarly || (options().async == Async::kRandom && (random_bits() & 1));
}

// Ends the launch: the thread never runs again.
[[noreturn]] EMU_UNWATCHED inline void fail(const std::string& message) {
  Cluster& c = cluster();
  if (!c.current) throw Failure(message);
  {
    Unwatched quiet;
    const uint3 b = c.current->block->index;
    c.failure = message + " [block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) +
                " thread " + std::to_string(c.current->id) + "]";
  }
  c.current->fiber.leave(c.home, true);
  std::abort();
}

// ---- shared memory -------------------------------------------------------------------------------------------------
// Addresses are 32 bits as on the GPU: an offset into the block's dynamic shared memory, or, made by mapa, 1 + the rank
// of a block of the cluster in the upper 8 bits.
constexpr int kRankShift = 24;

EMU_UNWATCHED inline uint32_t shared_address(const void* p) {
  const Block& b = block();
  const std::ptrdiff_t offset = static_cast<const unsigned char*>(p) - b.shared;
  if (offset < 0 || static_cast<size_t>(offset) > b.shared_bytes) fail("pointer outside dynamic shared memory");
  return static_cast<uint32_t>(offset);
}

EMU_UNWATCHED inline Block& block_of(uint32_t address) {
  const uint32_t rank = address >> kRankShift;
  if (rank > cluster().blocks.size()) fail("shared memory address of a block outside the cluster");
  Block& b = rank ? cluster().blocks[rank - 1] : block();
  if (b.alive == 0) fail("shared memory of a block that has exited");
  return b;
}

// The bytes at an address; the accesses themselves are the caller's, so sanitizers see them.
EMU_UNWATCHED inline unsigned char* shared_bytes(Block& b, uint32_t address, size_t bytes, unsigned alignment) {
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  if (offset % alignment)
    fail("shared memory: address " + std::to_string(offset) + " not aligned to " + std::to_string(alignment));
  if (offset + bytes > b.shared_bytes)
    fail("shared memory: address " + std::to_string(offset) + " past the end, " + std::to_string(b.shared_bytes));
  return b.shared + offset;
}
inline unsigned char* shared_bytes(uint32_t address, size_t bytes, unsigned alignment) {
  return shared_bytes(block_of(address), address, bytes, alignment);
}

// Stores by a thread are visible to TMA and wgmma (the async proxy) only after that thread's fence.proxy.async.
EMU_UNWATCHED inline void mark_unfenced(uint32_t address, size_t bytes) {
  Unwatched quiet;
  Block& b = block_of(address);
  if (&b != &block()) return;
  for (uint32_t granule = address / 16; granule <= (address + bytes - 1) / 16; ++granule) {
    b.unfenced[granule] = static_cast<uint16_t>(self().id + 1);
    self().unfenced.push_back(granule);
  }
}
EMU_UNWATCHED inline void fence_async_proxy() {
  Unwatched quiet;
  for (uint32_t granule : self().unfenced)
    if (block().unfenced[granule] == self().id + 1) block().unfenced[granule] = 0;
  self().unfenced.clear();
}
EMU_UNWATCHED inline void check_fenced(const Block& b, uint32_t offset, size_t bytes, const char* reader) {
  for (uint32_t granule = offset / 16; granule <= (offset + bytes - 1) / 16; ++granule)
    if (b.unfenced[granule])
      fail(std::string(reader) + " reads shared memory that thread " + std::to_string(b.unfenced[granule] - 1) +
           " wrote without fence.proxy.async");
}

// ---- waiting -------------------------------------------------------------------------------------------------------
EMU_UNWATCHED inline void wait_in(const char* where) {
  Unwatched quiet;
  Thread& t = self();
  t.state = Thread::kWaits;
  t.where = where;
  t.fiber.leave(cluster().home, false);
}
EMU_UNWATCHED inline void wake(Thread* t) { t->state = Thread::kRuns; }

// True for the arrival that completes the barrier; the others are queued if they wait.
EMU_UNWATCHED inline bool arrive(Barrier& b, int expected, bool waits, const char* where) {
  Unwatched quiet;
  if (b.arrived && b.expected != expected) fail(std::string(where) + ": threads disagree on the count");
  b.expected = expected;
  if (++b.arrived == expected) {
    b.arrived = 0;
    for (Thread* t : b.waiting) wake(t);
    b.waiting.clear();
    return true;
  }
  if (waits) b.waiting.push_back(&self());
  return false;
}
inline void synchronize(Barrier& b, int expected, const char* where) {
  release(&b.token);
  if (!arrive(b, expected, true, where)) wait_in(where);
  acquire(&b.token);
}

// Every lane of `mask` brings a pointer to its operands; the last to arrive computes for all of them.
template <class Compute>
EMU_UNWATCHED void collective(unsigned mask, const char* name, void* operands, Compute compute) {
  Unwatched quiet;
  Thread& t = self();
  const int lane = t.id & 31, first = t.id & ~31, lanes = std::min(32, cluster().block_threads - first);
  mask &= lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the calling lane is not in its own mask");
  Warp& warp = t.block->warps[t.id >> 5];
  Collective* mine = nullptr;
  for (Collective& c : warp.pending) {
    if (c.mask == mask && c.name == name && !(c.here >> lane & 1))
      mine = &c;
    else if (c.mask & mask)
      fail(std::string("divergent warp: ") + name + " while other lanes wait in " + c.name);
  }
  if (!mine) {
    warp.pending.push_back({mask, 0, name, {}});
    mine = &warp.pending.back();
  }
  mine->here |= 1u << lane;
  mine->operands[lane] = operands;
  if (mine->here != mask) return wait_in(name);
  Collective complete = *mine;
  warp.pending.erase(warp.pending.begin() + (mine - warp.pending.data()));
  compute(complete.operands);
  const size_t base = t.block->rank * static_cast<size_t>(cluster().block_threads) + first;
  for (int l = 0; l < 32; ++l)
    if (l != lane && (mask >> l & 1)) wake(cluster().threads[base + l].get());
}

// ---- launch --------------------------------------------------------------------------------------------------------
EMU_UNWATCHED inline void thread_entry() {
  Cluster& c = cluster();
  Fiber::entered(c.home);
  acquire(&c.launched);
  c.body();
  Thread& t = self();
  if (!t.copies.empty()) t.copies.clear();  // never waited for: nobody can have read them
  if (!t.stores.empty()) fail("a thread exits while its bulk stores still read shared memory");
  if (!t.grid_waited) fail("a thread of a programmatic launch exits without griddepcontrol.wait");
  release(&c.ended);
  {
    Unwatched quiet;
    t.unfenced.clear();
    t.state = Thread::kDone;
    --c.alive;
    --t.block->alive;
  }
  t.fiber.leave(c.home, true);
  std::abort();
}

EMU_UNWATCHED inline void resume(Thread& t) {
  Cluster& c = cluster();
  c.current = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  t.fiber.enter(c.home);
  c.current = nullptr;
  if (!c.failure.empty()) throw Failure(std::exchange(c.failure, {}));
}

// Exactly sized for AddressSanitizer, aligned as a swizzled tile needs it, filled with NaN.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), capacity_((bytes + 1023) / 1024 * 1024) {
    if (bytes == 0) return;
    data_ = static_cast<unsigned char*>(std::aligned_alloc(1024, capacity_));
    std::memset(data_, 0xff, bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(data_ + bytes, capacity_ - bytes);
#endif
  }
  SharedMemory(SharedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_), capacity_(other.capacity_) {}
  ~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    if (data_) ASAN_UNPOISON_MEMORY_REGION(data_, capacity_);
#endif
    std::free(data_);
  }
  unsigned char* data() const { return data_; }

 private:
  unsigned char* data_ = nullptr;
  size_t bytes_, capacity_;
};

// Warps run one after another, each as far as it gets.
EMU_UNWATCHED inline bool run_warp(int first, int lanes) {
  Cluster& c = cluster();
  const Order order = options().order;
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    const int start = order == Order::kRandom ? static_cast<int>(random_bits() % lanes) : 0;
    for (int k = 0; k < lanes; ++k) {
      const int lane = order == Order::kReverse ? lanes - 1 - k : (k + start) % lanes;
      Thread& t = *c.threads[first + lane];
      if (t.state != Thread::kRuns) continue;
      resume(t);
      again = any = true;
    }
    if (order == Order::kRandom && random_bits() % 4 == 0) break;
  }
  return any;
}

[[noreturn]] inline void fail_deadlocked(int threads) {
  Cluster& c = cluster();
  std::string message = "deadlock (divergent or missing barrier, or a wait for what never comes):";
  int shown = 0;
  for (int i = 0; i < threads && shown < 6; ++i) {
    const Thread& t = *c.threads[i];
    if (t.state != Thread::kWaits) continue;
    message += " thread " + std::to_string(t.id) + " in " + t.where + ";";
    ++shown;
  }
  throw Failure(message + " " + std::to_string(threads - c.alive) + " of " + std::to_string(threads) + " have exited");
}

EMU_UNWATCHED inline void run_cluster(std::vector<uint3> indices, size_t shared_bytes, bool programmatic) {
  Unwatched quiet;
  Cluster& c = cluster();
  const int per_block = static_cast<int>(blockDim.x * blockDim.y * blockDim.z),
            blocks = static_cast<int>(indices.size());
  const int threads = per_block * blocks;
  if (per_block > 1024) throw Failure("more than 1024 threads in a block");
  std::vector<SharedMemory> shared;
  c.blocks = std::vector<Block>(blocks);
  c.block_threads = per_block;
  c.alive = threads;
  c.in_flight.clear();
  c.mbarrier_waits.clear();
  c.barrier = {};
  while (static_cast<int>(c.threads.size()) < threads) c.threads.push_back(std::make_unique<Thread>());
  for (int b = 0; b < blocks; ++b) {
    shared.emplace_back(shared_bytes);
    Block& block = c.blocks[b];
    block.index = indices[b];
    block.rank = b;
    block.alive = per_block;
    block.shared = shared.back().data();
    block.shared_bytes = shared_bytes;
    block.warps.resize((per_block + 31) / 32);
    block.warpgroups.resize((per_block + 127) / 128);
    block.unfenced.assign(shared_bytes / 16 + 1, 0);
    for (int i = 0; i < per_block; ++i) {
      Thread& t = *c.threads[b * per_block + i];
      t.id = i;
      t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      t.block = &block;
      t.state = Thread::kRuns;
      t.where = "";
      t.copies.clear();
      t.stores.clear();
      t.unfenced.clear();
      t.wgmma_fenced = false;
      t.grid_waited = !programmatic;
      t.fiber.prepare(thread_entry);
    }
  }
  std::vector<std::pair<int, int>> warps;  // first thread, lanes
  for (int b = 0; b < blocks; ++b)
    for (int i = 0; i < per_block; i += 32) warps.push_back({b * per_block + i, std::min(32, per_block - i)});
  if (options().order == Order::kReverse) std::reverse(warps.begin(), warps.end());
  while (c.alive) {
    if (options().order == Order::kRandom)
      for (size_t i = warps.size() - 1; i > 0; --i) std::swap(warps[i], warps[random_bits() % (i + 1)]);
    bool any = false;
    for (auto [first, lanes] : warps) any |= run_warp(first, lanes);
    if (any || !c.alive) continue;
    if (c.in_flight.empty()) fail_deadlocked(threads);
    const size_t i = options().order == Order::kRandom ? random_bits() % c.in_flight.size() : 0;
    Operation op = std::move(c.in_flight[i]);
    c.in_flight.erase(c.in_flight.begin() + static_cast<std::ptrdiff_t>(i));
    op();
  }
  if (!c.in_flight.empty()) throw Failure("a block exits while bulk copies into its shared memory are on their way");
}

// `cluster_size` neighbouring blocks of the x axis form a cluster. A programmatic launch may begin while the kernel
// ahead of it runs.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, unsigned cluster_size,
            bool programmatic, const Arguments&... arguments) {
  const std::tuple<Parameters...> converted{static_cast<Parameters>(arguments)...};
  if (cluster_size == 0 || grid.x % cluster_size) throw Failure("the grid is no multiple of the cluster");
  if (size_t{grid.x} * grid.y * grid.z == 0) throw Failure("the grid is empty");
  const size_t clusters = size_t{grid.x} / cluster_size * grid.y * grid.z;
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&](int worker) {
    Cluster& c = cluster();
    c.random_state = 88172645463325252ull ^ (options().seed * 0x9E3779B97F4A7C15ull) ^ static_cast<uint64_t>(worker);
    c.home.adopt();
    c.body = [&] { std::apply(kernel, converted); };
    gridDim = grid;
    blockDim = threads;
    release(&c.launched);
    try {
      for (size_t i; (i = next++) < clusters;) {
        const size_t per_row = grid.x / cluster_size, row = i / per_row;
        std::vector<uint3> indices;
        for (unsigned b = 0; b < cluster_size; ++b)
          indices.push_back({static_cast<unsigned>(i % per_row) * cluster_size + b, static_cast<unsigned>(row % grid.y),
                             static_cast<unsigned>(row / grid.y)});
        run_cluster(std::move(indices), shared_bytes, programmatic);
      }
    } catch (...) {
      c.threads.clear();
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    acquire(&c.ended);
  };
  const int workers = static_cast<int>(std::min<size_t>(clusters, std::max(1, options().threads)));
  std::vector<std::thread> others;
  for (int i = 1; i < workers; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& t : others) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace emu
