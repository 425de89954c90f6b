// Ternary mat-vec, one scale for the tensor or for each row. A simdgroup takes R rows of the weight, M of activations.
// Template: T output; M; R; W words a load, as in the activations' layout; SCALES 0 tensor, 1 row; BIAS; RESIDUAL.
// M * R <= 32. xq: half [M, 16 words], prepared; xb: float [M, 64], two biases a lane; s: float [M];
// w: uint [N, words]; bias: float [N]; residual: T [M, N]; y: T [M, N]. Grid (32, ceil(N / R), 1), threadgroups of whole simdgroups.
// Inputs that may have fewer than 8 elements, and so lie in another address space, are only indexed.
const uint lane = thread_index_in_simdgroup, row0 = thread_position_in_grid.y * R;
const uint rows = w_shape[0], steps = w_shape[1] / W, stride = 2 * w_shape[1];
if (row0 >= rows) return;
typedef typename Words<W>::type Load;
const device Load* wp = (const device Load*)w + size_t(row0) * steps + lane;
const device uint4* xp = (const device uint4*)xq + 2 * W * lane;
uint at[R];
Sums acc[M][R], added[M];
UNROLL for (uint r = 0; r < R; r++) at[r] = min(r, rows - 1 - row0) * steps;  // past the end: the last row, not stored
UNROLL for (uint m = 0; m < M; m++) {
  added[m].x = xb[64 * m + 2 * lane];
  added[m].y = xb[64 * m + 2 * lane + 1];
  UNROLL for (uint r = 0; r < R; r++) acc[m][r].x = acc[m][r].y = 0.0f;
}
for (uint i = lane; i < steps; i += 32) {
  half_step<M, R, W, false>(wp, at, xp, stride, acc, added);
  wp += 32;
  xp += 64 * W;
}
float mine = 0.0f;  // lane m * R + r finishes output m, r
UNROLL for (uint m = 0; m < M; m++) {
  UNROLL for (uint r = 0; r < R; r++) {
    const float sum = simd_sum((acc[m][r].x - added[m].x) + (acc[m][r].y - added[m].y));
    if (lane == m * R + r) mine = 512.0f * sum;
  }
}
const uint m = lane / R, row = row0 + lane % R, to = m * rows + row;
if (m < M && row < rows)
  y[to] = finish<T, BIAS, RESIDUAL>(scaled(mine, s[m], scale_of<SCALES>(scale, row)),
                                    BIAS ? float(bias[row]) : 0.0f, RESIDUAL ? float(residual[to]) : 0.0f);
