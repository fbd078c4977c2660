// Buffers in which an access out of bounds is an error that shows, also where AddressSanitizer sees nothing (masked
// and tile loads, non-temporal stores, inline assembly).
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

enum class Placement {
  kHeap,         // exactly as large as asked for: AddressSanitizer watches both ends
  kBeforeGuard,  // ends where an unmapped page starts
  kAfterGuard,   // starts where an unmapped page ends
};

class Guarded {
 public:
  Guarded() = default;
  Guarded(size_t bytes, size_t alignment, Placement placement) : bytes_(bytes), placement_(placement) {
    if (placement == Placement::kHeap) {
      if (posix_memalign(&base_, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes ? bytes : 1))
        throw std::bad_alloc();
      data_ = static_cast<char*>(base_);
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t body = (bytes + page - 1) / page * page;
      mapped_ = body + 2 * page;
      base_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base_ == MAP_FAILED) throw std::bad_alloc();
      char* const first = static_cast<char*>(base_) + page;
      if (body && mprotect(first, body, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
      data_ = placement == Placement::kAfterGuard ? first : first + (body - bytes) / alignment * alignment;
    }
    std::memset(data_, 0xff, bytes);  // NaN as float32 and as bfloat16
  }
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Guarded() { mapped_ ? static_cast<void>(munmap(base_, mapped_)) : std::free(base_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // From here on a write is an error (not on the heap).
  void freeze() const {
    if (mapped_) mprotect(base_, mapped_, PROT_NONE);
    if (mapped_ > 2 * page()) mprotect(static_cast<char*>(base_) + page(), mapped_ - 2 * page(), PROT_READ);
  }

 private:
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  void swap(Guarded& other) {
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(placement_, other.placement_);
  }

  size_t bytes_ = 0, mapped_ = 0;
  void* base_ = nullptr;
  char* data_ = nullptr;
  Placement placement_ = Placement::kHeap;
};
