// Ternary mat-vec from trits5 words: M rows of int8 codes (as halves, layout "trits"), R rows of the weight a simdgroup.
// Template: T output; M; R; SCALES 0 tensor, 1 row; BIAS; RESIDUAL. M R at most 32: lane m R + r finishes output m, r.
// x: uint [M, stride], rows of layout trits: 10 words of halves, the sum of the row's codes, s; w: uint [N, words]; y: T [M, N].
// Every product and partial sum is a whole number of 2^-14 below 2^24 of them while K <= 65536: exact in any order.
const uint lane = thread_index_in_simdgroup;
const uint row0 = thread_position_in_grid.y * R;
const uint rows = w_shape[0], words = w_shape[1], stride = x_shape[1];
const device uint2* xp = (const device uint2*)x + 5 * lane;  // never fewer than 8 values, so never in `constant`
decltype(w + 0) row[R];  // words may be: the pointer's address space is the input's own
float acc[M][R];
UNROLL for (uint r = 0; r < R; r++) {
  row[r] = w + min(row0 + r, rows - 1) * words;  // rows past the end repeat the last one and are not stored
  UNROLL for (uint m = 0; m < M; m++) acc[m][r] = 0.0f;
}
for (uint i = lane; i < words; i += 32) {
  uint c[R][10];
  UNROLL for (uint r = 0; r < R; r++) {
    const uint u = row[r][i];
    trits_digits(trits_first(u), c[r]);
    trits_digits(trits_second(u), c[r] + 5);
  }
  UNROLL for (uint m = 0; m < M; m++) {
    UNROLL for (uint j = 0; j < 5; j++) {
      const uint2 x = xp[m * (stride / 2) + j];
      UNROLL for (uint r = 0; r < R; r++) {
        acc[m][r] = trits_mac(c[r][2 * j], x.x, acc[m][r]);
        acc[m][r] = trits_mac(c[r][2 * j + 1], x.y, acc[m][r]);
      }
    }
  }
  xp += 160;
}
float mine = 0.0f;
UNROLL for (uint m = 0; m < M; m++) {
  UNROLL for (uint r = 0; r < R; r++) {
    const float sum = simd_sum(acc[m][r]);
    if (lane == m * R + r) mine = sum;
  }
}
const uint m = lane / R, n = row0 + lane % R;
if (m < M && n < rows) {
  const uint tail = m * stride + 10 * words;
  const float y1 = scaled(mine * 16384.0f - as_type<float>(x[tail]), as_type<float>(x[tail + 1]), scale_of<SCALES>(scale, n));
  const uint o = m * rows + n;
  y[o] = finish<T, BIAS, RESIDUAL>(y1, BIAS ? float(bias[n]) : 0.0f, RESIDUAL ? float(residual[o]) : 0.0f);
}
