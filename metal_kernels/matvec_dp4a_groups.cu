// As matvec_dp4a.cu with a scale for each group of 128 along K. Eight lanes hold a group, a step of the warp has four;
// each group's integer is made whole, scaled, and added in ascending order, starting from +0.
// Template: T output; M; R weight rows a warp; BIAS, RESIDUAL. M * R <= 32. scale: float [N, words / 8].
const int lane = threadIdx.x & 31, row0 = (blockIdx.x * (blockDim.x / 32) + (threadIdx.x >> 5)) * R;
const int rows = w_shape[0], words = w_shape[1], groups = words / 8;
const int4* codes = (const int4*)x;
const int m_out = min(lane / R, M - 1), n_out = min(row0 + lane % R, rows - 1);
const float2 tail = *(const float2*)(codes + m_out * (words + 1) + words);
float out = 0.0f;
for (int i0 = 0; i0 < words; i0 += 32) {
  const int i = i0 + lane;
  unsigned u[R];
#pragma unroll
  for (int r = 0; r < R; r++) u[r] = __ldcs(w + size_t(min(row0 + r, rows - 1)) * words + min(i, words - 1));
  float of_group[4];
#pragma unroll
  for (int q = 0; q < 4; q++) of_group[q] = scale[size_t(n_out) * groups + min(i0 / 8 + q, groups - 1)];
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int4 a = i < words ? __ldg(codes + m * (words + 1) + i) : int4{0, 0, 0, 0};
    const int sum = __dp4a(a.x, 0x01010101, __dp4a(a.y, 0x01010101, __dp4a(a.z, 0x01010101, __dp4a(a.w, 0x01010101, 0))));
#pragma unroll
    for (int r = 0; r < R; r++) {
      int acc = __dp4a(a.x, int(u[r] & 0x03030303u), -sum);
      acc = __dp4a(a.y, int(u[r] >> 2 & 0x03030303u), acc);
      acc = __dp4a(a.z, int(u[r] >> 4 & 0x03030303u), acc);
      acc = __dp4a(a.w, int(u[r] >> 6 & 0x03030303u), acc);
      acc += __shfl_xor_sync(~0u, acc, 1);
      acc += __shfl_xor_sync(~0u, acc, 2);
      acc += __shfl_xor_sync(~0u, acc, 4);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const int whole = __shfl_sync(~0u, acc, 8 * q);
        if (lane == m * R + r && i0 / 8 + q < groups)
          out = __fadd_rn(out, __fmul_rn(__fdiv_rn(float(whole), tail.y), of_group[q]));
      }
    }
  }
}
if (lane < M * R && row0 + lane % R < rows) {
  if (BIAS) out = __fadd_rn(out, bias[n_out]);
  const size_t at = size_t(m_out) * rows + n_out;
  y[at] = RESIDUAL ? T(__fadd_rn(float(residual[at]), float(T(out)))) : T(out);
}
