// The signal handler stores the address and makes the interrupted thread continue in report_fault(), on a
// stack reserved for it; from there the launch is abandoned as after any other failure. Sanitizers have
// handlers of their own, which stay installed.
#include "fault.h"

#include <signal.h>
#ifdef __APPLE__
#include <sys/ucontext.h>  // <ucontext.h> refuses to be included without _XOPEN_SOURCE
#else
#include <ucontext.h>
#endif

#include <mutex>

#include "fiber.h"
#include "sanitizer.h"
#include "scheduler.h"

namespace lab {
namespace host {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction previous[3];

// First half: the handler's stack. Second half: the stack of report_fault().
struct FaultStack {
  unsigned char* base = nullptr;
  bool alternate = false;  // the first half is this OS thread's signal stack

  ~FaultStack() {
    if (alternate) {
      stack_t off = {};
      off.ss_flags = SS_DISABLE;
      sigaltstack(&off, nullptr);
    }
    if (base != nullptr) unmap_pages(base, 2 * kStackBytes);
  }
};
thread_local FaultStack fault_stack;

LAB_THREAD_LOCAL unsigned char* report_stack_top = nullptr;
LAB_THREAD_LOCAL void* fault_address = nullptr;
LAB_THREAD_LOCAL int fault_signal = 0;

[[noreturn]] void report_fault() {
  auto* p = static_cast<unsigned char*>(fault_address);
  if (fault_signal == SIGFPE) fail("integer division by zero");
  if (worker->guards_stack(p)) {
    fail("stack overflow: local variables and calls need more than LAB_HOST_STACK=%zu bytes",
         worker->options.stack_bytes);
  }
  for (Block* block : worker->blocks) {
    if (p >= block->memory - Block::kGuardBytes &&
        p < block->memory + block->memory_bytes + Block::kGuardBytes) {
      fail(
          "access outside shared memory: byte %td of %zu (a build with LAB_HOST_SANITIZE=address names the "
          "line)",
          p - block->smem, block->smem_bytes);
    }
  }
  fail("illegal memory access at address %p", fault_address);
}

// Makes the interrupted code continue at `entry` with the stack at `stack`, as if entry had just been called.
bool redirect(void* context, void (*entry)(), unsigned char* stack) {
  auto* uc = static_cast<ucontext_t*>(context);
  [[maybe_unused]] auto pc = reinterpret_cast<uintptr_t>(entry);
  auto sp = reinterpret_cast<uintptr_t>(stack);
#if defined(__linux__) && defined(__x86_64__)
  uc->uc_mcontext.gregs[REG_RIP] = greg_t(pc);
  uc->uc_mcontext.gregs[REG_RSP] = greg_t(sp - 8);
#elif defined(__linux__) && defined(__aarch64__)
  uc->uc_mcontext.pc = pc;
  uc->uc_mcontext.sp = sp;
#elif defined(__APPLE__) && defined(__x86_64__)
  uc->uc_mcontext->__ss.__rip = pc;
  uc->uc_mcontext->__ss.__rsp = sp - 8;
#elif defined(__APPLE__) && defined(__aarch64__)
  __darwin_arm_thread_state64_set_pc_fptr(uc->uc_mcontext->__ss, entry);
  __darwin_arm_thread_state64_set_sp(uc->uc_mcontext->__ss, sp);
#else
  (void)uc, (void)sp;
  return false;
#endif
  return true;
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (current != nullptr && report_stack_top != nullptr && fault_signal == 0) {
    fault_address = info->si_addr;
    fault_signal = signal;
    if (redirect(context, &report_fault, report_stack_top)) return;
  }
  // Not a fault of a kernel: it happens again on return, and the earlier handler gets it.
  for (int i = 0; i < 3; ++i) {
    if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
  }
}

}  // namespace

void catch_faults_on_this_thread() {
  if (kAsan || kTsan) return;
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &previous[i]);
  });
  fault_signal = 0;
  if (fault_stack.base != nullptr) return;
  fault_stack.base = static_cast<unsigned char*>(map_pages(2 * kStackBytes));
  report_stack_top = fault_stack.base + 2 * kStackBytes;
  stack_t now;
  if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE)) {
    stack_t alternate = {};
    alternate.ss_sp = fault_stack.base;
    alternate.ss_size = kStackBytes;
    fault_stack.alternate = sigaltstack(&alternate, nullptr) == 0;
  }
}

}  // namespace host
}  // namespace lab
