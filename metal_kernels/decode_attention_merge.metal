// The shares of decode_attention put together. Template: T; DIM. A simdgroup takes every eighth share, 64 at most.
// shares: float [B, heads, shares, DIM + 2]. result: T [B, 1, heads * DIM]. Grid (32, 8 * B * heads, 1), threadgroup (32, 8, 1).
constexpr uint SIMDGROUPS = 8, MOST = 64, EACH = (DIM + 31) / 32, TURNS = MOST / SIMDGROUPS;
threadgroup float sums[SIMDGROUPS * DIM];
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup, id = 32 * simd + lane;
const uint row = threadgroup_position_in_grid.y, count = shares_shape[2];
const device float* from = shares + size_t(row) * count * (DIM + 2);
float held[TURNS][EACH], top[2], weight[2], sum[EACH];
UNROLL for (uint t = 0; t < TURNS; t++) {
  UNROLL for (uint e = 0; e < EACH; e++) {
    const uint share = t * SIMDGROUPS + simd, d = e * 32 + lane;
    held[t][e] = share < count && d < DIM ? from[share * (DIM + 2) + d] : 0.0f;
  }
}
UNROLL for (uint h = 0; h < 2; h++) {
  const uint share = h * 32 + lane;
  top[h] = share < count ? from[share * (DIM + 2) + DIM] : NO_SCORE;
  weight[h] = share < count ? from[share * (DIM + 2) + DIM + 1] : 0.0f;
}
const float high = simd_max(max(top[0], top[1]));
const float factor[2] = {power_of_two(top[0] - high), power_of_two(top[1] - high)};
const float total = simd_sum(factor[0] * weight[0] + factor[1] * weight[1]);
UNROLL for (uint e = 0; e < EACH; e++) sum[e] = 0.0f;
UNROLL for (uint t = 0; t < TURNS; t++) {
  const float f = simd_shuffle(factor[t * SIMDGROUPS / 32], ushort((t * SIMDGROUPS + simd) % 32));
  UNROLL for (uint e = 0; e < EACH; e++) sum[e] += f * held[t][e];
}
UNROLL for (uint e = 0; e < EACH; e++) {
  if (e * 32 + lane < DIM) sums[simd * DIM + e * 32 + lane] = sum[e];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (id < DIM) {
  float y = 0.0f;
  UNROLL for (uint g = 0; g < SIMDGROUPS; g++) y += sums[g * DIM + id];
  result[size_t(row) * DIM + id] = T(y / total);
}
