// Every read and write of device, constant and threadgroup memory comes here first (see instrument.py): it must lie inside
// one buffer and be aligned; what it reads must have been written; and no two threads may touch an element, one of them
// writing, unless a barrier lies between. Two threads may write equal values: MLX's own kernels do.
#include <cstdio>
#include <cstring>

#include "grid.h"

enum Space : uint32_t { DEVICE = 1, CONSTANT = 2, LOCAL = 3 };

static struct Slot {
  uint32_t id, offset, bytes;
} slots[MAX_SLOTS];
static uint32_t slot_count;
alignas(256) static uint8_t arena[THREADGROUP_BYTES + 64 * MAX_SLOTS];
static Cell arena_cells[sizeof(arena)];
static int slot_region[MAX_SLOTS];  // in this threadgroup; -1: not yet

static struct Pending {
  uint8_t* address;
  uint32_t bytes;
  uint8_t old[64];
  const Region* region;
} pending;

void start_group_memory() {
  for (int& region : slot_region) region = -1;
  pending.address = nullptr;
}

void settle_write() {
  if (!pending.address) return;
  uint8_t* at = pending.address;
  pending.address = nullptr;
  if (memcmp(at, pending.old, pending.bytes))
    fail("two threads write different values to %s, element %llu, with no barrier between them", pending.region->name,
         static_cast<unsigned long long>((at - pending.region->data) / pending.region->item));
}

// A threadgroup array: its address, the same for every thread. Poisoned with NaN when a threadgroup first names it.
extern "C" uint64_t emulator_slot(const char* name, uint32_t id, uint32_t bytes, uint32_t align) {
  uint32_t i = 0;
  while (i < slot_count && (slots[i].id != id || slots[i].bytes != bytes)) i++;
  if (i == slot_count) {
    if (slot_count == MAX_SLOTS) fail("more than %u threadgroup arrays", MAX_SLOTS);
    uint32_t start = 0, room = 0;
    for (uint32_t k = 0; k < slot_count; k++) room += slots[k].bytes, start = slots[k].offset + slots[k].bytes + 32;
    if (align < 16) align = 16;
    start = (start + align - 1) / align * align;
    if (room + bytes > THREADGROUP_BYTES) fail("threadgroup memory: %u bytes, and a threadgroup has %u", room + bytes, THREADGROUP_BYTES);
    slots[slot_count++] = {id, start, bytes};
  }
  if (slot_region[i] < 0) {
    if (grid.region_count == MAX_REGIONS) fail("too many buffers");
    slot_region[i] = int(grid.region_count);
    grid.regions[grid.region_count++] = {name, arena + slots[i].offset, slots[i].bytes, 1, THREADGROUP, arena_cells + slots[i].offset};
    memset(arena + slots[i].offset, 0xFF, bytes);
    memset(arena_cells + slots[i].offset, 0, sizeof(Cell) * bytes);
  }
  return reinterpret_cast<uint64_t>(arena + slots[i].offset);
}

void forget_slots() { slot_count = 0; }  // before another kernel

enum Order { NEVER, SELF, BEFORE, RACE };
static Order order(const Record& r, int space, const Fiber& f) {
  if (r.epoch == 0) return NEVER;
  if (r.epoch < grid.first_epoch[space]) return space ? NEVER : RACE;  // another threadgroup
  if (!r.many && r.thread == f.index) return SELF;
  if (r.epoch < grid.epoch[space]) return BEFORE;
  bool same = r.thread / SIMD == f.simdgroup;
  return r.many != 2 && same && r.simd_epoch < grid.simd_epoch[f.simdgroup][space] ? BEFORE : RACE;
}

static void note_read(Cell& c, int space, const Fiber& f) {
  Record now{grid.epoch[space], grid.simd_epoch[f.simdgroup][space], uint16_t(f.index), 0};
  Record& r = c.read;
  if (order(r, space, f) == RACE && r.epoch >= grid.first_epoch[space]) {  // another reader in this same stretch
    now.many = r.many == 2 || r.thread / SIMD != f.simdgroup ? 2 : 1;
  }
  r = now;
}

