// Ternary mat-vec with a scale for each group of 128 along K: as matvec.metal, but each group's integer is made whole,
// scaled, and added in ascending order, starting from +0. 8 / W lanes hold a group, a step of the simdgroup has 4 * W.
// scale: float [N, words / 8]. xb is not read: what the masks add to a group is summed in the loop, once for R rows.
constexpr int SHARE = 8 / W, KEPT = GroupRows<R, SHARE>::kept;
const uint lane = thread_index_in_simdgroup, row0 = thread_position_in_grid.y * R;
const uint rows = w_shape[0], steps = w_shape[1] / W, stride = 2 * w_shape[1], groups = w_shape[1] / 8;
if (row0 >= rows) return;
typedef typename Words<W>::type Load;
const device Load* wp = (const device Load*)w + size_t(row0) * steps + lane;
const device uint4* xp = (const device uint4*)xq + 2 * W * lane;
const uint row = row0 + GroupRows<R, SHARE>::first(lane), member = lane % SHARE;
uint at[R], scale_at[KEPT], g = lane / SHARE;
float sum[M][KEPT];
UNROLL for (uint r = 0; r < R; r++) at[r] = min(r, rows - 1 - row0) * steps;
UNROLL for (uint i = 0; i < KEPT; i++) {
  scale_at[i] = min(row + i, rows - 1) * groups;
  UNROLL for (uint m = 0; m < M; m++) sum[m][i] = 0.0f;
}
for (uint begin = 0; begin < steps; begin += 32) {  // every lane takes part in every step's shuffles
  Sums acc[M][R], added[M];
  UNROLL for (uint m = 0; m < M; m++) {
    added[m].x = added[m].y = 0.0f;
    UNROLL for (uint r = 0; r < R; r++) acc[m][r].x = acc[m][r].y = 0.0f;
  }
  if (g < groups) half_step<M, R, W, true>(wp, at, xp, stride, acc, added);
  UNROLL for (uint m = 0; m < M; m++) {
    float part[R];
    UNROLL for (uint r = 0; r < R; r++) part[r] = 512.0f * ((acc[m][r].x - added[m].x) + (acc[m][r].y - added[m].y));
    GroupRows<R, SHARE>::sum(lane, part);
    UNROLL for (uint i = 0; i < KEPT; i++) {
      const float term = g < groups ? scaled(part[i], s[m], scale[scale_at[i] + g]) : 0.0f;  // + 0 changes nothing
      UNROLL for (uint j = 0; j < 4 * W; j++) sum[m][i] = add_rn(sum[m][i], simd_shuffle(term, SHARE * j + member));
    }
  }
  wp += 32;
  xp += 64 * W;
  g += 4 * W;
}
if (lane >= (R < SHARE ? R : SHARE)) return;  // the other lanes hold the same rows
UNROLL for (uint m = 0; m < M; m++) {
  UNROLL for (uint i = 0; i < KEPT; i++) {
    const uint to = m * rows + row + i;
    if (row + i < rows)
      y[to] = finish<T, BIAS, RESIDUAL>(sum[m][i], BIAS ? float(bias[row + i]) : 0.0f,
                                        RESIDUAL ? float(residual[to]) : 0.0f);
  }
}
