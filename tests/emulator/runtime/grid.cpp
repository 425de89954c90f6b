// Runs a grid: threadgroups one after another, the threads of one as fibers that meet at collective operations.
#include "grid.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "fiber.h"

Grid grid;

static constexpr size_t STACK = 128 * 1024, GUARD = 16 * 1024;
static void (*entry)(const uint64_t*, const uint32_t*);
static const uint64_t* arguments;

uint32_t random_below(uint32_t n) {  // splitmix64
  uint64_t z = (grid.random += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return uint32_t(((z ^ (z >> 31)) >> 32) * n >> 32);
}

static void leave() {  // from a thread back to the runtime
  Fiber* self = grid.current;
  grid.current = nullptr;
  emulator_switch(&self->stack_pointer, grid.home);
}

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  int used = vsnprintf(grid.message, grid.message_bytes, format, list);
  va_end(list);
  Fiber* f = grid.current;
  if (f && used > 0 && size_t(used) < grid.message_bytes)
    snprintf(grid.message + used, grid.message_bytes - used, "; thread (%u, %u, %u) of threadgroup (%u, %u, %u)",
             f->positions[3], f->positions[4], f->positions[5], grid.group[0], grid.group[1], grid.group[2]);
  void* abandoned;
  grid.current = nullptr;
  emulator_switch(&abandoned, grid.home);  // the run's loop sees the message and returns
  __builtin_unreachable();
}

void refuse(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(grid.message, grid.message_bytes, format, list);
  va_end(list);
}

static void thread_main() {
  entry(arguments, grid.current->positions);
  settle_write();
  grid.current->state = ENDED;
  leave();
  __builtin_unreachable();
}

static bool run_thread(Fiber& f) {  // until it waits or ends; false: the run has failed
  grid.current = &f;
  emulator_switch(&grid.home, f.stack_pointer);
  return grid.message[0] == 0;
}

extern "C" void emulator_simd(int op, int type, void* value, uint32_t count, uint32_t arg, const void* fill) {
  settle_write();
  grid.current->request = {op, type, value, fill, count, arg};
  grid.current->state = AT_COLLECTIVE;
  leave();
}

extern "C" void emulator_barrier(int scope, uint32_t flags) {
  settle_write();
  grid.current->request = {scope ? -1 : -2, 0, nullptr, nullptr, 0, flags};
  grid.current->state = scope ? AT_BARRIER : AT_COLLECTIVE;
  leave();
}

extern "C" uint32_t emulator_lane() { return grid.current->lane; }

static void report(const char* format, const Fiber& a, const char* first, const char* second) {
  grid.current = nullptr;
  snprintf(grid.message, grid.message_bytes, format, first, second, a.simdgroup, grid.group[0], grid.group[1], grid.group[2]);
}

// All lanes of a simdgroup that wait are at one and the same operation, and none has ended: else it is a fault.
static bool meet_simdgroup(Fiber** lanes, uint32_t count) {
  const Request& first = lanes[0]->request;
  for (uint32_t i = 1; i < count; i++) {
    const Fiber& f = *lanes[i];
    if (f.state != lanes[0]->state) {
      const Fiber& ended = f.state == ENDED ? f : *lanes[0];
      const Fiber& other = f.state == ENDED ? *lanes[0] : f;
      if (ended.state == ENDED)
        report("some threads of a simdgroup have ended while others wait at %s%s (simdgroup %u of threadgroup (%u, %u, %u))", f,
               operation_name(other.request.op), "");
      else
        report("threads of one simdgroup wait at different operations: %s and %s (simdgroup %u of threadgroup (%u, %u, %u))", f,
               operation_name(first.op), operation_name(f.request.op));
      return false;
    }
    if (f.state != ENDED && (f.request.op != first.op || f.request.type != first.type || f.request.count != first.count)) {
      report("threads of one simdgroup wait at different operations: %s and %s (simdgroup %u of threadgroup (%u, %u, %u))", f,
             operation_name(first.op), operation_name(f.request.op));
      return false;
    }
  }
  if (lanes[0]->state != AT_COLLECTIVE) return true;
  if (first.op == -2) {
    for (int space = 0; space < 2; space++)
      if (first.arg & (1u << space)) grid.simd_epoch[lanes[0]->simdgroup][space]++;
  } else {
    resolve_collective(lanes, count);
    if (grid.message[0]) return false;
  }
  for (uint32_t i = 0; i < count; i++) lanes[i]->state = READY;
  return true;
}

