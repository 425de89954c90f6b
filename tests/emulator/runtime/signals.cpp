// What the processor itself refuses while a thread of the grid runs ends the run with a report, not the process; so does a
// run that takes too long. And the mode in which a processor takes float denormals as zero.
#include <csignal>
#include <cstring>
#include <ctime>
#include <sys/syscall.h>
#include <unistd.h>

#include "grid.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGVTALRM};
static constexpr int COUNT = sizeof(SIGNALS) / sizeof(SIGNALS[0]);
static struct sigaction before[COUNT];
static stack_t stack_before;
alignas(64) static char signal_stack[64 * 1024];
static timer_t timer;
static bool timed;
static uint32_t seconds;

static void caught(int signal, siginfo_t* info, void*) {
  if (!grid.current) {
    if (signal == SIGVTALRM) return refuse("the grid runs longer than %u seconds", seconds);
    for (int i = 0; i < COUNT; i++)
      if (SIGNALS[i] == signal) sigaction(signal, &before[i], nullptr);  // not a thread's fault: as if we were not here
    return;
  }
  const char* at = static_cast<const char*>(info->si_addr);
  switch (signal) {
    case SIGVTALRM: fail("the grid runs longer than %u seconds", seconds);
    case SIGFPE: fail("an integer is divided by zero");
    case SIGILL: case SIGTRAP: fail("the processor traps");
    default: break;
  }
  if (at < grid.current->low && at >= grid.current->low - 64 * 1024) fail("more thread memory than the emulator's stack holds");
  fail("an access to no memory at all, through a pointer of the thread's own");
}

void watch(uint32_t limit_seconds) {
  seconds = limit_seconds;
  stack_t own{};
  own.ss_sp = signal_stack;
  own.ss_size = sizeof(signal_stack);
  sigaltstack(&own, &stack_before);
  struct sigaction action{};
  action.sa_sigaction = caught;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &action, &before[i]);
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = int(syscall(SYS_gettid));
  timed = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
  itimerspec when{};
  when.it_value.tv_sec = limit_seconds;
  if (timed) timer_settime(timer, 0, &when, nullptr);
}

void unwatch() {
  if (timed) timer_delete(timer);
  for (int i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &before[i], nullptr);
  if (stack_before.ss_flags & SS_DISABLE) stack_before.ss_size = SIGSTKSZ;
  sigaltstack(&stack_before, nullptr);
}

#if defined(__x86_64__)
static uint32_t control;
void flush_floats(bool on) {
  if (on) control = _mm_getcsr(), _mm_setcsr(control | 0x8040);  // results and operands
  else _mm_setcsr(control);
}
#else
static uint64_t control;
void flush_floats(bool on) {
  if (on) {
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" : : "r"(control | (1u << 24)));
  } else {
    asm volatile("msr fpcr, %0" : : "r"(control));
  }
}
#endif

// The compiler's trap. kind: clang's number of the check.
extern "C" void emulator_trap(uint8_t kind) { fail(kind == 3 ? "an integer is divided by zero" : "an index outside an array"); }