static const Region* find(const uint8_t* at) {
  static uint32_t last;
  if (last < grid.region_count && uint64_t(at - grid.regions[last].data) < grid.regions[last].bytes) return &grid.regions[last];
  for (uint32_t i = 0; i < grid.region_count; i++)
    if (uint64_t(at - grid.regions[i].data) < grid.regions[i].bytes) return &grid.regions[last = i];
  return nullptr;
}

[[noreturn]] static void outside(const uint8_t* at, uint32_t bytes, const char* what) {
  const Region* nearest = nullptr;
  int64_t best = INT64_MAX, by = 0;
  for (uint32_t i = 0; i < grid.region_count; i++) {
    const Region& r = grid.regions[i];
    int64_t before = r.data - at, after = at + bytes - (r.data + r.bytes);
    int64_t distance = before > after ? before : after;
    if (r.kind != TABLE && distance < best) best = distance, nearest = &r, by = before > after ? -before : after;
  }
  if (!nearest) fail("%s outside every buffer", what);
  fail("%s of %u bytes outside a buffer: %lld bytes %s %s, which has %llu bytes", what, bytes, static_cast<long long>(by < 0 ? -by : by),
       by < 0 ? "before the start of" : "past the end of", nearest->name, static_cast<unsigned long long>(nearest->bytes));
}

extern "C" void emulator_access(uint8_t* at, uint64_t size, uint32_t align, uint32_t space, uint32_t writes) {
  settle_write();
  uint32_t bytes = uint32_t(size);
  const char* what = writes ? "a write" : "a read";
  const Region* r = find(at);
  if (!r || at + bytes > r->data + r->bytes) outside(at, bytes, what);
  if (reinterpret_cast<uintptr_t>(at) % align)
    fail("%s of %u bytes in %s at byte %llu, which is not aligned to %u", what, bytes, r->name,
         static_cast<unsigned long long>(at - r->data), align);
  if ((space == LOCAL) != (r->kind == THREADGROUP)) fail("%s of %s through a pointer of another address space", what, r->name);
  if (!r->cells) {
    if (writes) fail("a write into %s, which is an input", r->name);
    return;
  }
  Fiber& f = *grid.current;
  int index = space == LOCAL;
  uint64_t first = uint64_t(at - r->data) / r->item, last = (uint64_t(at - r->data) + bytes - 1) / r->item;
  bool twice = false;
  for (uint64_t i = first; i <= last; i++) {
    Cell& c = r->cells[i];
    Order wrote = order(c.write, index, f);
    if (!writes) {
      if (wrote == NEVER) fail("a read of %s, element %llu, which no thread has written", r->name, static_cast<unsigned long long>(i));
      if (wrote == RACE) fail("a read of %s, element %llu, that another thread writes with no barrier between them", r->name,
                              static_cast<unsigned long long>(i));
      note_read(c, index, f);
      continue;
    }
    if (order(c.read, index, f) == RACE && (c.read.many || c.read.thread != f.index || c.read.epoch < grid.first_epoch[index]))
      fail("a write of %s, element %llu, that another thread reads with no barrier between them", r->name, static_cast<unsigned long long>(i));
    twice |= wrote == RACE;
    c.write = {grid.epoch[index], grid.simd_epoch[f.simdgroup][index], uint16_t(f.index), 0};
  }
  if (twice) {
    pending = {at, bytes < 64 ? bytes : 64, {}, r};
    memcpy(pending.old, at, pending.bytes);
  }
}

extern "C" void emulator_conversion(float value, int32_t bits, int32_t is_signed) {
  float top = __builtin_ldexpf(1.0f, is_signed ? bits - 1 : bits), low = is_signed ? -top : 0.0f;
  if (!(value < top && (is_signed ? value >= low : value > -1.0f)) && !(is_signed && value > low - 1.0f && value < 0.0f))
    fail("the conversion of %g to %s%d bits, which do not hold it", double(value), is_signed ? "" : "unsigned ", bits);
}
