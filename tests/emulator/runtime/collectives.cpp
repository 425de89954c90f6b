// What a simdgroup's operations give, once all its lanes have met. Numbers as in metal/simd.h; quad operations are 32 more.
#include <cmath>
#include <cstring>

#include "grid.h"

enum Op { SUM, PRODUCT, MAX, MIN, AND, OR, XOR, INCLUSIVE_SUM, EXCLUSIVE_SUM, INCLUSIVE_PRODUCT, EXCLUSIVE_PRODUCT, SHUFFLE,
          SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE_UP, BROADCAST = 16, BROADCAST_FIRST, ROTATE_DOWN, ROTATE_UP, FILL_DOWN, FILL_UP,
          IS_FIRST, BALLOT, MATRIX_LOAD, MATRIX_STORE, MATRIX_MULTIPLY, QUAD = 32 };

const char* operation_name(int op) {
  static const char* names[] = {"simd_sum", "simd_product", "simd_max", "simd_min", "simd_and", "simd_or", "simd_xor",
                                "simd_prefix_inclusive_sum", "simd_prefix_exclusive_sum", "simd_prefix_inclusive_product",
                                "simd_prefix_exclusive_product", "simd_shuffle", "simd_shuffle_xor", "simd_shuffle_down",
                                "simd_shuffle_up", "?", "simd_broadcast", "simd_broadcast_first", "simd_shuffle_rotate_down",
                                "simd_shuffle_rotate_up", "simd_shuffle_and_fill_down", "simd_shuffle_and_fill_up", "simd_is_first",
                                "simd_ballot", "simdgroup_load", "simdgroup_store", "simdgroup_multiply_accumulate"};
  if (op == -1) return "threadgroup_barrier";
  if (op == -2) return "simdgroup_barrier";
  if (op >= QUAD) return "a quad operation";
  return names[op];
}

