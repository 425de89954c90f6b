// Rounding and shapes that every kernel shares. Valid Metal; cuda_compat.h gives CUDA the same names before it.
#ifndef BITNET_CUDA
#define FN inline __attribute__((always_inline))  // before every function of ours; CUDA wants to be told "device" there
#define UNROLL _Pragma("clang loop unroll(full)")  // for local arrays: Metal keeps them in memory otherwise
#define THREADGROUP_POINTER(type) threadgroup type*  // to an array declared threadgroup
// One rounding an operation: the reference never contracts a product and a sum; Metal does so in every math mode where
// the source does not forbid it. A plain quotient or root is rounded right in some math modes, a precise one in all.
inline float mul_rn(float a, float b) {
#pragma clang fp contract(off)
  return a * b;
}
inline float add_rn(float a, float b) {
#pragma clang fp contract(off)
  return a + b;
}
inline float div_rn(float a, float b) { return metal::precise::divide(a, b); }
inline float sqrt_rn(float a) { return metal::precise::sqrt(a); }
inline float round_even(float a) { return metal::rint(a); }
inline float power_of_two(float a) { return metal::exp2(a); }
#endif
