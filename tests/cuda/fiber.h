// Fibers: stacks that one OS thread switches between, known to AddressSanitizer and ThreadSanitizer.
//
// A switch by ThreadSanitizer's fiber interface makes no happens-before edge, so only the barriers of the program under
// test order two fibers' accesses, and a missing one is reported as a race.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// The emulator's own bookkeeping is not part of the program under test.
#define EMU_UNWATCHED __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace emu {

// While one lives, ThreadSanitizer ignores this fiber's accesses.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
#else
  Unwatched() {}
  ~Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

// Happens-before edges of the program under test: from release(p) to every later acquire(p).
#if defined(__SANITIZE_THREAD__)
inline void acquire(void* p) { __tsan_acquire(p); }
inline void release(void* p) { __tsan_release(p); }
#else
inline void acquire(void*) {}
inline void release(void*) {}
#endif

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* to);
__asm__(R"(
.text
.weak emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // a return address that is never used keeps the 16-byte alignment of a call
    *--top = reinterpret_cast<void*>(entry);
    for (int callee_saved = 0; callee_saved < 6; ++callee_saved) *--top = nullptr;
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) { emu_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// The OS thread's own stack, from which fibers are entered and to which they return.
class Home {
 public:
  // To be called before the first entry on an OS thread.
  void adopt() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

 private:
  friend class Fiber;
  Context context_;
  void* tsan_ = nullptr;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  Fiber() : stack_(new char[kStackBytes]) {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }
  Fiber(const Fiber&) = delete;

  // The next `enter` starts `entry` on an empty stack, whatever ran there before.
  void prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack_.get(), kStackBytes);
#endif
    context_.prepare(stack_.get(), kStackBytes, entry);
  }

  EMU_UNWATCHED void enter(Home& home) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&home.fake_stack_, stack_.get(), kStackBytes);
#endif
    Context::swap(home.context_, context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(home.fake_stack_, nullptr, nullptr);
#endif
  }

  // First thing on the new stack.
  EMU_UNWATCHED static void entered([[maybe_unused]] Home& home) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &home.stack_, &home.stack_bytes_);
#endif
  }

  // Back to the home stack; returns at the next `enter`, never if this was the `last` time.
  EMU_UNWATCHED void leave(Home& home, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(home.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, home.stack_, home.stack_bytes_);
#endif
    Context::swap(context_, home.context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  Context context_;
  std::unique_ptr<char[]> stack_;
  void* tsan_ = nullptr;
  void* fake_stack_ = nullptr;
};

}  // namespace emu
