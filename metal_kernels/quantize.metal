// One threadgroup quantises one row of activations, normed first (NORM) and made from gate and up first (ACT 1, 2).
// Template: T dtype of x. ACT. NORM. EPS: the bits of the norm's float. LAYOUT: layout.py's index, and W its words a load.
// S: the most simdgroups that own words. WHOLE: rows are whole pieces of memory (quantize.h). Grid: (32 * rows, simdgroups, 1), a threadgroup (32, simdgroups, 1).
// x: [M, K], or with ACT [M, gate K | up K]. weight: float32 [K]. Outputs xq, xb, s: as layout.prepare.
//
// Simdgroups read words of V values, one a thread, as often as it takes. With a norm, simdgroup 0 owns no words: it adds
// the squares in numpy_ref.lane_sum's order, out of threadgroup memory, while the others already write codes. They
// do so as if the row were above the quantiser's floor; where it is not, the second turn writes them again.
constexpr uint V = LAYOUT == 1 ? 20 : 16, PARTS = LAYOUT == 0 ? 64 : 1;
threadgroup float4 squares[NORM ? S * 8 * V : 1];
threadgroup float tops[32];
threadgroup float parts[S * PARTS];
threadgroup float divisor[1];

const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads_per_threadgroup.y;
const uint row = threadgroup_position_in_grid.x;
const uint k = uint(x_shape[1]) / (ACT != 0 ? 2 : 1);
const uint words = LAYOUT == 1 ? (k + V - 1) / V : (k + 127) / 128 * 8;
const uint owners = NORM ? simdgroups - 1 : simdgroups;
const uint step = owners * 32;
const bool owner = !NORM || simdgroup > 0;
const uint first = (NORM ? simdgroup - 1 : simdgroup) * 32 + lane;
const device T* values = x + size_t(row) * x_shape[1];
const device float* weights = (const device float*)weight;

float p[V], factors[V];
float top = 0.0f, sum = 0.0f;
for (uint start = 0; start < words; start += step) {
  if (NORM && start > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
  if (owner) {
    load_values<T, V, ACT, NORM, WHOLE>(values, weights, k, (start + first) * V, p, factors);
    if (NORM) {
      UNROLL
      for (uint i = 0; i < V / 4; i++) {
        float4 four;
        four.x = mul_rn(p[4 * i], p[4 * i]);
        four.y = mul_rn(p[4 * i + 1], p[4 * i + 1]);
        four.z = mul_rn(p[4 * i + 2], p[4 * i + 2]);
        four.w = mul_rn(p[4 * i + 3], p[4 * i + 3]);
        squares[square_place<V>(first, i)] = four;
      }
      UNROLL
      for (uint i = 0; i < V; i++) p[i] = mul_rn(p[i], factors[i]);
    }
    UNROLL
    for (uint i = 0; i < V; i++) top = max(top, fabs(p[i]));
  }
  top = simd_max(top);
  if (lane == 0) tops[simdgroup] = top;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!owner) {
    const THREADGROUP_POINTER(float) line = (const THREADGROUP_POINTER(float))squares;
    float now[V / 2], next[V / 2];
    UNROLL
    for (uint i = 0; i < V / 2; i++) next[i] = line[square_line<V>(i, lane)];
    for (uint at = V / 2; at <= owners * V; at += V / 2) {
      const uint ahead = at < owners * V ? at * 32 : 0;  // no branch, so that these loads start before the additions
      UNROLL
      for (uint i = 0; i < V / 2; i++) now[i] = next[i];
      UNROLL
      for (uint i = 0; i < V / 2; i++) next[i] = line[ahead + square_line<V>(i, lane)];
      UNROLL
      for (uint i = 0; i < V / 2; i++) sum = add_rn(sum, now[i]);
    }
  }
}

const float a = simd_max(lane < simdgroups ? tops[lane] : 0.0f);
float c = NORM ? a : max(a, MIN_SCALE);
for (uint turn = 0; turn < 2; turn++) {
  if (owner) {
    const float factor = div_rn(127.0f, c);
    float bias[2] = {0.0f, 0.0f};
    for (uint start = 0; start < words; start += step) {
      const uint word = start + first;
      if (words > step) {
        load_values<T, V, ACT, NORM, WHOLE>(values, weights, k, word * V, p, factors);
        if (NORM) {
          UNROLL
          for (uint i = 0; i < V; i++) p[i] = mul_rn(p[i], factors[i]);
        }
      }
      if (word < words) {
        store_word<LAYOUT, V>(p, factor, (device PieceOf<V>*)(xq + (size_t(row) * words + word) * V), bias);
      }
    }
    if (LAYOUT == 0) {
      for (uint other = 1; other < W; other *= 2) {
        bias[0] += simd_shuffle_xor(bias[0], other);
        bias[1] += simd_shuffle_xor(bias[1], other);
      }
      if (lane % W == 0) {
        parts[first / 32 * PARTS + lane / W] = bias[0];
        parts[first / 32 * PARTS + 32 + lane / W] = bias[1];
      }
    } else {
      bias[0] = simd_sum(bias[0]);
      if (lane == 0) parts[first / 32 * PARTS] = bias[0];
    }
    if (!NORM && first == 0) s[row] = factor;
  } else if (turn == 0) {
    UNROLL
    for (uint half_of = 16; half_of > 0; half_of /= 2) sum = add_rn(sum, simd_shuffle_xor(sum, half_of));
    const float mean = div_rn(sum, float(k));
    const float r = div_rn(1.0f, sqrt_rn(add_rn(mean, as_type<float>(EPS))));
    const float chosen = mul_rn(a, r) >= MIN_SCALE ? a : div_rn(MIN_SCALE, r);
    if (lane == 0) {
      divisor[0] = chosen;
      s[row] = div_rn(127.0f, mul_rn(chosen, r));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!NORM || divisor[0] == c) break;
  c = divisor[0];
}

if (simdgroup == 0) {
  if (LAYOUT == 0) {
    const uint in_group = 32 / W;
    float low = 0.0f, high = 0.0f;
    for (uint g = lane / in_group; g < owners; g += W) {
      low += parts[g * PARTS + lane % in_group];
      high += parts[g * PARTS + 32 + lane % in_group];
    }
    xb[size_t(row) * 64 + 2 * lane] = low * 0.001953125f;
    xb[size_t(row) * 64 + 2 * lane + 1] = high * 0.001953125f;
  } else {
    const float total = simd_sum(lane < owners ? parts[lane] : 0.0f);
    if (lane == 0) xb[row] = total;
  }
}
