// Ternary mat-vec for CUDA of one row of activations that every block quantises for itself, normed first (NORM), made from
// gate and up first (ACT 1, 2): one launch in place of quantize.metal and matvec_dp4a.cu, and the same bits. The weights
// are on their way while it does.
// Template: T dtype of x and y. ACT. NORM, EPS the bits of its float. WHOLE: x is whole pieces of memory (quad.h).
// P quads of values a thread. W warps a block. L lanes a row of the weight, R rows for those lanes, V words a load, U loads
// in flight a row. SCALES 0 tensor, 1 row; BIAS, RESIDUAL.
// x: [1, K], with ACT [1, gate K | up K]; weight: float32 [K]; w: uint32 [N, words]; y: T [1, N].
//
// With a norm, warp 0 owns no values: it adds the squares in numpy_ref.lane_sum's order while the others write codes as
// if the row were above the quantiser's floor; where it is not, the second turn writes them again.
constexpr int OWNERS = W - (NORM ? 1 : 0), STEP = OWNERS * 32;
__shared__ float4 squares[NORM ? P * STEP : 1];
__shared__ int4 codes[P * STEP / 4];  // words of 16, the first ones of all loads, then the second ones, so on
__shared__ unsigned tops[W];
__shared__ int sums[W];
__shared__ float found[2];

const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, lane_of_row = lane % L;
const int k = x_shape[1] / (ACT != 0 ? 2 : 1), rows = w_shape[0], words = w_shape[1], end = words / V;
const int row0 = (blockIdx.x * (W * 32 / L) + int(threadIdx.x) / L) * R;
const int n_out = min(row0 + lane_of_row, rows - 1), first = int(threadIdx.x) - (NORM ? 32 : 0);
const bool owner = first >= 0;

uint4 bits[P], up_bits[P], factor_bits[P];
#pragma unroll
for (int i = 0; i < P; i++) {
  const int at = owner ? (first + i * STEP) * 4 : k;
  bits[i] = quad_bits<T, WHOLE>(x, at, k);
  if (ACT != 0) up_bits[i] = quad_bits<T, WHOLE>(x + k, at, k);
  if (NORM) factor_bits[i] = quad_bits<float, WHOLE>((const float*)weight, at, k);
}
const unsigned* from[R];
#pragma unroll
for (int r = 0; r < R; r++) from[r] = w + size_t(min(row0 + r, rows - 1)) * words;
alignas(16) unsigned u[U][R][V];
#define LOAD(start)                                                                \
  _Pragma("unroll") for (int j = 0; j < U; j++) _Pragma("unroll") for (int r = 0; r < R; r++) { \
    const int i = min((start) + lane_of_row + L * j, end - 1);                     \
    if (V == 4) *(uint4*)u[j][r] = __ldcs((const uint4*)from[r] + i);              \
    else if (V == 2) *(uint2*)u[j][r] = __ldcs((const uint2*)from[r] + i);         \
    else u[j][r][0] = __ldcs(from[r] + i);                                         \
  }
LOAD(0)
const float of_row = scale[SCALES == 1 ? n_out : 0];
const float added = BIAS ? bias[n_out] : 0.0f, held = RESIDUAL ? float(residual[n_out]) : 0.0f;

