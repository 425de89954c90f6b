// Ternary mat-vec on activations that are not quantised: sums in float32. A simdgroup takes R rows of the weight, M of
// x. Template: T of x, residual and y; M; R; W words a load; SCALES 0 tensor, 1 row, 2 group of 128; BIAS; RESIDUAL;
// RAGGED, K is no multiple of 128. M * R <= 32. x: T [M, K]; w: uint [N, words], codes past K are 1; y: T [M, N].
// The order of the sums is fixed, but not the reference's: within K * 2^-24 * sum|x| * scale of it.
const uint lane = thread_index_in_simdgroup, row0 = thread_position_in_grid.y * R;
const uint rows = w_shape[0], steps = w_shape[1] / W, groups = w_shape[1] / 8, k = x_shape[1];
if (row0 >= rows) return;
typedef typename Words<W>::type Load;
const device Load* wp = (const device Load*)w + size_t(row0) * steps + lane;
auto xp = x + 16 * W * lane;
int left = int(k) - int(16 * W * lane);
uint at[R], scale_at[R];
Places acc[M][R];
float added[M], sum[M][R];
UNROLL for (uint r = 0; r < R; r++) {
  at[r] = min(r, rows - 1 - row0) * steps;
  scale_at[r] = min(row0 + r, rows - 1) * (SCALES == 2 ? groups : 1) + (SCALES == 2 ? W * lane / 8 : 0);
}
UNROLL for (uint m = 0; m < M; m++) {
  added[m] = 0.0f;
  UNROLL for (uint r = 0; r < R; r++) acc[m][r].five = acc[m][r].six = acc[m][r].seven = sum[m][r] = 0.0f;
}
for (uint i = lane; i < steps; i += 32) {
  Load u[R];
  UNROLL for (uint r = 0; r < R; r++) u[r] = wp[at[r]];
  UNROLL for (uint j = 0; j < W; j++) {
    uint h[R][8];
    UNROLL for (uint r = 0; r < R; r++) places_of(Words<W>::at(u[r], j), h[r]);
    UNROLL for (uint m = 0; m < M; m++) {
      float v[16];
      sixteen<RAGGED>(xp + m * k + 16 * j, left - int(16 * j), v);
      added[m] += place5_bias(v);
      UNROLL for (uint r = 0; r < R; r++) places_dot(h[r], v, acc[m][r]);
    }
  }
  if (SCALES == 2) {  // the words of a load lie in one group
    UNROLL for (uint r = 0; r < R; r++) {
      const float unit = scale[scale_at[r]];
      UNROLL for (uint m = 0; m < M; m++) {
        sum[m][r] += places_value(acc[m][r], added[m]) * unit;
        acc[m][r].five = acc[m][r].six = acc[m][r].seven = 0.0f;
      }
      scale_at[r] += 4 * W;
    }
    UNROLL for (uint m = 0; m < M; m++) added[m] = 0.0f;
  }
  wp += 32;
  xp += 512 * W;
  left -= 512 * W;
}
float mine = 0.0f;  // lane m * R + r finishes output m, r
UNROLL for (uint m = 0; m < M; m++) {
  UNROLL for (uint r = 0; r < R; r++) {
    const float total = simd_sum(SCALES == 2 ? sum[m][r] : places_value(acc[m][r], added[m]));
    if (lane == m * R + r) mine = total;
  }
}
const uint m = lane / R, row = row0 + lane % R, to = m * rows + row;
if (m < M && row < rows)
  y[to] = finish<T, BIAS, RESIDUAL>(SCALES == 2 ? mine : mul_rn(mine, scale_of<SCALES>(scale, row)),
                                    BIAS ? float(bias[row]) : 0.0f, RESIDUAL ? float(residual[to]) : 0.0f);
