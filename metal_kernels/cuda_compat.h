// Metal's names for CUDA, so that one body serves both.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define BITNET_CUDA 1
#define FN inline __device__
#define UNROLL _Pragma("unroll")
// CUDA's own word is a macro that says `device`, which the next line but one would empty.
#undef __device__
#define __device__ __attribute__((__device__))
#define device
#define constant
#define thread
#define threadgroup __shared__
#define THREADGROUP_POINTER(type) type*
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef __nv_bfloat16 bfloat16_t;
#define thread_position_in_grid                                                          \
  (uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
         blockIdx.z * blockDim.z + threadIdx.z})
#define thread_position_in_threadgroup (uint3{threadIdx.x, threadIdx.y, threadIdx.z})
#define threadgroup_position_in_grid (uint3{blockIdx.x, blockIdx.y, blockIdx.z})
#define threadgroups_per_grid (uint3{gridDim.x, gridDim.y, gridDim.z})
#define threads_per_threadgroup (uint3{blockDim.x, blockDim.y, blockDim.z})
#define thread_index_in_threadgroup (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31u)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup >> 5)
enum class mem_flags { mem_none, mem_threadgroup, mem_device };
inline __device__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline __device__ void simdgroup_barrier(mem_flags) { __syncwarp(); }
template <typename V>
inline __device__ V simd_sum(V v) {
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
inline __device__ float simd_max(float v) {
  for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
template <typename V>
inline __device__ V simd_shuffle(V v, ushort lane) { return __shfl_sync(0xffffffffu, v, lane); }
template <typename V>
inline __device__ V simd_shuffle_xor(V v, ushort mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <typename V>
inline __device__ V simd_shuffle_down(V v, ushort by) { return __shfl_down_sync(0xffffffffu, v, by); }
template <typename To, typename From>
inline __device__ To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline __device__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
inline __device__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
inline __device__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
inline __device__ float sqrt_rn(float a) { return __fsqrt_rn(a); }
inline __device__ float round_even(float a) { return rintf(a); }
inline __device__ float power_of_two(float a) { return exp2f(a); }
