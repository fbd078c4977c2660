#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resnet_fused::cpu {
namespace {

constexpr size_t kHuge = size_t{2} << 20;
// A block of more times a tensor's size is kept for a larger one. With 4 the last stage of ResNet-50 found none among
// those of the first, and a pass needed 16 MB more.
constexpr size_t kLargest = 8;

// Huge pages for what is large: 512 times fewer faults and TLB misses.
size_t rounded(size_t bytes) {
  const size_t unit = bytes >= kHuge ? kHuge : 4096;
  return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
}
void* system_allocate(size_t size) {
  void* p = std::aligned_alloc(size >= kHuge ? kHuge : 4096, size);
  if (!p) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (size >= kHuge) madvise(p, size, MADV_HUGEPAGE);
#endif
  return p;
}

struct Buffer {
  void* data = nullptr;
  size_t size = 0, cleared = 0;
};

struct ThreadBuffers;
struct Registry {
  std::mutex mutex;
  std::set<ThreadBuffers*> threads;
};
// Leaked on purpose: threads may end after static destructors ran.
Registry& registry() {
  static Registry* r = new Registry;
  return *r;
}

struct ThreadBuffers {
  Buffer slots[static_cast<int>(Slot::kCount)];
  ThreadBuffers() {
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().threads.insert(this);
  }
  ~ThreadBuffers() {
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().threads.erase(this);
    clear();
  }
  void clear() {
    for (Buffer& b : slots) {
      std::free(b.data);
      b = {};
    }
  }
};

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> idle;            // by size
  std::unordered_map<void*, size_t> allocated;  // in use
  size_t idle_bytes = 0;
  size_t limit = size_t{512} << 20;
};
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

}  // namespace

void* workspace(Slot slot, size_t bytes) {
  static thread_local ThreadBuffers buffers;
  Buffer& b = buffers.slots[static_cast<int>(slot)];
  if (b.size < bytes) {
    std::free(b.data);
    b = {};
    const size_t size = rounded(bytes);
    b.data = system_allocate(size);
    b.size = size;
  }
  // Register tiles read, and drop, what lies behind the last pixel: what others left there may be denormal numbers, of
  // which a product takes 150 cycles. A bottleneck of 2048/512 at 7x7 took 6 ms or, by chance, 15 to 37.
  if (b.cleared < bytes) {
    std::memset(static_cast<char*>(b.data) + b.cleared, 0, bytes - b.cleared);
    b.cleared = bytes;
  }
  return b.data;
}

void* pool_allocate(size_t bytes) {
  const size_t size = rounded(bytes);
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    auto it = p.idle.lower_bound(size);
    if (it != p.idle.end() && it->first <= kLargest * size) {
      auto [block, data] = *it;
      p.idle.erase(it);
      p.idle_bytes -= block;
      p.allocated[data] = block;
      return data;
    }
  }
  void* data = system_allocate(size);
  std::lock_guard<std::mutex> lock(p.mutex);
  p.allocated[data] = size;
  return data;
}

void pool_free(void* data) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  auto it = p.allocated.find(data);
  const size_t size = it->second;
  p.allocated.erase(it);
  p.idle.emplace(size, data);
  p.idle_bytes += size;
  while (p.idle_bytes > p.limit) {  // the smallest first: they cost the fewest faults to get again
    auto smallest = p.idle.begin();
    std::free(smallest->second);
    p.idle_bytes -= smallest->first;
    p.idle.erase(smallest);
  }
}

size_t pool_limit() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().limit;
}
void set_pool_limit(size_t bytes) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  pool().limit = bytes;
}

int64_t cached_bytes() {
  int64_t bytes = 0;
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    bytes += static_cast<int64_t>(pool().idle_bytes);
  }
  std::lock_guard<std::mutex> lock(registry().mutex);
  for (ThreadBuffers* t : registry().threads)
    for (const Buffer& b : t->slots) bytes += static_cast<int64_t>(b.size);
  return bytes;
}

void release_memory() {
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    for (auto& [size, data] : p.idle) std::free(data);
    p.idle.clear();
    p.idle_bytes = 0;
  }
  std::lock_guard<std::mutex> lock(registry().mutex);
  for (ThreadBuffers* t : registry().threads) t->clear();
}

void poison_workspaces() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  for (ThreadBuffers* t : registry().threads)
    for (const Buffer& b : t->slots)
      if (b.data) std::memset(b.data, 0xff, b.size);  // a NaN as float32 and as bfloat16
}

}  // namespace resnet_fused::cpu
