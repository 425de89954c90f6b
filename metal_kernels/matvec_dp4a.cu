// Ternary mat-vec for CUDA: M rows of int8 activations in layout "bytes", words2 weights, dp4a. No Metal form, so no
// compat header: MLX hashes the whole text at every call, and a short text is a cheaper call.
// Template: T output; M activations' rows; R weight rows a warp; V words a load; U loads in flight a row; SPLIT warps
// that share a row along K; SCALES 0 tensor, 1 row, 2 group of 128 (SPLIT 1, V 1); BIAS, RESIDUAL.
// xq: int8 [M, 16 words]; xb: float [M], the sum of a row's codes; s: float [M]; w: uint32 [N, words]; y: T [N] a row.
const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % SPLIT;
const int row0 = (blockIdx.x * (blockDim.x / (32 * SPLIT)) + warp / SPLIT) * R;
const int rows = w_shape[0], words = w_shape[1], loads = words / V;
const int steps = (loads + 31) / 32;
const int begin = steps * part / SPLIT * 32, end = min(loads, steps * (part + 1) / SPLIT * 32);
const unsigned* wp[R];
int acc[M][R];
#pragma unroll
for (int r = 0; r < R; r++) {
  wp[r] = w + size_t(min(row0 + r, rows - 1)) * words;
#pragma unroll
  for (int m = 0; m < M; m++) acc[m][r] = 0;
}
float out = 0.0f;  // with group scales: what lane m * R + r has of output m, r
const int my_m = min(lane / R, M - 1), my_row = min(row0 + lane % R, rows - 1);
const float my_s = s[my_m], my_sum = xb[my_m];
const float my_scale = SCALES == 2 ? 1.0f : scale[SCALES == 1 ? my_row : 0];
for (int i0 = begin + lane; i0 - lane < end; i0 += 32 * U) {
  unsigned u[U][R][V];
#pragma unroll
  for (int j = 0; j < U; j++)
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int i = i0 + 32 * j;
#pragma unroll
      for (int v = 0; v < V; v++) u[j][r][v] = 0;
      if (i < end) {
        if (V == 4) *(uint4*)u[j][r] = __ldcs((const uint4*)wp[r] + i);
        else if (V == 2) *(uint2*)u[j][r] = __ldcs((const uint2*)wp[r] + i);
        else u[j][r][0] = __ldcs(wp[r] + i);
      }
    }
#pragma unroll
  for (int j = 0; j < U; j++) {
    const int i = i0 + 32 * j;
#pragma unroll
    for (int m = 0; m < M; m++) {
      int sum = 0;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int4 x = i < end ? __ldg((const int4*)xq + size_t(m) * words + i * V + v) : int4{0, 0, 0, 0};
        if (SCALES == 2) {
          sum = __dp4a(x.x, 0x01010101, __dp4a(x.y, 0x01010101, sum));
          sum = __dp4a(x.z, 0x01010101, __dp4a(x.w, 0x01010101, sum));
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          const unsigned c = u[j][r][v];
          int a = __dp4a(x.x, int(c & 0x03030303u), acc[m][r]);
          a = __dp4a(x.y, int(c >> 2 & 0x03030303u), a);
          a = __dp4a(x.z, int(c >> 4 & 0x03030303u), a);
          acc[m][r] = __dp4a(x.w, int(c >> 6 & 0x03030303u), a);
        }
      }
      if (SCALES == 2) {  // eight lanes hold a group; four groups a step, added in ascending order
#pragma unroll
        for (int r = 0; r < R; r++) {
          int g = acc[m][r] - sum;
          acc[m][r] = 0;
          g += __shfl_xor_sync(~0u, g, 1);
          g += __shfl_xor_sync(~0u, g, 2);
          g += __shfl_xor_sync(~0u, g, 4);
#pragma unroll
          for (int q = 0; q < 4; q++) {
            const int group = (i - lane) / 8 + q, value = __shfl_sync(~0u, g, 8 * q);
            if (lane == m * R + r && group < words / 8)
              out = __fadd_rn(out, __fmul_rn(__fdiv_rn(float(value), my_s), scale[size_t(my_row) * (words / 8) + group]));
          }
        }
      }
    }
  }
}
if (SCALES != 2) {
  int mine = 0;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int total = __reduce_add_sync(~0u, acc[m][r]);
      if (lane == m * R + r) mine = total;
    }
  if (SPLIT > 1) {
    __shared__ int parts[32][33];
    parts[warp][lane] = mine;
    __syncthreads();
    mine = 0;
#pragma unroll
    for (int p = 0; p < SPLIT; p++) mine += parts[warp - part + p][lane];
  }
  out = __fmul_rn(__fdiv_rn(float(mine) - my_sum, my_s), my_scale);
}
if (part == 0 && lane < M * R && row0 + lane % R < rows) {
  if (BIAS) out = __fadd_rn(out, bias[my_row]);
  const size_t at = size_t(my_m) * rows + my_row;
  y[at] = RESIDUAL ? T(__fadd_rn(float(residual[at]), float(T(out)))) : T(out);
}
