// The threads of a block as fibers of one: they run in turn, each as far as it can, and meet where the kernel says so.
// A warp runs until all its lanes wait for other warps: so a missing barrier between warps is seen. Two orders: an odd
// seed takes the warps and lanes backwards, and starts asynchronous copies at once instead of when they are waited for.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

namespace host {
struct Index {
  unsigned x, y, z;
};
struct Copy {
  void* to;
  const void* from;  // none: sixteen zero bytes
};
struct Warp {
  unsigned lanes = 0, arrived = 0;
  unsigned long meetings = 0;
  unsigned char slots[2][32][32];  // what the lanes hand over, and room for the next time
};
struct Fiber {
  Index index;
  unsigned lane;
  Warp* warp;
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = false;
  const unsigned long* counter = nullptr;  // it waits until this has reached the target
  unsigned long target = 0;
  int turn = 0;  // which of the slots
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};

inline Index block, threads, blocks;
inline Fiber* current;
inline jmp_buf scheduler;
inline unsigned seed;
inline unsigned block_arrived;
inline unsigned long block_meetings;
inline unsigned char* shared;  // dynamic shared memory
inline std::function<void()> kernel;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "block %u %u %u: %s\n", block.x, block.y, block.z, what);
  exit(3);
}
inline void wait_for(const unsigned long& counter, unsigned long target) {
  current->counter = &counter;
  current->target = target;
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}
inline void meet(unsigned& arrived, unsigned long& meetings, unsigned all) {
  if (++arrived < all) return wait_for(meetings, meetings + 1);
  arrived = 0;
  meetings++;
}
inline void meet_warp() { meet(current->warp->arrived, current->warp->meetings, current->warp->lanes); }
inline void meet_block() { meet(block_arrived, block_meetings, threads.x * threads.y * threads.z); }

inline unsigned lane() { return current->lane; }
template <typename V>
void hand_over(const V& v) {  // every lane of the warp calls it; then slot_of(lane) is what that lane gave, until the next call
  static_assert(sizeof(V) <= 32, "a lane hands over 32 bytes at most");
  current->turn ^= 1;
  memcpy(current->warp->slots[current->turn][current->lane], &v, sizeof(V));
  meet_warp();
}
template <typename V>
V slot_of(unsigned lane) {
  V v;
  memcpy(&v, current->warp->slots[current->turn][lane & 31u], sizeof(V));
  return v;
}

inline void do_copy(const Copy& copy) {
  if (copy.from) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}
inline void start_copy(void* to, const void* from) {
  if ((uintptr_t(to) | uintptr_t(from)) % 16) fail("a copy of 16 bytes is not aligned to 16");
  if (seed % 2) do_copy({to, from});
  else current->open.push_back({to, from});
}
inline void close_batch() {
  current->closed.push_back(std::move(current->open));
  current->open.clear();
}
inline void wait_batches(unsigned left) {
  for (; current->closed.size() > left; current->closed.pop_front())
    for (const Copy& copy : current->closed.front()) do_copy(copy);
}

inline unsigned char* guarded(size_t bytes, int fill) {  // its end, but for alignment to 16, is the end of what can be touched
  const size_t page = 4096, whole = (bytes + page - 1) / page * page + page;
  unsigned char* at = (unsigned char*)mmap(nullptr, page + whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) fail("no memory");
  mprotect(at, page, PROT_NONE);
  mprotect(at + whole, page, PROT_NONE);
  unsigned char* data = at + whole - (bytes + 15) / 16 * 16;
  memset(at + page, fill, whole - page);
  return data;
}

inline void fiber_main() {
  kernel();
  current->done = true;
  wait_for(block_meetings, ~0ul);
}
inline bool run_warp(std::vector<Fiber*>& lanes) {
  bool any = false;
  for (bool ran = true; ran; any |= ran) {
    ran = false;
    for (size_t i = 0; i < lanes.size(); i++) {
      Fiber* volatile f = lanes[seed % 2 ? lanes.size() - 1 - i : i];
      if (f->done || (f->counter && *f->counter < f->target)) continue;
      ran = true;
      current = f;
      current->counter = nullptr;
      if (_setjmp(scheduler)) continue;
      if (f->begun) _longjmp(f->at, 1);
      f->begun = true;
      setcontext(&f->start);
    }
  }
  return any;
}
inline void run_block(unsigned char* stacks, size_t stack, size_t shared_bytes) {
  const unsigned count = threads.x * threads.y * threads.z;
  std::vector<Fiber> fibers(count);
  std::vector<Warp> warps((count + 31) / 32);
  std::vector<std::vector<Fiber*>> lanes(warps.size());
  memset(shared, 0xA5, shared_bytes);
  block_arrived = 0;
  for (unsigned i = 0; i < count; i++) {
    Fiber& f = fibers[i];
    f.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    f.lane = i % 32;
    f.warp = &warps[i / 32];
    f.warp->lanes++;
    lanes[i / 32].push_back(&f);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + i * stack;
    f.start.uc_stack.ss_size = stack;
    makecontext(&f.start, fiber_main, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (size_t i = 0; i < lanes.size(); i++) any |= run_warp(lanes[seed % 2 ? lanes.size() - 1 - i : i]);
  }
  for (const Fiber& f : fibers)
    if (!f.done) fail("threads wait for others that will never come");
}
inline void run_grid(Index all, size_t shared_bytes) {
  blocks = all;
  const size_t stack = 64 * 1024;
  unsigned char* stacks = guarded(stack * threads.x * threads.y * threads.z, 0);
  shared = guarded(shared_bytes, 0);
  for (block.z = 0; block.z < blocks.z; block.z++)
    for (block.y = 0; block.y < blocks.y; block.y++)
      for (block.x = 0; block.x < blocks.x; block.x++) run_block(stacks, stack, shared_bytes);
}
}  // namespace host
