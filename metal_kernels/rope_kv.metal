// Heads apart, queries and keys rotated by halves as numpy_ref.rope, values copied into the layout of the cache.
// Template: T dtype of qkv. HEADS: of queries. Grid: a thread for each pair, whole threadgroups of 256.
// qkv: [B, L, (HEADS + 2 kv heads) * D]. cosines, sines: float32 [1 or B, L, D / 2].
// Outputs q [B, HEADS, L, D]; kv [2, B, kv heads, L, D].
const uint batch = qkv_shape[0], length = qkv_shape[1], width = qkv_shape[2];
const uint pairs = cosines_shape[2], dim = 2 * pairs;
const uint heads = width / dim, kv_heads = (heads - HEADS) / 2;
const uint index = thread_position_in_grid.x;
if (index < batch * length * (width / 2)) {
  const uint i = index % pairs, head = index / pairs % heads;
  const uint token = index / (width / 2), l = token % length, b = token / length;
  const size_t from = size_t(token) * width + head * dim + i;
  const uint angle = ((cosines_shape[0] == 1 ? 0 : b) * length + l) * pairs + i;
  T first = qkv[from], second = qkv[from + pairs];
  if (head < HEADS + kv_heads) {
    const float x = float(first), y = float(second), c = cosines[angle], s = sines[angle];
    first = T(add_rn(mul_rn(x, c), -mul_rn(y, s)));
    second = T(add_rn(mul_rn(y, c), mul_rn(x, s)));
  }
  if (head < HEADS) {
    const size_t to = (size_t(b * HEADS + head) * length + l) * dim + i;
    q[to] = first;
    q[to + pairs] = second;
  } else {
    const uint kept = head - HEADS, value = kept < kv_heads ? 0 : 1;
    const size_t to = (size_t((value * batch + b) * kv_heads + kept - value * kv_heads) * length + l) * dim + i;
    kv[to] = first;
    kv[to + pairs] = second;
  }
}