static float as_float(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
struct BFloat {  // rounded to nearest, half to even
  uint16_t bits;
  BFloat() = default;
  BFloat(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    bits = uint16_t(std::isnan(value) ? (wide >> 16) | 0x40 : (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  }
  operator float() const { return as_float(bits); }
};

template <typename T>
static T combine(int op, T a, T b) {
  switch (op) {
    case SUM: return T(a + b);
    case PRODUCT: return T(a * b);
    case MAX: return a < b ? b : a;
    case MIN: return b < a ? b : a;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == AND) return T(a & b);
    if (op == OR) return T(a | b);
    if (op == XOR) return T(a ^ b);
  }
  refuse("%s of a type that has none", operation_name(op));
  return a;
}

// The order is not told: a tree over lanes in an order drawn by the seed, as far as sums show it.
template <typename T>
static T reduce(int op, const T* values, uint32_t n) {
  T tree[SIMD];
  memcpy(tree, values, n * sizeof(T));
  for (uint32_t i = n; i > 1; i--) {
    uint32_t j = random_below(i);
    T t = tree[i - 1];
    tree[i - 1] = tree[j];
    tree[j] = t;
  }
  for (uint32_t left = n; left > 1; left = (left + 1) / 2)
    for (uint32_t i = 0; i < left / 2; i++) tree[i] = combine(op, tree[i], tree[left - 1 - i]);
  return tree[0];
}

static int32_t source_lane(int op, int32_t lane, int32_t arg, int32_t width) {  // -1: none
  switch (op) {
    case SHUFFLE: case BROADCAST: return arg < width ? arg : -1;
    case SHUFFLE_XOR: return lane ^ arg;
    case SHUFFLE_DOWN: case FILL_DOWN: return lane + arg < width ? lane + arg : -1;
    case SHUFFLE_UP: case FILL_UP: return lane >= arg ? lane - arg : -1;
    case ROTATE_DOWN: return (lane + arg) % width;
    case ROTATE_UP: return (lane + width - arg % width) % width;
    default: return 0;  // BROADCAST_FIRST
  }
}

template <typename T>
static void apply(int op, Fiber** lanes, uint32_t n, uint32_t element) {
  T in[SIMD], out[SIMD];
  for (uint32_t i = 0; i < n; i++) in[i] = static_cast<const T*>(lanes[i]->request.value)[element];
  if (op <= XOR) {
    T all = reduce(op, in, n);
    for (uint32_t i = 0; i < n; i++) out[i] = all;
  } else if (op <= EXCLUSIVE_PRODUCT) {
    bool sum = op == INCLUSIVE_SUM || op == EXCLUSIVE_SUM, inclusive = op == INCLUSIVE_SUM || op == INCLUSIVE_PRODUCT;
    T running = T(sum ? 0.0f : 1.0f);
    for (uint32_t i = 0; i < n; i++) {
      T next = combine(sum ? SUM : PRODUCT, running, in[i]);
      out[i] = inclusive ? next : running;
      running = next;
    }
  } else {
    for (uint32_t i = 0; i < n; i++) {
      const Request& r = lanes[i]->request;
      int32_t from = source_lane(op, int32_t(i), int32_t(r.arg), int32_t(n));
      if (op == BROADCAST && r.arg != lanes[0]->request.arg) refuse("lanes of a simd_broadcast name different lanes");
      if (from >= int32_t(n)) from = -1;
      if (from >= 0) out[i] = in[from];
      else if (op == FILL_DOWN || op == FILL_UP) {
        // The value filled in comes from the lane that the shuffle would wrap to.
        int32_t wrapped = op == FILL_DOWN ? int32_t(i + r.arg - n) : int32_t(n + i - r.arg);
        out[i] = static_cast<const T*>(lanes[wrapped % int32_t(n)]->request.fill)[element];
      } else memset(&out[i], 0xFF, sizeof(T));  // undefined in Metal: NaN shows, where it is used
    }
  }
  for (uint32_t i = 0; i < n; i++) static_cast<T*>(lanes[i]->request.value)[element] = out[i];
}

static void apply_typed(int op, int type, Fiber** lanes, uint32_t n, uint32_t element) {
  switch (type) {
    case 0: return apply<float>(op, lanes, n, element);
    case 1: return apply<_Float16>(op, lanes, n, element);
    case 2: return apply<BFloat>(op, lanes, n, element);
    case 3: return apply<int8_t>(op, lanes, n, element);
    case 4: return apply<uint8_t>(op, lanes, n, element);
    case 5: return apply<int16_t>(op, lanes, n, element);
    case 6: return apply<uint16_t>(op, lanes, n, element);
    case 7: return apply<int32_t>(op, lanes, n, element);
    case 8: return apply<uint32_t>(op, lanes, n, element);
    case 9: return apply<int64_t>(op, lanes, n, element);
    default: return apply<uint64_t>(op, lanes, n, element);
  }
}

// 8 x 8 of float: a0 a1 b0 b1 c0 c1 of each lane -> d0 d1. Products are added one by one, each with one rounding.
static void multiply(Fiber** lanes, uint32_t n) {
  if (n != SIMD) return refuse("simdgroup_multiply_accumulate in a simdgroup of %u threads", n);
  float m[3][8][8];
  uint32_t order[8];
  for (uint32_t i = 0; i < SIMD; i++) {
    const float* v = static_cast<const float*>(lanes[i]->request.value);
    uint32_t row = (i / 4 & 4) + i / 2 % 4, column = (i / 4 & 2) * 2 + i % 2 * 2;
    for (int k = 0; k < 3; k++)
      for (int j = 0; j < 2; j++) m[k][row][column + j] = v[2 * k + j];
  }
  for (uint32_t k = 0; k < 8; k++) order[k] = k;
  for (uint32_t k = 8; k > 1; k--) {
    uint32_t j = random_below(k), t = order[k - 1];
    order[k - 1] = order[j];
    order[j] = t;
  }
  for (uint32_t i = 0; i < SIMD; i++) {
    float* v = static_cast<float*>(lanes[i]->request.value);
    uint32_t row = (i / 4 & 4) + i / 2 % 4, column = (i / 4 & 2) * 2 + i % 2 * 2;
    for (int j = 0; j < 2; j++) {
      float sum = m[2][row][column + j];
      for (uint32_t k : order) sum = std::fma(m[0][row][k], m[1][k][column + j], sum);
      v[j] = sum;
    }
  }
}

extern "C" void emulator_simd(int op, int type, void* value, uint32_t count, uint32_t arg, const void* fill);
extern "C" void emulator_matrix_multiply(float* operands) { emulator_simd(MATRIX_MULTIPLY, 0, operands, 1, 0, operands); }

void resolve_collective(Fiber** lanes, uint32_t n) {
  const Request first = lanes[0]->request;
  if (first.op == MATRIX_LOAD || first.op == MATRIX_STORE) return;
  if (first.op == MATRIX_MULTIPLY) return multiply(lanes, n);
  if (first.op == IS_FIRST) {
    for (uint32_t i = 0; i < n; i++) *static_cast<uint32_t*>(lanes[i]->request.value) = i == 0;
    return;
  }
  if (first.op == BALLOT) {
    uint64_t bits = 0;
    for (uint32_t i = 0; i < n; i++) bits |= uint64_t(*static_cast<uint64_t*>(lanes[i]->request.value) != 0) << i;
    for (uint32_t i = 0; i < n; i++) *static_cast<uint64_t*>(lanes[i]->request.value) = bits;
    return;
  }
  uint32_t width = first.op >= QUAD ? 4 : n;
  for (uint32_t start = 0; start < n; start += width)
    for (uint32_t element = 0; element < first.count; element++)
      apply_typed(first.op % QUAD, first.type, lanes + start, n - start < width ? n - start : width, element);
}
