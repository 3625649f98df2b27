// What ThreadSanitizer and AddressSanitizer must be told about fibers. In ordinary builds it does nothing.
//
// ThreadSanitizer: kernels are instrumented, this layer is not (it is compiled with -DLAB_HOST_TSAN and
// without -fsanitize=thread). Each CUDA thread is one fiber of ThreadSanitizer. Barriers, mbarriers and
// fences are release and acquire on an address; accesses made for a kernel (cp.async) are reported as the
// kernel's.
#pragma once
#include <cstddef>

#ifdef LAB_HOST_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range_pc(void* address, size_t bytes, void* pc);
void __tsan_write_range_pc(void* address, size_t bytes, void* pc);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

#if defined(__SANITIZE_ADDRESS__)
#define LAB_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LAB_HOST_ASAN 1
#endif
#endif

#ifdef LAB_HOST_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** old_bottom, size_t* old_size);
void __asan_poison_memory_region(const volatile void* address, size_t bytes);
void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
}
#endif

namespace lab {
namespace host {

#ifdef LAB_HOST_TSAN
constexpr bool kTsan = true;
inline void tsan_acquire(void* address) { __tsan_acquire(address); }
inline void tsan_release(void* address) { __tsan_release(address); }
inline void tsan_read(const void* p, size_t n, void* pc) {
  __tsan_read_range_pc(const_cast<void*>(p), n, pc);
}
inline void tsan_write(void* p, size_t n, void* pc) { __tsan_write_range_pc(p, n, pc); }

// While an object of this type exists, accesses of this fiber belong to this layer and are not checked.
struct TsanIgnore {
  TsanIgnore() { __tsan_ignore_thread_begin(); }
  ~TsanIgnore() { __tsan_ignore_thread_end(); }
};
#else
constexpr bool kTsan = false;
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void tsan_read(const void*, size_t, void*) {}
inline void tsan_write(void*, size_t, void*) {}
struct TsanIgnore {
  TsanIgnore() {}
};
#endif

#ifdef LAB_HOST_ASAN
constexpr bool kAsan = true;
inline void asan_poison(const void* p, size_t n) { __asan_poison_memory_region(p, n); }
inline void asan_unpoison(const void* p, size_t n) { __asan_unpoison_memory_region(p, n); }
#else
constexpr bool kAsan = false;
inline void asan_poison(const void*, size_t) {}
inline void asan_unpoison(const void*, size_t) {}
#endif

}  // namespace host
}  // namespace lab
