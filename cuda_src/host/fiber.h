// A fiber: a stack, and the point at which its code stopped. A switch saves the registers that a call must
// preserve and changes the stack pointer: no system call, a few nanoseconds.
#pragma once
#include <cstddef>

namespace lab {
namespace host {

size_t page_bytes();
// Zeroed; throws std::runtime_error if there is not enough memory.
void* map_pages(size_t bytes);
void unmap_pages(void* p, size_t bytes);
void forget_pages(void* p, size_t bytes);  // zeroed again; the race detector forgets who accessed them
void forbid_pages(void* p, size_t bytes);  // any access to them faults from now on

class Fiber {
 public:
  Fiber() = default;  // the OS thread's own stack: can be switched from, and back to
  // A new stack. The first switch to it calls entry(), which must not return. `number` staggers the tops of
  // stacks: if all had the same place in their pages, the same variable of 32 lanes would compete for one set
  // of the cache.
  Fiber(size_t stack_bytes, unsigned number, void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void reset();                            // abandons what it was doing: the next switch calls entry() again
  bool guards(const void* address) const;  // address is in the page below the stack: the stack overflowed

  static void change(Fiber& from, Fiber& to);  // suspends `from`, which is running, and continues `to`
  static void begin();                         // entry() calls this first

  void* tsan = nullptr;  // ThreadSanitizer's fiber that runs here

 private:
  void* top() const;

  void* stack_pointer_ = nullptr;
  unsigned char* base_ = nullptr;  // the guard page, then the stack
  size_t stack_bytes_ = 0;
  unsigned number_ = 0;
  void (*entry_)() = nullptr;
  // AddressSanitizer's view: the stack's extent, and its own bookkeeping while the fiber is suspended.
  void* asan_fake_stack_ = nullptr;
  const void* asan_bottom_ = nullptr;
  size_t asan_bytes_ = 0;
};

}  // namespace host
}  // namespace lab
