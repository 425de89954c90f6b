// Codes as halves -1, 0, 1, without conversions: masks (half_mantissa.h), then one half fma each. After half_mantissa.h.
// Step p of a word is codes p and p + 8. The mask gives 2^-9 (1024 + 4^p c) for p <= 4, 2^-14 c, -2^-11 t and -2 t; the
// factor is a power of two and the result -1, 0 or 1, so every operation is exact, fused or not.
#include <metal_simdgroup_matrix>
typedef half2 Halves;
FN void ternary_halves(uint w, thread Halves (&t)[8]) {
  uint h[8];
  halves_of(w, h);
  t[0] = fma(as_type<half2>(h[0]), half2(512.0h), half2(-1025.0h));
  t[1] = fma(as_type<half2>(h[1]), half2(128.0h), half2(-257.0h));
  t[2] = fma(as_type<half2>(h[2]), half2(32.0h), half2(-65.0h));
  t[3] = fma(as_type<half2>(h[3]), half2(8.0h), half2(-17.0h));
  t[4] = fma(as_type<half2>(h[4]), half2(2.0h), half2(-5.0h));
  t[5] = fma(as_type<half2>(h[5]), half2(16384.0h), half2(-1.0h));
  t[6] = as_type<half2>(h[6]) * half2(-2048.0h);
  t[7] = as_type<half2>(h[7]) * half2(-0.5h);
}

// Four halves of one row and four of the next -> four half2, each an element of both.
FN uint4 pairs(uint2 a, uint2 b) {
  const half2 a0 = as_type<half2>(a.x), a1 = as_type<half2>(a.y), b0 = as_type<half2>(b.x), b1 = as_type<half2>(b.y);
  return uint4(as_type<uint>(half2(a0.x, b0.x)), as_type<uint>(half2(a0.y, b0.y)),
               as_type<uint>(half2(a1.x, b1.x)), as_type<uint>(half2(a1.y, b1.y)));
}

// A lane's two elements of a matrix, as MLX's own kernels reach them.
template <typename T>
FN thread vec<T, 2>& elements(thread simdgroup_matrix<T, 8, 8>& m) {
  return reinterpret_cast<thread vec<T, 2>&>(m.thread_elements());
}
