// Collective operations: each is a meeting point of the threads that the runtime (runtime/grid.cpp) keeps.
#pragma once
#include "types.h"

// op: see runtime/collectives.cpp. type: of the elements. value: replaced by the result.
extern "C" void emulator_simd(int op, int type, thread void* value, uint count, uint arg, thread const void* fill);
extern "C" void emulator_barrier(int scope, uint flags);
extern "C" ulong emulator_slot(constant const char* name, uint id, uint bytes, uint align);  // threadgroup memory

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
inline void threadgroup_barrier(mem_flags flags) { emulator_barrier(1, uint(flags)); }
inline void simdgroup_barrier(mem_flags flags) { emulator_barrier(0, uint(flags)); }

template <typename T> struct type_tag;
#define TAG(T, n) template <> struct type_tag<T> { static constexpr constant int value = n; };
TAG(float, 0) TAG(half, 1) TAG(bfloat, 2) TAG(char, 3) TAG(uchar, 4) TAG(short, 5) TAG(ushort, 6) TAG(int, 7) TAG(uint, 8)
TAG(long, 9) TAG(ulong, 10) TAG(bool, 4) TAG(int8_t, 3)
#undef TAG

#define COLLECTIVE(name, op)                                                                   \
  template <typename T>                                                                        \
  METAL_FUNC T name(T value) {                                                                 \
    emulator_simd(op, type_tag<typename lanes_of<T>::element>::value, &value, lanes_of<T>::count, 0, &value); \
    return value;                                                                              \
  }
COLLECTIVE(simd_sum, 0) COLLECTIVE(simd_product, 1) COLLECTIVE(simd_max, 2) COLLECTIVE(simd_min, 3)
COLLECTIVE(simd_and, 4) COLLECTIVE(simd_or, 5) COLLECTIVE(simd_xor, 6)
COLLECTIVE(simd_prefix_inclusive_sum, 7) COLLECTIVE(simd_prefix_exclusive_sum, 8)
COLLECTIVE(simd_prefix_inclusive_product, 9) COLLECTIVE(simd_prefix_exclusive_product, 10)
COLLECTIVE(simd_broadcast_first, 17)
COLLECTIVE(quad_sum, 32) COLLECTIVE(quad_product, 33) COLLECTIVE(quad_max, 34) COLLECTIVE(quad_min, 35)
#undef COLLECTIVE

#define SHUFFLE(name, op)                                                                        \
  template <typename T>                                                                          \
  METAL_FUNC T name(T value, ushort arg) {                                                       \
    emulator_simd(op, type_tag<typename lanes_of<T>::element>::value, &value, lanes_of<T>::count, arg, &value); \
    return value;                                                                                \
  }
SHUFFLE(simd_shuffle, 11) SHUFFLE(simd_shuffle_xor, 12) SHUFFLE(simd_shuffle_down, 13) SHUFFLE(simd_shuffle_up, 14)
SHUFFLE(simd_broadcast, 16) SHUFFLE(simd_shuffle_rotate_down, 18) SHUFFLE(simd_shuffle_rotate_up, 19)
SHUFFLE(quad_shuffle, 43) SHUFFLE(quad_shuffle_xor, 44) SHUFFLE(quad_shuffle_down, 45) SHUFFLE(quad_shuffle_up, 46)
SHUFFLE(quad_broadcast, 48)
#undef SHUFFLE

#define SHUFFLE_AND_FILL(name, op)                                                               \
  template <typename T>                                                                          \
  METAL_FUNC T name(T value, T fill, ushort arg) {                                               \
    emulator_simd(op, type_tag<typename lanes_of<T>::element>::value, &value, lanes_of<T>::count, arg, &fill); \
    return value;                                                                                \
  }
SHUFFLE_AND_FILL(simd_shuffle_and_fill_down, 20) SHUFFLE_AND_FILL(simd_shuffle_and_fill_up, 21)
#undef SHUFFLE_AND_FILL

METAL_FUNC bool simd_all(bool value) { return simd_and(uint(value)) != 0; }
METAL_FUNC bool simd_any(bool value) { return simd_or(uint(value)) != 0; }
METAL_FUNC bool simd_is_first() {
  uint lane = 0;
  emulator_simd(22, 8, &lane, 1, 0, &lane);
  return lane != 0;
}
struct simd_vote {
  ulong bits;
  constexpr bool all() const { return bits == 0xFFFFFFFFul; }
  constexpr bool any() const { return bits != 0; }
  constexpr operator ulong() const { return bits; }
};
METAL_FUNC simd_vote simd_ballot(bool value) {
  ulong v = value;
  emulator_simd(23, 10, &v, 1, 0, &v);
  return simd_vote{v};
}
}  // namespace metal

// The compiler's own names, which MLX's bfloat functions call.
#define OWN_NAME(name)           \
  template <typename T, typename... A> \
  METAL_FUNC T __metal_##name(T value, A... a) { return metal::name(value, a...); }
OWN_NAME(simd_sum) OWN_NAME(simd_product) OWN_NAME(simd_max) OWN_NAME(simd_min) OWN_NAME(simd_xor) OWN_NAME(simd_broadcast)
OWN_NAME(simd_prefix_inclusive_sum) OWN_NAME(simd_prefix_exclusive_sum) OWN_NAME(simd_prefix_inclusive_product)
OWN_NAME(simd_prefix_exclusive_product) OWN_NAME(simd_shuffle) OWN_NAME(simd_shuffle_xor) OWN_NAME(simd_shuffle_down)
OWN_NAME(simd_shuffle_up) OWN_NAME(simd_shuffle_rotate_down) OWN_NAME(simd_shuffle_rotate_up)
#undef OWN_NAME
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }
template <typename T> METAL_FUNC T __metal_simd_shuffle_and_fill_down(T value, T fill, ushort delta, ushort) {
  return metal::simd_shuffle_and_fill_down(value, fill, delta);
}
template <typename T> METAL_FUNC T __metal_simd_shuffle_and_fill_up(T value, T fill, ushort delta, ushort) {
  return metal::simd_shuffle_and_fill_up(value, fill, delta);
}
