// Fibers: a scheduler and one stack for each thread of a block. Included by simt.cpp only.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>

namespace simt {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kMostThreads = 1024;
unsigned char* stacks = nullptr;

bool make_stacks() {
  if (stacks != nullptr) return true;
  void* memory = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  stacks = static_cast<unsigned char*>(memory);
  return true;
}

void fiber_main();  // what a fiber runs; it never returns

#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void* scheduler_stack;
void* thread_stack[kMostThreads];

void make_fiber(int thread) {
  void** top = reinterpret_cast<void**>(stacks + (thread + 1) * kStack);
  *--top = nullptr;  // keeps the ABI's alignment at the entry of fiber_main
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread_stack[thread] = top;
}
void enter_fiber(int thread) { simt_switch(&scheduler_stack, thread_stack[thread]); }
void leave_fiber(int thread) { simt_switch(&thread_stack[thread], scheduler_stack); }
#else
ucontext_t scheduler_context, thread_context[kMostThreads];

void make_fiber(int thread) {
  getcontext(&thread_context[thread]);
  thread_context[thread].uc_stack.ss_sp = stacks + thread * kStack;
  thread_context[thread].uc_stack.ss_size = kStack;
  makecontext(&thread_context[thread], &fiber_main, 0);
}
void enter_fiber(int thread) { swapcontext(&scheduler_context, &thread_context[thread]); }
void leave_fiber(int thread) { swapcontext(&thread_context[thread], &scheduler_context); }
#endif

}  // namespace
}  // namespace simt
