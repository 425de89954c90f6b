// One new token's attention: its queries and key are rotated as by rope_kv, the scores of all positions pass through a
// softmax that is corrected as they come (Milakov and Gimelshein 2018), and the recent positions are written anew.
// A threadgroup takes QUERIES heads of queries that share a head of keys, and one of the shares of the positions. LANES
// lanes share a position, in pieces of VALUES; a simdgroup takes 32 / LANES positions, AHEAD times at once. The last
// column of threadgroups copies.
// Template: T; OUT; DIM; VALUES; LANES; QUERIES; SIMDGROUPS; AHEAD; SPLIT.
// qkv: T [B, 1, (heads + 2 kv heads) * DIM]. cosines, sines: float [1 or B, 1, DIM / 2]. past: T [2, B, kv heads, P, DIM].
// recent: T [2, B, kv heads, R, DIM]. lengths: int [2], positions that count in past and in recent.
// result: T [B, 1, heads * DIM]; with SPLIT float [B, heads, shares, DIM + 2]: a sum of values, its maximum score in
// units of log2, the sum of its weights. kept: as recent, with the new token behind what counts, then zeros.
// Grid (32 (shares + 1), SIMDGROUPS * kv heads * groups, B), threadgroup (32, SIMDGROUPS, 1).
typedef typename PieceOfBytes<VALUES * sizeof(T)>::type Piece;
constexpr uint ROW = DIM / VALUES, TURNS = (ROW + LANES - 1) / LANES, EACH = TURNS * VALUES, SPAN = EACH * LANES;
constexpr uint WORDS = EACH * sizeof(T) / 4, IN_PIECE = sizeof(Piece) / 4, IN_WORD = 4 / sizeof(T);
constexpr uint PAIRS = DIM / 2, THREADS = 32 * SIMDGROUPS, AT_ONCE = 32 / LANES * SIMDGROUPS;
threadgroup float turned[(QUERIES + 1) * SPAN];
threadgroup float sums[SIMDGROUPS * QUERIES * SPAN];
threadgroup float2 marks[SIMDGROUPS * QUERIES];  // maximum, sum of weights
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup, id = 32 * simd + lane;
const uint batches = past_shape[1], kv_heads = past_shape[2], room = past_shape[3], slots = recent_shape[3];
const uint width = qkv_shape[2], heads = width / DIM - 2 * kv_heads, sharing = heads / kv_heads;
const uint groups = (sharing + QUERIES - 1) / QUERIES, shares = threadgroups_per_grid.x - 1;
const uint share = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.z;
const uint kv = threadgroup_position_in_grid.y / groups, group = threadgroup_position_in_grid.y % groups;
const uint old = lengths[0], held = lengths[1], turn = cosines_shape[0] == 1 ? 0 : b * PAIRS;
const device T* token = qkv + size_t(b) * width;
const uint key_at = (heads + kv) * DIM, value_at = key_at + kv_heads * DIM;
const size_t new_plane = size_t(batches * kv_heads) * slots * ROW, new_row = size_t(b * kv_heads + kv) * slots * ROW;
if (share == shares) {
  for (uint i = group * THREADS + id; i < 2 * slots * ROW; i += groups * THREADS) {
    const uint plane = i / (slots * ROW), inner = i % (slots * ROW), slot = inner / ROW;
    const size_t at = plane * new_plane + new_row + inner;
    Piece piece = Piece();
    if (slot < held) piece = ((const device Piece*)recent)[at];
    if (slot != held) ((device Piece*)kept)[at] = piece;
  }
  for (uint i = group * THREADS + id; i < PAIRS; i += groups * THREADS) {
    const float x = float(token[key_at + i]), y = float(token[key_at + i + PAIRS]);
    const float c = cosines[turn + i], s = sines[turn + i];
    const size_t key = (new_row + held * ROW) * VALUES + i, value = key + new_plane * VALUES;
    kept[key] = T(add_rn(mul_rn(x, c), -mul_rn(y, s)));
    kept[key + PAIRS] = T(add_rn(mul_rn(y, c), mul_rn(x, s)));
    kept[value] = token[value_at + i];
    kept[value + PAIRS] = token[value_at + i + PAIRS];
  }
  return;
}
for (uint i = id; i < (QUERIES + 1) * PAIRS; i += THREADS) {
  const uint row = i / PAIRS, pair = i % PAIRS;
  const uint from = row < QUERIES ? (kv * sharing + min(group * QUERIES + row, sharing - 1)) * DIM : key_at;
  const float x = float(token[from + pair]), y = float(token[from + pair + PAIRS]);
  const float c = cosines[turn + pair], s = sines[turn + pair];
  turned[row * SPAN + place<VALUES, LANES>(pair)] = float(T(add_rn(mul_rn(x, c), -mul_rn(y, s))));
  turned[row * SPAN + place<VALUES, LANES>(pair + PAIRS)] = float(T(add_rn(mul_rn(y, c), mul_rn(x, s))));
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint part = lane % LANES;
const float scale = div_rn(LOG2E, sqrt_rn(float(DIM)));
float query[QUERIES][EACH], sum[QUERIES][EACH], top[QUERIES], total[QUERIES];
UNROLL for (uint q = 0; q < QUERIES; q++) {
  top[q] = NO_MAXIMUM;
  total[q] = 0.0f;
  UNROLL for (uint e = 0; e < EACH; e++) {
    const bool within = e / VALUES * LANES + part < ROW;
    query[q][e] = within ? scale * turned[q * SPAN + e * LANES + part] : 0.0f;
    sum[q][e] = 0.0f;
  }
}
if (share == 0 && simd == 0) {  // the new token belongs to the first lanes of all
  float key[EACH], value[EACH];
  UNROLL for (uint e = 0; e < EACH; e++) {
    const uint piece = e / VALUES * LANES + part;
    key[e] = piece < ROW ? turned[QUERIES * SPAN + e * LANES + part] : 0.0f;
    value[e] = piece < ROW && lane < LANES ? float(token[value_at + piece * VALUES + e % VALUES]) : 0.0f;
  }
  UNROLL for (uint q = 0; q < QUERIES; q++) {
    float score = 0.0f;
    UNROLL for (uint e = 0; e < EACH; e++) score += query[q][e] * key[e];
    score = part_sum<LANES>(score);
    if (lane < LANES) {
      top[q] = score;
      total[q] = 1.0f;
      UNROLL for (uint e = 0; e < EACH; e++) sum[q][e] = value[e];
    }
  }
}
const uint count = old + held, quota = (count + shares - 1) / shares;
const uint begin = min(share * quota, count), end = min(begin + quota, count);
const uint mine = simd * (32 / LANES) + lane / LANES;
const device Piece* olds = (const device Piece*)past + size_t(b * kv_heads + kv) * room * ROW;
const device Piece* news = (const device Piece*)recent + new_row;
const size_t old_plane = size_t(batches * kv_heads) * room * ROW;
for (uint at = begin; at < end; at += AHEAD * AT_ONCE) {
  uint keys[AHEAD][WORDS], values[AHEAD][WORDS];
  float score[AHEAD][QUERIES];
  UNROLL for (uint u = 0; u < AHEAD; u++) {
    const uint position = at + u * AT_ONCE + mine;
    const device Piece* from = position < old ? olds + size_t(position) * ROW : news + size_t(position - old) * ROW;
    const size_t beside = position < old ? old_plane : new_plane;
    UNROLL for (uint t = 0; t < TURNS; t++) {
      const uint piece = t * LANES + part;
      Piece key = Piece(), value = Piece();
      if (position < end && piece < ROW) {
        key = from[piece];
        value = from[beside + piece];
      }
      split(key, keys[u] + t * IN_PIECE);
      split(value, values[u] + t * IN_PIECE);
    }
  }
  UNROLL for (uint u = 0; u < AHEAD; u++) {
    float key[EACH];
    UNROLL for (uint w = 0; w < WORDS; w++) Packed<T>::values(keys[u][w], key + w * IN_WORD);
    UNROLL for (uint q = 0; q < QUERIES; q++) {
      float dot = 0.0f;
      UNROLL for (uint e = 0; e < EACH; e++) dot += query[q][e] * key[e];
      dot = part_sum<LANES>(dot);
      score[u][q] = at + u * AT_ONCE + mine < end ? dot : NO_SCORE;
    }
  }
  UNROLL for (uint q = 0; q < QUERIES; q++) {
    float high = top[q];
    UNROLL for (uint u = 0; u < AHEAD; u++) high = max(high, score[u][q]);
    const float shrink = power_of_two(top[q] - high);
    top[q] = high;
    total[q] *= shrink;
    UNROLL for (uint e = 0; e < EACH; e++) sum[q][e] *= shrink;
    UNROLL for (uint u = 0; u < AHEAD; u++) {
      score[u][q] = power_of_two(score[u][q] - high);
      total[q] += score[u][q];
    }
  }
  UNROLL for (uint u = 0; u < AHEAD; u++) {
    float value[EACH];
    UNROLL for (uint w = 0; w < WORDS; w++) Packed<T>::values(values[u][w], value + w * IN_WORD);
    UNROLL for (uint q = 0; q < QUERIES; q++) {
      UNROLL for (uint e = 0; e < EACH; e++) sum[q][e] += score[u][q] * value[e];
    }
  }
}
UNROLL for (uint q = 0; q < QUERIES; q++) {
  UNROLL for (ushort o = LANES; o < 32; o *= 2) {  // the parts of a simdgroup
    const float other = simd_shuffle_xor(top[q], o), high = max(top[q], other);
    const float ours = power_of_two(top[q] - high), theirs = power_of_two(other - high);
    top[q] = high;
    total[q] = ours * total[q] + theirs * simd_shuffle_xor(total[q], o);
    UNROLL for (uint e = 0; e < EACH; e++) sum[q][e] = ours * sum[q][e] + theirs * simd_shuffle_xor(sum[q][e], o);
  }
  if (lane < LANES) {
    UNROLL for (uint e = 0; e < EACH; e++) sums[(simd * QUERIES + q) * SPAN + e * LANES + lane] = sum[q][e];
  }
  if (lane == 0) {
    float2 mark;
    mark.x = top[q];
    mark.y = total[q];
    marks[simd * QUERIES + q] = mark;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = id; i < QUERIES * DIM; i += THREADS) {
  const uint q = i / DIM, d = i % DIM, nth = group * QUERIES + q;
  float high = NO_MAXIMUM, weight = 0.0f, y = 0.0f;
  UNROLL for (uint g = 0; g < SIMDGROUPS; g++) high = max(high, marks[g * QUERIES + q].x);
  UNROLL for (uint g = 0; g < SIMDGROUPS; g++) {
    const float2 mark = marks[g * QUERIES + q];
    const float factor = power_of_two(mark.x - high);
    weight += factor * mark.y;
    y += factor * sums[(g * QUERIES + q) * SPAN + place<VALUES, LANES>(d)];
  }
  if (nth < sharing) {
    const size_t head = size_t(b) * heads + kv * sharing + nth;
    if (SPLIT) {
      const size_t to = (head * shares + share) * (DIM + 2);
      result[to + d] = OUT(y);
      if (d == 0) {
        result[to + DIM] = OUT(high);
        result[to + DIM + 1] = OUT(weight);
      }
    } else {
      result[head * DIM + d] = OUT(y / weight);
    }
  }
}
