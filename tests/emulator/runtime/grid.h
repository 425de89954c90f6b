// What the parts of the runtime share: the threads of the threadgroup that is running, its memory and the report of a fault.
#pragma once
#include <cstddef>
#include <cstdint>

enum State : uint8_t { READY, AT_COLLECTIVE, AT_BARRIER, ENDED };
enum Kind : uint32_t { INPUT, OUTPUT, THREADGROUP, TABLE };

struct Request {  // what a thread waits for
  int op, type;
  void* value;
  const void* fill;
  uint32_t count, arg;
};

struct Fiber {
  void* stack_pointer;
  char *low, *high;  // its stack
  uint32_t index, simdgroup, lane;
  State state;
  Request request;
  uint32_t positions[64];
};

struct Record {  // who touched an element last
  uint32_t epoch, simd_epoch;
  uint16_t thread, many;  // many: 1 other lanes of its simdgroup too, 2 threads of other simdgroups too
};
struct Cell {
  Record write, read;
};

struct Region {  // filled by Python: keep in step with grid.py
  const char* name;
  uint8_t* data;
  uint64_t bytes;
  uint32_t item, kind;
  Cell* cells;  // of `item` bytes each; outputs and threadgroup memory
};

constexpr uint32_t SIMD = 32, MAX_THREADS = 1024, MAX_REGIONS = 96, THREADGROUP_BYTES = 32768, MAX_SLOTS = 24;

struct Grid {
  Fiber* current;  // null while the runtime itself runs
  Fiber fibers[MAX_THREADS];
  uint32_t threads, simdgroups;
  uint64_t random;
  Region regions[MAX_REGIONS];
  uint32_t region_count;
  // Epochs, separate for device and threadgroup memory: a barrier orders only the memory that its flags name.
  uint32_t epoch[2], first_epoch[2];
  uint32_t simd_epoch[MAX_THREADS / SIMD + 1][2];
  uint32_t group[3];
  char* message;
  size_t message_bytes;
  void* home;
};
extern Grid grid;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));  // ends the run, from a thread
void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));  // the same from the runtime itself: returns
uint32_t random_below(uint32_t n);
void resolve_collective(Fiber** lanes, uint32_t count);  // collectives.cpp
void settle_write();                                     // memory.cpp: the write whose value was to be looked at
void start_group_memory();
void forget_slots();
const char* operation_name(int op);
void watch(uint32_t limit_seconds);  // signals.cpp
void unwatch();
void flush_floats(bool on);
