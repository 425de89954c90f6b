// Conversions that the compiler calls for where the processor has none; the C library of older systems lacks bfloat's.
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
