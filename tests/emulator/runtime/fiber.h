// A stack of its own for each thread of a threadgroup, and the switch between two of them, without a system call.
#pragma once
#include <cstdint>

extern "C" void emulator_switch(void** save, void* load);  // keeps what a call must keep, then runs on the other stack

#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
// The first switch to a fresh stack returns into `start`, on a stack aligned as after a call.
inline void* fresh_stack(char* top, void (*start)()) {
  void** at = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--at = nullptr;  // where start would return to: it never does
  *--at = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; i++) *--at = nullptr;
  return at;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, .-emulator_switch
)");
inline void* fresh_stack(char* top, void (*start)()) {
  uint64_t* at = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 20;
  for (int i = 0; i < 20; i++) at[i] = 0;
  at[11] = reinterpret_cast<uint64_t>(start);  // x30
  return at;
}
#else
#error "the emulator's threads know x86-64 and ARM64 only"
#endif
