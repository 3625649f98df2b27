// The context switch for x86-64 and aarch64 (Linux, macOS), and the stacks.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "sanitizer.h"

// lab_host_switch(save, to): pushes the registers that a callee must preserve, stores the stack pointer in
// *save, loads `to` as stack pointer and pops. It ends with an indirect jump and not with `ret`, because the
// CPU's return predictor would be wrong every time.
extern "C" void lab_host_switch(void** save, void* to);

#ifdef __APPLE__
#define LAB_SYMBOL "_lab_host_switch"
#else
#define LAB_SYMBOL "lab_host_switch"
#endif

#if defined(__x86_64__)
constexpr size_t kSavedWords = 7;  // six registers and the address to continue at
constexpr size_t kResumeWord = 6;
asm(".text\n"
#ifndef __APPLE__
    ".hidden " LAB_SYMBOL
    "\n"
#endif
    ".globl " LAB_SYMBOL
    "\n"
    ".p2align 4\n" LAB_SYMBOL
    ":\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  popq %rcx\n"
    "  jmp *%rcx\n");
#elif defined(__aarch64__)
constexpr size_t kSavedWords = 20;  // x19 to x30, d8 to d15
constexpr size_t kResumeWord = 11;  // x30, the link register
asm(".text\n"
#ifndef __APPLE__
    ".hidden " LAB_SYMBOL
    "\n"
#endif
    ".globl " LAB_SYMBOL
    "\n"
    ".p2align 4\n" LAB_SYMBOL
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  br x30\n");
#else
#error "no fiber switch for this processor: write lab_host_switch in cuda_src/host/fiber.cpp"
#endif

namespace lab {
namespace host {

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

void* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("CUDA on the CPU: no memory for stacks or shared memory");
  return p;
}

void unmap_pages(void* p, size_t bytes) { munmap(p, bytes); }

void forget_pages(void* p, size_t bytes) {
  mmap(p, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

void forbid_pages(void* p, size_t bytes) { mprotect(p, bytes, PROT_NONE); }

Fiber::Fiber(size_t stack_bytes, unsigned number, void (*entry)())
    : stack_bytes_((stack_bytes + page_bytes() - 1) / page_bytes() * page_bytes() + page_bytes()),
      number_(number), entry_(entry) {
  base_ = static_cast<unsigned char*>(map_pages(page_bytes() + stack_bytes_));
  forbid_pages(base_, page_bytes());
  asan_bottom_ = base_ + page_bytes();
  asan_bytes_ = stack_bytes_;
  reset();
}

Fiber::~Fiber() {
  if (base_ != nullptr) unmap_pages(base_, page_bytes() + stack_bytes_);
}

void* Fiber::top() const {
  size_t stagger = number_ * 7 % 56 * 64;  // cache lines, within the extra page
  uintptr_t top = reinterpret_cast<uintptr_t>(base_ + page_bytes() + stack_bytes_) - 64 - stagger;
  return reinterpret_cast<void*>(top & ~uintptr_t(15));
}

void Fiber::reset() {
  if (kTsan) forget_pages(base_ + page_bytes(), stack_bytes_);
  asan_unpoison(base_ + page_bytes(), stack_bytes_);
  asan_fake_stack_ = nullptr;
  // As if entry were about to be called: on x86-64 the stack is then 8 modulo 16, and the return address is
  // zero, at which debuggers stop.
  void** words = static_cast<void**>(top());
#if defined(__x86_64__)
  *--words = nullptr;
#endif
  words -= kSavedWords;
  memset(words, 0, kSavedWords * sizeof(void*));
  words[kResumeWord] = reinterpret_cast<void*>(entry_);
  stack_pointer_ = words;
}

bool Fiber::guards(const void* address) const {
  auto* p = static_cast<const unsigned char*>(address);
  return base_ != nullptr && p >= base_ && p < base_ + page_bytes();
}

#ifdef LAB_HOST_ASAN
// The fiber that the latest switch suspended; the sanitizer learns its stack's extent on arrival.
static thread_local Fiber* left = nullptr;

void Fiber::begin() { __sanitizer_finish_switch_fiber(nullptr, &left->asan_bottom_, &left->asan_bytes_); }
#else
void Fiber::begin() {}
#endif

void Fiber::change(Fiber& from, Fiber& to) {
#ifdef LAB_HOST_TSAN
  if (from.tsan == nullptr) from.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch orders no memory accesses
#endif
#ifdef LAB_HOST_ASAN
  left = &from;
  __sanitizer_start_switch_fiber(&from.asan_fake_stack_, to.asan_bottom_, to.asan_bytes_);
#endif
  lab_host_switch(&from.stack_pointer_, to.stack_pointer_);
#ifdef LAB_HOST_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack_, &left->asan_bottom_, &left->asan_bytes_);
#endif
}

}  // namespace host
}  // namespace lab