float p[P][4];
float most = 0.0f;
if (owner) {
#pragma unroll
  for (int i = 0; i < P; i++) {
    float second[4];
    quad_values<T>(bits[i], p[i]);
    if (ACT != 0) {
      quad_values<T>(up_bits[i], second);
#pragma unroll
      for (int j = 0; j < 4; j++) p[i][j] = gated_value<ACT>(p[i][j], second[j]);
    }
    if (NORM) {
      squares[first + i * STEP] = float4{mul_rn(p[i][0], p[i][0]), mul_rn(p[i][1], p[i][1]), mul_rn(p[i][2], p[i][2]), mul_rn(p[i][3], p[i][3])};
      quad_values<float>(factor_bits[i], second);
#pragma unroll
      for (int j = 0; j < 4; j++) p[i][j] = mul_rn(p[i][j], second[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) most = max(most, fabs(p[i][j]));
  }
}
const unsigned top = __reduce_max_sync(~0u, as_type<unsigned>(most));  // floats from 0 on are ordered as their bits are
if (lane == 0) tops[warp] = top;
__syncthreads();

const float a = as_type<float>(__reduce_max_sync(~0u, lane < W ? tops[lane] : 0u));
const unsigned odd = lane & 1 ? 0x3715 : 0x6240, high = lane & 2 ? 0x3276 : 0x5410;  // of the exchange of bytes
float c = NORM ? a : max(a, MIN_SCALE);
for (int turn = 0; turn < 2; turn++) {
  if (owner) {
    const float factor = div_rn(127.0f, c);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < P; i++) {
      unsigned q[4];
#pragma unroll
      for (int j = 0; j < 4; j++) q[j] = as_type<unsigned>(add_rn(mul_rn(p[i][j], factor), ROUNDING));
      unsigned four = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
      sum = __dp4a(int(four), 0x01010101, sum);
      four = __byte_perm(four, __shfl_xor_sync(~0u, four, 1), odd);
      four = __byte_perm(four, __shfl_xor_sync(~0u, four, 2), high);
      const int word = (first + i * STEP) / 4;
      if (word < words) ((unsigned*)(codes + word % V * end + word / V))[lane & 3] = four;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) sums[warp] = sum;
    if (!NORM && first == 0) found[1] = factor;
  } else if (turn == 0) {
    const float* line = (const float*)squares + lane;
    float now[8], next[8], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) next[i] = line[32 * i];
    for (int at = 0; at < words * 16; at += 256) {
      const float* ahead = line + (at + 256 < words * 16 ? at + 256 : 0);
#pragma unroll
      for (int i = 0; i < 8; i++) now[i] = next[i];
#pragma unroll
      for (int i = 0; i < 8; i++) next[i] = ahead[32 * i];
#pragma unroll
      for (int i = 0; i < 8; i++) sum = add_rn(sum, now[i]);
    }
#pragma unroll
    for (int half_of = 16; half_of > 0; half_of /= 2) sum = add_rn(sum, __shfl_xor_sync(~0u, sum, half_of));
    const float r = div_rn(1.0f, sqrt_rn(add_rn(div_rn(sum, float(k)), as_type<float>(EPS))));
    const float chosen = mul_rn(a, r) >= MIN_SCALE ? a : div_rn(MIN_SCALE, r);
    if (lane == 0) {
      sums[0] = 0;
      found[0] = chosen;
      found[1] = div_rn(127.0f, mul_rn(chosen, r));
    }
  }
  __syncthreads();
  if (!NORM || found[0] == c) break;
  c = found[0];
}

int acc[R];
#pragma unroll
for (int r = 0; r < R; r++) acc[r] = 0;
for (int start = 0;;) {
#pragma unroll
  for (int j = 0; j < U; j++)
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int i = start + lane_of_row + L * j;
      const int4 four = i < end ? codes[v * end + i] : int4{0, 0, 0, 0};
#pragma unroll
      for (int r = 0; r < R; r++) {
        const unsigned word = u[j][r][v];
        int sum = __dp4a(four.x, int(word & 0x03030303u), acc[r]);
        sum = __dp4a(four.y, int(word >> 2 & 0x03030303u), sum);
        sum = __dp4a(four.z, int(word >> 4 & 0x03030303u), sum);
        acc[r] = __dp4a(four.w, int(word >> 6 & 0x03030303u), sum);
      }
    }
  start += L * U;
  if (start >= end) break;
  LOAD(start)
}
#undef LOAD
int mine = 0;
#pragma unroll
for (int r = 0; r < R; r++) {
#pragma unroll
  for (int other = L / 2; other > 0; other /= 2) acc[r] += __shfl_xor_sync(~0u, acc[r], other);
  if (lane_of_row == r) mine = acc[r];
}
#pragma unroll
for (int i = 0; i < W; i++) mine -= sums[i];
if (lane_of_row < R && row0 + lane_of_row < rows) {
  float out = mul_rn(div_rn(float(mine), found[1]), of_row);
  if (BIAS) out = add_rn(out, added);
  y[n_out] = RESIDUAL ? T(add_rn(held, float(T(out)))) : T(out);
}
