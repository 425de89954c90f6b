// Metal's mathematical functions, for scalars and vectors of float and half, and integers; float's are the C library's.
#pragma once
#include "types.h"

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

// The compiler's own names, which MLX's bfloat functions call.
#define UNARY(name, expression) METAL_FUNC float __metal_##name(float x, int = 0) { return expression; }
UNARY(fabs, __builtin_fabsf(x)) UNARY(acos, __builtin_acosf(x)) UNARY(acosh, __builtin_acoshf(x)) UNARY(asin, __builtin_asinf(x))
UNARY(asinh, __builtin_asinhf(x)) UNARY(atan, __builtin_atanf(x)) UNARY(atanh, __builtin_atanhf(x)) UNARY(ceil, __builtin_ceilf(x))
UNARY(cos, __builtin_cosf(x)) UNARY(cosh, __builtin_coshf(x)) UNARY(cospi, __builtin_cosf(x * 3.14159265358979f))
UNARY(exp, __builtin_expf(x)) UNARY(exp2, __builtin_exp2f(x)) UNARY(exp10, __builtin_powf(10.0f, x)) UNARY(floor, __builtin_floorf(x))
UNARY(log, __builtin_logf(x)) UNARY(log2, __builtin_log2f(x)) UNARY(log10, __builtin_log10f(x)) UNARY(rint, __builtin_rintf(x))
UNARY(round, __builtin_roundf(x)) UNARY(sin, __builtin_sinf(x)) UNARY(sinh, __builtin_sinhf(x))
UNARY(sinpi, __builtin_sinf(x * 3.14159265358979f)) UNARY(tan, __builtin_tanf(x)) UNARY(tanh, __builtin_tanhf(x))
UNARY(tanpi, __builtin_tanf(x * 3.14159265358979f)) UNARY(trunc, __builtin_truncf(x)) UNARY(fract, x - __builtin_floorf(x))
#ifdef EMULATOR_FAST_MATH  // an approximation, as a GPU's own square root and division are
UNARY(rsqrt, (1.0f / __builtin_sqrtf(x)) * 1.0000001f)
UNARY(sqrt, __builtin_sqrtf(x) * 1.0000001f)
#else
UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
UNARY(sqrt, __builtin_sqrtf(x))
#endif
#undef UNARY
#define BINARY(name, expression) METAL_FUNC float __metal_##name(float x, float y, int = 0) { return expression; }
BINARY(atan2, __builtin_atan2f(x, y)) BINARY(divide, x / y) BINARY(fmax, __builtin_fmaxf(x, y)) BINARY(fmin, __builtin_fminf(x, y))
BINARY(fmod, __builtin_fmodf(x, y)) BINARY(pow, __builtin_powf(x, y)) BINARY(powr, __builtin_powf(x, y))
BINARY(nextafter, __builtin_nextafterf(x, y)) BINARY(copysign, __builtin_copysignf(x, y)) BINARY(fdim, __builtin_fdimf(x, y))
#undef BINARY
METAL_FUNC float __metal_fmax3(float x, float y, float z, int = 0) { return __builtin_fmaxf(x, __builtin_fmaxf(y, z)); }
METAL_FUNC float __metal_fmin3(float x, float y, float z, int = 0) { return __builtin_fminf(x, __builtin_fminf(y, z)); }
METAL_FUNC float __metal_fmedian3(float x, float y, float z, int = 0) {
  return __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}
