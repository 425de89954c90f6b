// CUDA's names for a CPU: enough to run our kernels' CUDA texts there, whole grids, lane by lane.
#pragma once
#include "fibers.h"

#define __device__
#define __global__ static
#define __grid_constant__
#define __shared__ static  // one block runs at a time
#define threadIdx (host::current->index)
#define blockIdx (host::block)
#define blockDim (host::threads)
#define gridDim (host::blocks)

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

struct __half {
  _Float16 value;
  __half() = default;
  __half(float v) : value(_Float16(v)) {}
  operator float() const { return float(value); }
};
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half2 half2;
typedef __half half;
inline float fabs(float v) { return __builtin_fabsf(v); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
extern "C" float exp2f(float);
extern "C" float fmaxf(float, float);
extern "C" float rintf(float);
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) {  // to the nearest, ties to even; our kernels make no NaN
    uint32_t u;
    memcpy(&u, &v, 4);
    bits = uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &u, 4);
    return v;
  }
};

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
template <typename V>
V __ldg(const V* p) { return *p; }
template <typename V>
V __ldcs(const V* p) { return *p; }
template <typename A>
A min(A a, A b) { return a < b ? a : b; }
template <typename A>
A max(A a, A b) { return a > b ? a : b; }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}

inline void __syncthreads() { host::meet_block(); }
inline void __syncwarp(unsigned = ~0u) { host::meet_warp(); }
template <typename V>
V __shfl_sync(unsigned, V v, unsigned lane) {
  host::hand_over(v);
  return host::slot_of<V>(lane);
}
template <typename V>
V __shfl_xor_sync(unsigned, V v, unsigned mask) { return __shfl_sync(~0u, v, host::lane() ^ mask); }
template <typename V>
V __shfl_down_sync(unsigned, V v, unsigned by) { return __shfl_sync(~0u, v, host::lane() + by > 31 ? host::lane() : host::lane() + by); }
inline int __reduce_add_sync(unsigned, int v) {
  for (unsigned mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
  return v;
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  for (unsigned mask = 16; mask > 0; mask >>= 1) v = max(v, __shfl_xor_sync(~0u, v, mask));
  return v;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned places) {
  const uint64_t both = uint64_t(high) << 32 | low;
  unsigned found = 0;
  for (int i = 0; i < 4; i++) found |= unsigned(both >> 8 * (places >> 4 * i & 7u) & 255u) << 8 * i;
  return found;
}

namespace cooperative_groups {}
namespace mlx::core::cu {
struct Shape {
  int32_t sizes[10];
  int32_t operator[](int i) const { return sizes[i]; }
};
}  // namespace mlx::core::cu
