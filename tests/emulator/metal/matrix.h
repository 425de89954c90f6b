// simdgroup_matrix 8 x 8: lane l holds row (l/4 & 4) + l/2 % 4, columns (l/4 & 2) * 2 + l % 2 * 2 and the next one,
// the layout that MLX's steel/gemm/mma.h relies on.
#pragma once
#include "simd.h"

extern "C" void emulator_matrix_multiply(thread float* operands);  // a0 a1 b0 b1 c0 c1 -> d0 d1 in place of a0 a1
extern "C" uint emulator_lane();

namespace metal {
template <typename T, int rows, int columns>
struct simdgroup_matrix {
  static_assert(rows == 8 && columns == 8, "simdgroup_matrix is 8 x 8");
  typedef vec<T, 2> storage_type;
  storage_type elements;
  simdgroup_matrix() thread = default;
  explicit constexpr simdgroup_matrix(T diagonal) thread : elements(0) {
    uint lane = emulator_lane();
    for (int i = 0; i < 2; i++) elements[i] = matrix_row(lane) == matrix_column(lane) + i ? diagonal : T(0);
  }
  thread storage_type& thread_elements() thread { return elements; }
  const thread storage_type& thread_elements() const thread { return elements; }
  static constexpr uint matrix_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
  static constexpr uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int rows, int columns, typename U>
METAL_FUNC simdgroup_matrix<T, rows, columns> make_filled_simdgroup_matrix(U value) {
  simdgroup_matrix<T, rows, columns> m;
  m.elements = typename simdgroup_matrix<T, rows, columns>::storage_type(T(value));
  return m;
}

template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                              thread simdgroup_matrix<B, 8, 8>& b, thread simdgroup_matrix<C, 8, 8>& c) {
  float operands[6] = {float(a.elements[0]), float(a.elements[1]), float(b.elements[0]),
                       float(b.elements[1]), float(c.elements[0]), float(c.elements[1])};
  emulator_matrix_multiply(operands);
  d.elements[0] = D(operands[0]);
  d.elements[1] = D(operands[1]);
}
template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
                                   thread simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(0);
  simdgroup_multiply_accumulate(d, a, b, zero);
}

#define MATRIX_MEMORY(space)                                                                                             \
  template <typename T>                                                                                                  \
  METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const space T* from, ulong row_elements = 8,       \
                                 ulong2 origin = ulong2(0), bool transposed = false) {                                   \
    emulator_simd(24, 8, 0, 0, 0, 0);                                                                                    \
    uint lane = emulator_lane(), r = m.matrix_row(lane) , c = m.matrix_column(lane);                                     \
    for (uint i = 0; i < 2; i++)                                                                                         \
      m.elements[i] = transposed ? from[(origin.y + c + i) * row_elements + origin.x + r]                                \
                                 : from[(origin.y + r) * row_elements + origin.x + c + i];                               \
  }                                                                                                                      \
  template <typename T>                                                                                                  \
  METAL_FUNC void simdgroup_store(thread const simdgroup_matrix<T, 8, 8>& m, space T* to, ulong row_elements = 8,        \
                                  ulong2 origin = ulong2(0), bool transposed = false) {                                  \
    emulator_simd(25, 8, 0, 0, 0, 0);                                                                                    \
    uint lane = emulator_lane(), r = m.matrix_row(lane), c = m.matrix_column(lane);                                      \
    for (uint i = 0; i < 2; i++) {                                                                                       \
      if (transposed) to[(origin.y + c + i) * row_elements + origin.x + r] = m.elements[i];                              \
      else to[(origin.y + r) * row_elements + origin.x + c + i] = m.elements[i];                                         \
    }                                                                                                                    \
  }
MATRIX_MEMORY(device)
MATRIX_MEMORY(threadgroup)
#undef MATRIX_MEMORY
}  // namespace metal
