// Stackful fibers: the threads of a block. A switch saves the callee-saved registers and swaps stacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastxattn::simt {

#if defined(__x86_64__)
extern "C" void fxa_simt_switch(void** save, void* load);

struct Fiber {
  void* sp = nullptr;

  // `entry` must never return.
  void prepare(void* stack, size_t bytes, void (*entry)()) {
    auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<void**>(top);
    *--frame = nullptr;                              // where entry's return address would be: keeps the stack aligned
    *--frame = reinterpret_cast<void*>(entry);       // popped by ret
    for (int i = 0; i < 6; ++i) *--frame = nullptr;  // rbx, rbp, r12-r15
    sp = frame;
  }
  static void swap(Fiber& from, Fiber& to) { fxa_simt_switch(&from.sp, to.sp); }
};
#else
struct Fiber {
  ucontext_t context{};

  void prepare(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
};
#endif

}  // namespace fastxattn::simt
