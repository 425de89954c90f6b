// Ternary mat-vec for CUDA: M rows of int8 activations in layout "bytes", words2 weights, dp4a; a scale for the tensor or
// for each row. No Metal form and so no header: MLX hashes the whole text at every call, and a short text is a cheaper one.
// Template: T output; M; R weight rows a warp; V words a load; U loads in flight a row; SPLIT warps that share a row
// along K; SCALES 0 tensor, 1 row; BIAS, RESIDUAL. M * R <= 32.
// x: uint32 [M, 4 words + 4], a row's codes, then as floats their sum and s; w: uint32 [N, words]; y: T [M, N].
const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % SPLIT;
const int row0 = (blockIdx.x * (blockDim.x / (32 * SPLIT)) + warp / SPLIT) * R;
const int rows = w_shape[0], words = w_shape[1], steps = (words / V + 31) / 32;
const int begin = steps * part / SPLIT * 32, end = min(words / V, steps * (part + 1) / SPLIT * 32);
const int4* codes = (const int4*)x;
const int m_out = min(lane / R, M - 1), n_out = min(row0 + lane % R, rows - 1);
const float2 tail = *(const float2*)(codes + m_out * (words + 1) + words);
const float of_row = scale[SCALES == 1 ? n_out : 0];
const unsigned* from[R];
int acc[M][R];
#pragma unroll
for (int r = 0; r < R; r++) {
  from[r] = w + size_t(min(row0 + r, rows - 1)) * words;
#pragma unroll
  for (int m = 0; m < M; m++) acc[m][r] = 0;
}
for (int i0 = begin + lane; i0 - lane < end; i0 += 32 * U) {
  unsigned u[U][R][V];
#pragma unroll
  for (int j = 0; j < U; j++)
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int i = min(i0 + 32 * j, end - 1);
      if (V == 4) *(uint4*)u[j][r] = __ldcs((const uint4*)from[r] + i);
      else if (V == 2) *(uint2*)u[j][r] = __ldcs((const uint2*)from[r] + i);
      else u[j][r][0] = __ldcs(from[r] + i);
    }
#pragma unroll
  for (int j = 0; j < U; j++)
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int i = i0 + 32 * j;
        const int4 a = i < end ? __ldg(codes + m * (words + 1) + i * V + v) : int4{0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < R; r++) {
          const unsigned c = u[j][r][v];
          int sum = __dp4a(a.x, int(c & 0x03030303u), acc[m][r]);
          sum = __dp4a(a.y, int(c >> 2 & 0x03030303u), sum);
          sum = __dp4a(a.z, int(c >> 4 & 0x03030303u), sum);
          acc[m][r] = __dp4a(a.w, int(c >> 6 & 0x03030303u), sum);
        }
      }
}
int mine = 0;
#pragma unroll
for (int m = 0; m < M; m++)
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int total = __reduce_add_sync(~0u, acc[m][r]);
    if (lane == m * R + r) mine = total;
  }
if (SPLIT > 1) {
  __shared__ int parts[8][32];  // of the warps of a block, eight at most
  parts[warp][lane] = mine;
  __syncthreads();
  mine = 0;
#pragma unroll
  for (int p = 0; p < SPLIT; p++) mine += parts[warp - part + p][lane];
}
if (part == 0 && lane < M * R && row0 + lane % R < rows) {
  float out = __fmul_rn(__fdiv_rn(float(mine) - tail.x, tail.y), of_row);
  if (BIAS) out = __fadd_rn(out, bias[n_out]);
  const size_t at = size_t(m_out) * rows + n_out;
  y[at] = RESIDUAL ? T(__fadd_rn(float(residual[at]), float(T(out)))) : T(out);
}
