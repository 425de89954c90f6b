// A device's own ways with floats, and conversions that the compiler calls for where the processor has none; the C library of older systems lacks bfloat's.
#include <cmath>
#include <cstdint>
#include <cstring>

static uint16_t rounded(float value) {  // to nearest, half to even
  uint32_t wide;
  memcpy(&wide, &value, 4);
  if (std::isnan(value)) return uint16_t((wide >> 16) | 0x40);
  return uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
}

extern "C" __bf16 __truncsfbf2(float value) {
  uint16_t bits = rounded(value);
  __bf16 result;
  memcpy(&result, &bits, 2);
  return result;
}

extern "C" float emulator_split_fma(float a, float b, float c) {
  volatile float product = a * b;
  return product + c;
}

extern "C" float emulator_frexp(float x, int* exponent) { return __builtin_frexpf(x, exponent); }

extern "C" _Float16 emulator_flush_half(_Float16 value) {  // a device that takes half denormals as zero
  uint16_t bits;
  memcpy(&bits, &value, 2);
  if (!(bits & 0x7C00)) bits &= 0x8000;
  memcpy(&value, &bits, 2);
  return value;
}

extern "C" float emulator_rough_divide(float a, float b) {  // as fast math divides
  volatile float inverse = 1.0f / b;
  return a * inverse;
}
