// What -fsanitize=thread calls in the kernels: every access to memory is looked at.
#include "simt.h"

using simt::check_access;

extern "C" {

#define HOOKS(size)                                                                                     \
  void __tsan_read##size(void* p) { check_access(reinterpret_cast<uintptr_t>(p), size, false, false); } \
  void __tsan_write##size(void* p) { check_access(reinterpret_cast<uintptr_t>(p), size, true, false); } \
  void __tsan_unaligned_read##size(void* p) {                                                           \
    check_access(reinterpret_cast<uintptr_t>(p), size, false, false);                                   \
  }                                                                                                     \
  void __tsan_unaligned_write##size(void* p) {                                                          \
    check_access(reinterpret_cast<uintptr_t>(p), size, true, false);                                    \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* p, size_t size) {
  for (size_t i = 0; i < size; ++i) check_access(reinterpret_cast<uintptr_t>(p) + i, 1, false, false);
}
void __tsan_write_range(void* p, size_t size) {
  for (size_t i = 0; i < size; ++i) check_access(reinterpret_cast<uintptr_t>(p) + i, 1, true, false);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