static void shuffle(uint32_t* order, uint32_t n) {
  for (uint32_t i = n; i > 1; i--) {
    uint32_t j = random_below(i), t = order[i - 1];
    order[i - 1] = order[j];
    order[j] = t;
  }
}

// Runs the simdgroups until each waits at a threadgroup barrier or has ended.
static bool run_to_barrier() {
  uint32_t open[MAX_THREADS / SIMD + 1], order[SIMD], count = 0;
  for (uint32_t g = 0; g < grid.simdgroups; g++)
    if (grid.fibers[g * SIMD].state == READY) open[count++] = g;
  while (count) {
    uint32_t at = random_below(count), first = open[at] * SIMD;
    uint32_t lanes = grid.threads - first < SIMD ? grid.threads - first : SIMD;
    Fiber* list[SIMD];
    for (uint32_t i = 0; i < lanes; i++) order[i] = i;
    shuffle(order, lanes);
    for (uint32_t i = 0; i < lanes; i++) {
      list[order[i]] = &grid.fibers[first + order[i]];
      if (!run_thread(grid.fibers[first + order[i]])) return false;
    }
    if (!meet_simdgroup(list, lanes)) return false;
    if (list[0]->state != READY) open[at] = open[--count];
  }
  return true;
}

static bool run_group() {
  for (;;) {
    if (!run_to_barrier()) return false;
    Fiber *waits = nullptr, *ended = nullptr;
    for (uint32_t i = 0; i < grid.threads; i++) (grid.fibers[i].state == AT_BARRIER ? waits : ended) = &grid.fibers[i];
    if (!waits) return true;
    if (ended) {
      report("some threads have ended while others wait at %s%s (last in simdgroup %u of threadgroup (%u, %u, %u))", *waits,
             "threadgroup_barrier", "");
      return false;
    }
    for (uint32_t i = 0; i < grid.threads; i++)
      if (grid.fibers[i].request.arg != waits->request.arg) {
        report("threads wait at barriers with different flags%s%s (simdgroup %u of threadgroup (%u, %u, %u))", *waits, "", "");
        return false;
      }
    for (int space = 0; space < 2; space++)
      if (waits->request.arg & (1u << space)) grid.epoch[space]++;
    for (uint32_t i = 0; i < grid.threads; i++) grid.fibers[i].state = READY;
  }
}

static bool stacks_ready() {
  static char* stacks = nullptr;
  if (stacks) return true;
  size_t each = STACK + GUARD;
  void* all = mmap(nullptr, each * MAX_THREADS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) return false;
  stacks = static_cast<char*>(all);
  for (uint32_t i = 0; i < MAX_THREADS; i++) {
    char* low = stacks + i * each + GUARD;
    if (mprotect(low, STACK, PROT_READ | PROT_WRITE)) return false;
    grid.fibers[i].low = low;
    grid.fibers[i].high = low + STACK;
  }
  return true;
}