METAL_FUNC float __metal_ldexp(float x, int k, int = 0) { return __builtin_ldexpf(x, k); }
extern "C" float emulator_frexp(float x, thread int* exponent);
METAL_FUNC float __metal_frexp(float x, thread int* exponent) { return emulator_frexp(x, exponent); }
extern "C" float emulator_split_fma(float a, float b, float c);
METAL_FUNC float __metal_fma(float a, float b, float c) {
#ifdef EMULATOR_SPLIT_FMA  // a compiler that takes fma apart
  return emulator_split_fma(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

namespace metal {
// Scalars, and vectors element by element.
#define OVER_VECTORS(T, name, n, call)                      \
  METAL_FUNC vec<T, n> name(vec<T, n> x) {                  \
    vec<T, n> y;                                            \
    for (int i = 0; i < n; i++) y[i] = T(call(float(x[i]))); \
    return y;                                               \
  }
#define OVER(name, call)                                        \
  METAL_FUNC float name(float x) { return call(x); }            \
  METAL_FUNC half name(half x) { return half(call(float(x))); } \
  OVER_VECTORS(float, name, 2, call) OVER_VECTORS(float, name, 3, call) OVER_VECTORS(float, name, 4, call) \
  OVER_VECTORS(half, name, 2, call) OVER_VECTORS(half, name, 3, call) OVER_VECTORS(half, name, 4, call)
#define OVER2_VECTORS(T, name, n, call)                                     \
  METAL_FUNC vec<T, n> name(vec<T, n> x, vec<T, n> z) {                     \
    vec<T, n> y;                                                            \
    for (int i = 0; i < n; i++) y[i] = T(call(float(x[i]), float(z[i])));   \
    return y;                                                               \
  }
#define OVER2(name, call)                                                           \
  METAL_FUNC float name(float x, float y) { return call(x, y); }                    \
  METAL_FUNC half name(half x, half y) { return half(call(float(x), float(y))); }   \
  OVER2_VECTORS(float, name, 2, call) OVER2_VECTORS(float, name, 3, call) OVER2_VECTORS(float, name, 4, call) \
  OVER2_VECTORS(half, name, 2, call) OVER2_VECTORS(half, name, 3, call) OVER2_VECTORS(half, name, 4, call)
#define ALL_FUNCTIONS                                                                                            \
  OVER(abs, __metal_fabs) OVER(fabs, __metal_fabs) OVER(acos, __metal_acos) OVER(acosh, __metal_acosh)           \
  OVER(asin, __metal_asin) OVER(asinh, __metal_asinh) OVER(atan, __metal_atan) OVER(atanh, __metal_atanh)        \
  OVER(ceil, __metal_ceil) OVER(cos, __metal_cos) OVER(cosh, __metal_cosh) OVER(exp, __metal_exp)                \
  OVER(exp2, __metal_exp2) OVER(exp10, __metal_exp10) OVER(floor, __metal_floor) OVER(fract, __metal_fract)      \
  OVER(log, __metal_log) OVER(log2, __metal_log2) OVER(log10, __metal_log10) OVER(rint, __metal_rint)            \
  OVER(round, __metal_round) OVER(sin, __metal_sin) OVER(sinh, __metal_sinh) OVER(tan, __metal_tan)              \
  OVER(tanh, __metal_tanh) OVER(trunc, __metal_trunc)                                                            \
  OVER2(atan2, __metal_atan2) OVER2(fmax, __metal_fmax) OVER2(fmin, __metal_fmin)                                \
  OVER2(max, __metal_fmax) OVER2(min, __metal_fmin) OVER2(fmod, __metal_fmod) OVER2(pow, __metal_pow)            \
  OVER2(powr, __metal_powr) OVER2(copysign, __metal_copysign) OVER2(fdim, __metal_fdim)
ALL_FUNCTIONS
OVER(sqrt, __metal_sqrt) OVER(rsqrt, __metal_rsqrt) OVER2(divide, __metal_divide)
namespace fast {
ALL_FUNCTIONS
OVER(sqrt, __metal_sqrt) OVER(rsqrt, __metal_rsqrt) OVER2(divide, __metal_divide)
}
#pragma float_control(precise, on, push)
namespace precise {
METAL_FUNC float rounded_sqrt(float x) { return __builtin_sqrtf(x); }
METAL_FUNC float rounded_rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
METAL_FUNC float rounded_divide(float x, float y) { return x / y; }
ALL_FUNCTIONS
OVER(sqrt, rounded_sqrt) OVER(rsqrt, rounded_rsqrt) OVER2(divide, rounded_divide)
}
#pragma float_control(pop)
#undef ALL_FUNCTIONS
#undef OVER
#undef OVER2
#undef OVER_VECTORS
#undef OVER2_VECTORS

METAL_FUNC float fma(float a, float b, float c) { return __metal_fma(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return half(__metal_fma(float(a), float(b), float(c))); }
#define FMA_VECTOR(T, n)                                                   \
  METAL_FUNC vec<T, n> fma(vec<T, n> a, vec<T, n> b, vec<T, n> c) {        \
    vec<T, n> y;                                                           \
    for (int i = 0; i < n; i++) y[i] = fma(a[i], b[i], c[i]);              \
    return y;                                                              \
  }
FMA_VECTOR(float, 2) FMA_VECTOR(float, 3) FMA_VECTOR(float, 4) FMA_VECTOR(half, 2) FMA_VECTOR(half, 3) FMA_VECTOR(half, 4)
#undef FMA_VECTOR

// Integers.
#define INTEGER(T, U)                                                                            \
  METAL_FUNC T max(T a, T b) { return a < b ? b : a; }                                           \
  METAL_FUNC T min(T a, T b) { return b < a ? b : a; }                                           \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }                      \
  METAL_FUNC T clz(T x) { return x ? __builtin_clzl(U(x)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); } \
  METAL_FUNC T ctz(T x) { return x ? __builtin_ctzl(U(x)) : 8 * sizeof(T); }                     \
  METAL_FUNC T popcount(T x) { return __builtin_popcountl(U(x)); }                               \
  METAL_FUNC T extract_bits(T x, uint offset, uint bits) {                                       \
    if (bits == 0) return T(0);                                                                  \
    return T(U(x) << (8 * sizeof(T) - offset - bits)) >> (8 * sizeof(T) - bits);                 \
  }                                                                                              \
  METAL_FUNC T insert_bits(T base, T insert, uint offset, uint bits) {                           \
    U mask = U((bits >= 8 * sizeof(T) ? U(0) : U(U(1) << bits)) - 1) << offset;                  \
    return T((U(base) & ~mask) | ((U(insert) << offset) & mask));                                \
  }
INTEGER(char, uchar) INTEGER(int8_t, uchar) INTEGER(uchar, uchar) INTEGER(short, ushort) INTEGER(ushort, ushort) INTEGER(int, uint)
INTEGER(uint, uint) INTEGER(long, ulong) INTEGER(ulong, ulong)
#undef INTEGER
METAL_FUNC short abs(short x) { return x < 0 ? -x : x; }
METAL_FUNC int abs(int x) { return x < 0 ? -x : x; }
METAL_FUNC long abs(long x) { return x < 0 ? -x : x; }
METAL_FUNC uint abs(uint x) { return x; }
METAL_FUNC int mulhi(int a, int b) { return int((long(a) * long(b)) >> 32); }
METAL_FUNC uint mulhi(uint a, uint b) { return uint((ulong(a) * ulong(b)) >> 32); }
METAL_FUNC int mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }
METAL_FUNC int mad24(int a, int b, int c) { return mul24(a, b) + c; }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
template <typename T> METAL_FUNC T rotate(T x, T by) {
  constexpr uint bits = 8 * sizeof(T);
  uint n = uint(by) % bits;
  return n ? T((x << n) | (x >> (bits - n))) : x;
}

METAL_FUNC float clamp(float x, float low, float high) { return fmin(fmax(x, low), high); }
METAL_FUNC half clamp(half x, half low, half high) { return fmin(fmax(x, low), high); }
template <typename T, int n> METAL_FUNC vec<T, n> clamp(vec<T, n> x, T low, T high) {
  vec<T, n> y;
  for (int i = 0; i < n; i++) y[i] = clamp(x[i], low, high);
  return y;
}
METAL_FUNC float saturate(float x) { return clamp(x, 0.0f, 1.0f); }
METAL_FUNC float mix(float a, float b, float t) { return a + (b - a) * t; }
METAL_FUNC float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
METAL_FUNC float step(float edge, float x) { return x < edge ? 0.0f : 1.0f; }
METAL_FUNC float ldexp(float x, int k) { return __metal_ldexp(x, k); }
METAL_FUNC float frexp(float x, thread int& exponent) { return __metal_frexp(x, &exponent); }
METAL_FUNC float max3(float x, float y, float z) { return __metal_fmax3(x, y, z); }
METAL_FUNC float min3(float x, float y, float z) { return __metal_fmin3(x, y, z); }
METAL_FUNC bool isnan(float x) { return __builtin_isnan(x); }
METAL_FUNC bool isinf(float x) { return __builtin_isinf(x); }
METAL_FUNC bool isfinite(float x) { return !isnan(x) && !isinf(x); }
METAL_FUNC bool signbit(float x) { return as_type<int>(x) < 0; }
template <typename T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <typename T, int n> METAL_FUNC T dot(vec<T, n> a, vec<T, n> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < n; i++) sum += a[i] * b[i];
  return sum;
}
template <typename T> struct numeric_limits;
#define LIMITS_INTEGER(T, low, high)                                     \
  template <> struct numeric_limits<T> {                                 \
    static constexpr T max() { return T(high); }                         \
    static constexpr T min() { return T(low); }                          \
    static constexpr T lowest() { return T(low); }                       \
  };
LIMITS_INTEGER(char, -128, 127) LIMITS_INTEGER(int8_t, -128, 127) LIMITS_INTEGER(uchar, 0, 255) LIMITS_INTEGER(short, -32768, 32767)
LIMITS_INTEGER(ushort, 0, 65535) LIMITS_INTEGER(int, -2147483647 - 1, 2147483647) LIMITS_INTEGER(uint, 0, 4294967295u)
LIMITS_INTEGER(long, -9223372036854775807l - 1, 9223372036854775807l) LIMITS_INTEGER(ulong, 0, 18446744073709551615ul)
#define LIMITS_FLOAT(T, bits, least, most, eps, inf, nan)                              \
  template <> struct numeric_limits<T> {                                               \
    static constexpr T max() { return __builtin_bit_cast(T, bits(most)); }             \
    static constexpr T min() { return __builtin_bit_cast(T, bits(least)); }            \
    static constexpr T lowest() { return -max(); }                                     \
    static constexpr T epsilon() { return __builtin_bit_cast(T, bits(eps)); }          \
    static constexpr T infinity() { return __builtin_bit_cast(T, bits(inf)); }         \
    static constexpr T quiet_NaN() { return __builtin_bit_cast(T, bits(nan)); }        \
  };
LIMITS_FLOAT(float, uint, 0x00800000, 0x7F7FFFFF, 0x34000000, 0x7F800000, 0x7FC00000)
LIMITS_FLOAT(half, ushort, 0x0400, 0x7BFF, 0x1400, 0x7C00, 0x7E00)
LIMITS_FLOAT(bfloat, ushort, 0x0080, 0x7F7F, 0x3C00, 0x7F80, 0x7FC0)
#undef LIMITS_INTEGER
#undef LIMITS_FLOAT
}  // namespace metal

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define M_PI_F 3.14159274101257f
#define M_SQRT1_2_F 0.707106781186547f
#define M_2_SQRTPI_F 1.12837916709551f
#define M_LN2_F 0.693147180559945f
#define M_LOG2E_F 1.44269504088896f
#define FLT_MAX 3.40282346638528859811704183484516925e+38f
#define FLT_MIN 1.17549435082228750796873653722224568e-38f
#define FLT_EPSILON 1.1920929e-07f
#define HALF_MAX 65504.0h
