// What a kernel's text sees of the threads of a block that runs on a CPU; host.cpp is how they run. Only C's own headers
// are named here: a program is compiled for every text, and C++'s would be most of the work.
#pragma once
#include <stdint.h>
#include <string.h>

namespace host {
struct Index {
  unsigned x, y, z;
};
struct Lane {  // one thread
  Index index;
  unsigned lane;                    // of its warp
  int turn;                         // which of the slots
  unsigned char (*slots)[32][32];   // what the lanes of its warp hand over, and room for the next time
};

extern Index block, threads, blocks;
extern Lane* current;
extern unsigned char* shared;  // dynamic shared memory

void meet_warp();
void meet_block();
void start_copy(void* to, const void* from);  // of 16 bytes; from none: zeros
void close_batch();
void wait_batches(unsigned left);

inline unsigned lane() { return current->lane; }
template <typename V>
void hand_over(const V& v) {  // every lane of the warp calls it; then slot_of(lane) is what that lane gave, until the next call
  static_assert(sizeof(V) <= 32, "a lane hands over 32 bytes at most");
  current->turn ^= 1;
  memcpy(current->slots[current->turn][current->lane], &v, sizeof(V));
  meet_warp();
}
template <typename V>
V slot_of(unsigned lane) {
  V v;
  memcpy(&v, current->slots[current->turn][lane & 31u], sizeof(V));
  return v;
}
}  // namespace host