// positions: see the table in grid.py.
static void place_threads(const uint32_t* whole, const uint32_t* shape, const uint32_t* groups, const uint32_t* size) {
  grid.threads = size[0] * size[1] * size[2];
  grid.simdgroups = (grid.threads + SIMD - 1) / SIMD;
  for (uint32_t i = 0; i < grid.threads; i++) {
    Fiber& f = grid.fibers[i];
    f.index = i;
    f.simdgroup = i / SIMD;
    f.lane = i % SIMD;
    f.state = READY;
    f.stack_pointer = fresh_stack(f.high, thread_main);
    uint32_t local[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    uint32_t* p = f.positions;
    for (int d = 0; d < 3; d++) {
      p[d] = grid.group[d] * shape[d] + local[d];
      p[3 + d] = local[d];
      p[6 + d] = grid.group[d];
      p[9 + d] = size[d];
      p[12 + d] = groups[d];
      p[15 + d] = whole[d];
      p[18 + d] = shape[d];
      p[30 + d] = 0;
    }
    p[21] = i;
    p[22] = f.lane;
    p[23] = f.simdgroup;
    p[24] = grid.simdgroups;
    p[25] = (shape[0] * shape[1] * shape[2] + SIMD - 1) / SIMD;
    p[26] = SIMD;
    p[27] = i % 4;
    p[28] = i / 4;
    p[29] = (grid.threads + 3) / 4;
  }
}

struct Search {
  const char* address;
  Region* region;
};
static int find_library(dl_phdr_info* info, size_t, void* data) {
  Search* search = static_cast<Search*>(data);
  uintptr_t low = UINTPTR_MAX, high = 0, at = reinterpret_cast<uintptr_t>(search->address);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    uintptr_t begin = info->dlpi_addr + h.p_vaddr;
    if (begin < low) low = begin;
    if (begin + h.p_memsz > high) high = begin + h.p_memsz;
  }
  if (at < low || at >= high) return 0;
  *search->region = {"a table of constants", reinterpret_cast<uint8_t*>(low), high - low, 1, TABLE, nullptr};
  return 1;
}

static bool run_groups(const uint32_t* whole, const uint32_t* shape) {
  uint32_t groups[3], total = 1, fixed = grid.region_count;
  for (int d = 0; d < 3; d++) total *= groups[d] = (whole[d] + shape[d] - 1) / shape[d];
  uint32_t step = 1, number = random_below(total);  // an order that the seed draws: every threadgroup once
  for (uint32_t tries = 0; tries < 100 && total > 2; tries++) {
    uint32_t a = step = 1 + random_below(total - 1), b = total;
    while (b) {
      uint32_t rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) break;
    step = 1;
  }
  for (uint32_t done = 0; done < total; done++, number = uint32_t((uint64_t(number) + step) % total)) {
    uint32_t size[3];
    grid.group[0] = number % groups[0];
    grid.group[1] = number / groups[0] % groups[1];
    grid.group[2] = number / (groups[0] * groups[1]);
    for (int d = 0; d < 3; d++) {
      uint32_t left = whole[d] - grid.group[d] * shape[d];
      size[d] = left < shape[d] ? left : shape[d];
    }
    for (int space = 0; space < 2; space++) {
      grid.first_epoch[space] = ++grid.epoch[space];
      for (auto& epochs : grid.simd_epoch) epochs[space]++;
    }
    grid.region_count = fixed;
    start_group_memory();
    place_threads(whole, shape, groups, size);
    if (!run_group()) return false;
  }
  return true;
}

// Python's way in. 0: done. 1: a fault, described in message. flush: float denormals count as zero.
extern "C" int emulator_run(void* function, const uint64_t* args, const Region* regions, uint32_t region_count, const uint32_t* whole,
                            const uint32_t* shape, uint64_t seed, uint32_t flush, uint32_t limit_seconds, char* message,
                            size_t message_bytes) {
  grid.message = message;
  grid.message_bytes = message_bytes;
  message[0] = 0;
  if (region_count >= MAX_REGIONS) return refuse("more than %u buffers", MAX_REGIONS), 1;
  if (!stacks_ready()) return refuse("no memory for the threads' stacks"), 1;
  memcpy(&entry, &function, sizeof(entry));
  arguments = args;
  grid.random = seed;
  memcpy(grid.regions, regions, sizeof(Region) * region_count);
  grid.region_count = region_count;
  Search search{static_cast<const char*>(function), &grid.regions[grid.region_count]};
  if (dl_iterate_phdr(find_library, &search)) grid.region_count++;
  grid.epoch[0] = grid.epoch[1] = 1;
  forget_slots();
  watch(limit_seconds);
  if (flush) flush_floats(true);
  bool good = run_groups(whole, shape);
  if (flush) flush_floats(false);
  grid.current = nullptr;
  unwatch();
  return good && !message[0] ? 0 : 1;
}
