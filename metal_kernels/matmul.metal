// Ternary matrix product for Metal, in simdgroup matrices of halves with float sums. Each product is y^T = W x^T.
// In an 8 x 8 matrix a lane holds row r and columns 2 q and 2 q + 1. Since a sum does not care about the order of k, the
// lane takes from row r of the weight word q of four, whole: its codes p and p + 8 are the two columns of step p, so a
// weight goes from memory to the matrix without shared memory. Then row k of the right matrix is, at step p, activation
// 8 k + p of 64: eight neighbours for the eight steps, of activations 2 q and 2 q + 1, read from threadgroup memory in
// two loads. All operands are whole numbers, every partial sum is one below 2^24: exact for K up to 131,072.
// Template: T output; MT, NT tiles of 8 rows of activations and of weights that a simdgroup takes; SG simdgroups of a
// threadgroup, along N; SCALES 0 tensor, 1 row, 2 group of 128; BIAS; RESIDUAL.
// x: uint [M, 8 words + 4], rows of layout plain: halves, their sum (not used) and s; w: uint [N, words]; y: T [M, N].
// Grid (32 ceil(N / (8 NT SG)), SG ceil(M / (8 MT)), 1), threadgroup (32, SG, 1).
constexpr uint ROWS = MT * 8, THREADS = 32 * SG, ITEMS = (ROWS * 4 + THREADS - 1) / THREADS;
constexpr uint PITCH = 20;  // 16-byte pieces of two rows of 64 activations, and four more so that banks differ
threadgroup uint4 tile[2 * (ROWS / 2) * PITCH];
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup, id = 32 * simd + lane;
const uint r = (lane / 4 & 4) + lane / 2 % 4, q = (lane / 4 & 2) + lane % 2;
const uint rows = x_shape[0], columns = w_shape[0], words = w_shape[1], chunks = words / 4, stride = 8 * words + 4;
const uint row0 = threadgroup_position_in_grid.y * ROWS;
const uint column0 = (threadgroup_position_in_grid.x * SG + simd) * (8 * NT) + r * NT;  // this lane's first
simdgroup_matrix<float, 8, 8> acc[MT][NT];
float2 out[MT][NT];  // with group scales
uint at[NT], next[NT];
UNROLL for (uint n = 0; n < NT; n++) {
  at[n] = min(column0 + n, columns - 1) * words + q;  // past the end: the last row, not stored
  next[n] = w[at[n]];
  UNROLL for (uint m = 0; m < MT; m++) {
    acc[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    out[m][n] = float2(0.0f);
  }
}
// A thread brings eight activations of two rows, and lays them down in pairs: steps 0 to 3, then 4 to 7.
uint4 first[ITEMS], second[ITEMS];
uint from[ITEMS], below[ITEMS];
UNROLL for (uint i = 0; i < ITEMS; i++) {
  const uint item = min(id + i * THREADS, ROWS * 4 - 1), pair = item / 8, k = item % 8;
  from[i] = min(row0 + 2 * pair, rows - 1) * (stride / 4) + k;
  below[i] = min(row0 + 2 * pair + 1, rows - 1) * (stride / 4) + k;
  first[i] = ((const device uint4*)x)[from[i]];
  second[i] = ((const device uint4*)x)[below[i]];
}
for (uint chunk = 0; chunk < chunks; chunk++) {
  const uint buffer = (chunk % 2) * (ROWS / 2) * PITCH;
  UNROLL for (uint i = 0; i < ITEMS; i++) {
    const uint item = id + i * THREADS, to = buffer + item / 8 * PITCH + item % 8;
    if (ROWS * 4 % THREADS == 0 || item < ROWS * 4) {
      tile[to] = pairs(first[i].xy, second[i].xy);
      tile[to + 8] = pairs(first[i].zw, second[i].zw);
    }
  }
  uint word[NT];
  UNROLL for (uint n = 0; n < NT; n++) word[n] = next[n];
  if (chunk + 1 < chunks) {  // on their way while this chunk is computed
    UNROLL for (uint n = 0; n < NT; n++) next[n] = w[at[n] + 4 * (chunk + 1)];
    UNROLL for (uint i = 0; i < ITEMS; i++) {
      first[i] = ((const device uint4*)x)[from[i] + 8 * (chunk + 1)];
      second[i] = ((const device uint4*)x)[below[i] + 8 * (chunk + 1)];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // two tiles in turns: the one before may still be read
  Halves t[NT][8];
  UNROLL for (uint n = 0; n < NT; n++) ternary_halves(word[n], t[n]);
  UNROLL for (uint m = 0; m < MT; m++) {
    const uint x_at = buffer + (m * 4 + q) * PITCH + r;
    const uint4 low = tile[x_at], high = tile[x_at + 8];
    const uint both[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    UNROLL for (uint p = 0; p < 8; p++) {
      simdgroup_matrix<half, 8, 8> right;
      elements(right) = as_type<half2>(both[p]);
      UNROLL for (uint n = 0; n < NT; n++) {
        simdgroup_matrix<half, 8, 8> left;
        elements(left) = t[n][p];
        simdgroup_multiply_accumulate(acc[m][n], left, right, acc[m][n]);
      }
    }
  }
  if (SCALES == 2 && chunk % 2 == 1) {
    UNROLL for (uint n = 0; n < NT; n++) {
      const float of_group = scale[min(column0 + n, columns - 1) * (words / 8) + chunk / 2];
      UNROLL for (uint m = 0; m < MT; m++) {
        const uint row = row0 + m * 8 + 2 * q;
        const float2 sum = elements(acc[m][n]);
        const float s0 = as_type<float>(x[min(row, rows - 1) * stride + 8 * words + 1]);
        const float s1 = as_type<float>(x[min(row + 1, rows - 1) * stride + 8 * words + 1]);
        out[m][n].x = add_rn(out[m][n].x, scaled(sum.x, s0, of_group));
        out[m][n].y = add_rn(out[m][n].y, scaled(sum.y, s1, of_group));
        elements(acc[m][n]) = float2(0.0f);
      }
    }
  }
}
UNROLL for (uint m = 0; m < MT; m++) {
  UNROLL for (uint e = 0; e < 2; e++) {
    const uint row = row0 + m * 8 + 2 * q + e;
    if (row < rows) {
      const float my_s = as_type<float>(x[row * stride + 8 * words + 1]);
      UNROLL for (uint n = 0; n < NT; n++) {
        const uint column = column0 + n, to = row * columns + column;
        if (column < columns) {
          const float v = SCALES == 2 ? out[m][n][e]
                                      : scaled(elements(acc[m][n])[e], my_s, scale_of<SCALES>(scale, column));
          y[to] = finish<T, BIAS, RESIDUAL>(v, BIAS ? float(bias[column]) : 0.0f, RESIDUAL ? float(residual[to]) : 0.0f);
        }
      }
    }
  }
}
