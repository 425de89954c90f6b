// The threads of a block as fibers of one: they run in turn, each as far as it can, and meet where the kernel says so.
// A warp runs until all its lanes wait for other warps: so a missing barrier between warps is seen. Two orders: an odd
// seed takes the warps and lanes backwards, and starts asynchronous copies at once instead of when they are waited for.
// main reads a launch from a folder, runs it, writes its outputs. launch: grid, block, bytes of shared memory, seed, how
// many inputs and outputs; for each input its bytes, its number of dimensions and those; for each output its bytes.
// Arrays in in0, in1, ..., out0, ...
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <string>
#include <vector>

#include "launch.h"

namespace host {
struct Copy {
  void* to;
  const void* from;
};
struct Warp {
  unsigned lanes = 0, arrived = 0;
  unsigned long meetings = 0;
  unsigned char slots[2][32][32];
};
struct Fiber : Lane {
  Warp* warp;
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = false;
  const unsigned long* counter = nullptr;  // it waits until this has reached the target
  unsigned long target = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};

Index block, threads, blocks;
Lane* current;
unsigned char* shared;
unsigned char *inputs[MOST], *outputs[MOST];
mlx::core::cu::Shape shapes[MOST];
static jmp_buf scheduler;
static unsigned seed;
static unsigned block_arrived;
static unsigned long block_meetings;

static Fiber* fiber() { return static_cast<Fiber*>(current); }
[[noreturn]] static void fail(const char* what) {
  fprintf(stderr, "block %u %u %u: %s\n", block.x, block.y, block.z, what);
  exit(3);
}
static void wait_for(const unsigned long& counter, unsigned long target) {
  fiber()->counter = &counter;
  fiber()->target = target;
  if (!_setjmp(fiber()->at)) _longjmp(scheduler, 1);
}
static void meet(unsigned& arrived, unsigned long& meetings, unsigned all) {
  if (++arrived < all) return wait_for(meetings, meetings + 1);
  arrived = 0;
  meetings++;
}
void meet_warp() { meet(fiber()->warp->arrived, fiber()->warp->meetings, fiber()->warp->lanes); }
void meet_block() { meet(block_arrived, block_meetings, threads.x * threads.y * threads.z); }

static void do_copy(const Copy& copy) {
  if (copy.from) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}
void start_copy(void* to, const void* from) {
  if ((uintptr_t(to) | uintptr_t(from)) % 16) fail("a copy of 16 bytes is not aligned to 16");
  if (seed % 2) do_copy({to, from});
  else fiber()->open.push_back({to, from});
}
void close_batch() {
  fiber()->closed.push_back(std::move(fiber()->open));
  fiber()->open.clear();
}
void wait_batches(unsigned left) {
  for (; fiber()->closed.size() > left; fiber()->closed.pop_front())
    for (const Copy& copy : fiber()->closed.front()) do_copy(copy);
}

static unsigned char* guarded(size_t bytes, int fill) {  // its end, but for alignment to 16, is the end of what can be touched
  const size_t page = 4096, whole = (bytes + page - 1) / page * page + page;
  unsigned char* at = (unsigned char*)mmap(nullptr, page + whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) fail("no memory");
  mprotect(at, page, PROT_NONE);
  mprotect(at + whole, page, PROT_NONE);
  unsigned char* data = at + whole - (bytes + 15) / 16 * 16;
  memset(at + page, fill, whole - page);
  return data;
}

static void fiber_main() {
  call_kernel();
  fiber()->done = true;
  wait_for(block_meetings, ~0ul);
}
static bool run_warp(std::vector<Fiber*>& lanes) {
  bool any = false;
  for (bool ran = true; ran; any |= ran) {
    ran = false;
    for (size_t i = 0; i < lanes.size(); i++) {
      Fiber* volatile f = lanes[seed % 2 ? lanes.size() - 1 - i : i];
      if (f->done || (f->counter && *f->counter < f->target)) continue;
      ran = true;
      current = f;
      f->counter = nullptr;
      if (_setjmp(scheduler)) continue;
      if (f->begun) _longjmp(f->at, 1);
      f->begun = true;
      setcontext(&f->start);
    }
  }
  return any;
}
static void run_block(unsigned char* stacks, size_t stack, size_t shared_bytes) {
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
    f.turn = 0;
    f.warp = &warps[i / 32];
    f.slots = f.warp->slots;
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
static void run_grid(Index all, size_t shared_bytes) {
  blocks = all;
  const size_t stack = 64 * 1024;
  unsigned char* stacks = guarded(stack * threads.x * threads.y * threads.z, 0);
  shared = guarded(shared_bytes, 0);
  for (block.z = 0; block.z < blocks.z; block.z++)
    for (block.y = 0; block.y < blocks.y; block.y++)
      for (block.x = 0; block.x < blocks.x; block.x++) run_block(stacks, stack, shared_bytes);
}

static void run(const std::string& folder) {
  std::ifstream launch(folder + "/launch");
  size_t shared_bytes, input_count, output_count, output_bytes[MOST];
  Index all;
  launch >> all.x >> all.y >> all.z >> threads.x >> threads.y >> threads.z >> shared_bytes >> seed >> input_count >> output_count;
  if (!launch || input_count > MOST || output_count > MOST) fail("the launch cannot be read");
  for (size_t i = 0; i < input_count; i++) {
    size_t bytes, dimensions;
    launch >> bytes >> dimensions;
    for (size_t d = 0; d < dimensions; d++) launch >> shapes[i].sizes[d];
    inputs[i] = guarded(bytes, 0xA5);
    std::ifstream file(folder + "/in" + std::to_string(i), std::ios::binary);
    file.read((char*)inputs[i], std::streamsize(bytes));
    mprotect((void*)(uintptr_t(inputs[i]) / 4096 * 4096), (bytes + uintptr_t(inputs[i]) % 4096 + 4095) / 4096 * 4096, PROT_READ);
  }
  for (size_t i = 0; i < output_count; i++) {
    launch >> output_bytes[i];
    outputs[i] = guarded(output_bytes[i], seed % 2 ? 0x5A : 0x3C);  // what is never written differs from seed to seed
  }
  if (!launch) fail("the launch cannot be read");
  run_grid(all, shared_bytes);
  for (size_t i = 0; i < output_count; i++) {
    std::ofstream file(folder + "/out" + std::to_string(i), std::ios::binary);
    file.write((const char*)outputs[i], std::streamsize(output_bytes[i]));
  }
}
}  // namespace host

int main(int, char** argv) { host::run(argv[1]); }
