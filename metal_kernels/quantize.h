// Words of a row: V values that one thread reads, and V codes that it writes in the order of a layout.
#define MIN_SCALE 1e-5f

// The widest piece of memory that every word of V values is a whole number of, and starts at a multiple of.
template <int V>
struct Piece {
  typedef uint4 type;
};
template <>
struct Piece<20> {
  typedef uint2 type;
};
FN void split(uint4 piece, thread uint* to) {
  to[0] = piece.x;
  to[1] = piece.y;
  to[2] = piece.z;
  to[3] = piece.w;
}
FN void split(uint2 piece, thread uint* to) {
  to[0] = piece.x;
  to[1] = piece.y;
}
FN void join(const thread uint* from, thread uint4& piece) {
  piece.x = from[0];
  piece.y = from[1];
  piece.z = from[2];
  piece.w = from[3];
}
FN void join(const thread uint* from, thread uint2& piece) {
  piece.x = from[0];
  piece.y = from[1];
}

// The values in 32 bits of memory.
template <typename T>
struct Packed {  // float16
  FN static void values(uint bits, thread float* to) {
    const half2 pair = as_type<half2>(bits);
    to[0] = float(pair.x);
    to[1] = float(pair.y);
  }
};
template <>
struct Packed<float> {
  FN static void values(uint bits, thread float* to) { to[0] = as_type<float>(bits); }
};
template <>
struct Packed<bfloat16_t> {
  FN static void values(uint bits, thread float* to) {
    to[0] = as_type<float>(bits << 16);
    to[1] = as_type<float>(bits & 0xFFFF0000u);
  }
};

// v[i] = row[at + i], 0 from k on. Whole pieces where the word lies within the row and rows start at whole pieces.
template <typename T, int V>
FN void load_word(const device T* row, uint k, uint at, thread float* v) {
  typedef typename Piece<V>::type piece;
  constexpr uint BYTES = sizeof(piece), PIECES = V * sizeof(T) / BYTES, IN_PIECE = BYTES / 4, IN_BITS = 4 / sizeof(T);
  if (at + V <= k && k % (BYTES / 2) == 0) {
    const device piece* from = (const device piece*)(row + at);
    piece pieces[PIECES];
    UNROLL
    for (uint i = 0; i < PIECES; i++) pieces[i] = from[i];
    UNROLL
    for (uint i = 0; i < PIECES; i++) {
      uint bits[IN_PIECE];
      split(pieces[i], bits);
      UNROLL
      for (uint j = 0; j < IN_PIECE; j++) Packed<T>::values(bits[j], v + (i * IN_PIECE + j) * IN_BITS);
    }
  } else {
    UNROLL
    for (uint i = 0; i < V; i++) v[i] = at + i < k ? float(row[at + i]) : 0.0f;
  }
}

// The same of what is quantised: row is [K], or with ACT [gate K | up K].
template <typename T, int V, int ACT>
FN void load_values(const device T* row, uint k, uint at, thread float* v) {
  load_word<T, V>(row, k, at, v);
  if (ACT != 0) {
    float up[V];
    load_word<T, V>(row + k, k, at, up);
    UNROLL
    for (uint i = 0; i < V; i++) v[i] = gated_value<ACT>(v[i], up[i]);
  }
}

// v *= weight[at ..], each product rounded.
template <int V>
FN void scale_values(const device float* weight, uint k, uint at, thread float* v) {
  float factors[V];
  load_word<float, V>(weight, k, at, factors);
  UNROLL
  for (uint i = 0; i < V; i++) v[i] = mul_rn(v[i], factors[i]);
}

// Squares lie in threadgroup memory in their own order but for words of 16, which would all start in the same banks:
// there the four quads of a line's words are exchanged by the line's number. Where the quad of a thread's word goes:
template <int V>
FN uint square_place(uint word, uint quad) {
  return word * (V / 4) + (V == 16 ? quad ^ (word / 2 % 4) : quad);
}
// Where a lane's value of a line of 32 is.
template <int V>
FN uint square_line(uint line, uint lane) {
  return line * 32 + (V == 16 ? lane ^ (line % 4 * 4) : lane);
}

FN uint half_pair(float low, float high) {
  half2 pair;
  pair.x = half(low);
  pair.y = half(high);
  return as_type<uint>(pair);
}

// Codes rint(p * factor) of a word, written at `to` in the order of layout.prepare; adds to bias what the word adds:
// in halves, for each half of the word, in units of HALF_UNIT; else the sum of its codes, to bias[0].
// No code leaves -128 .. 127: |p| is at most the divisor that factor is 127 over.
template <int LAYOUT, int V>
FN void store_word(const thread float* p, float factor, device typename Piece<V>::type* to, thread float* bias) {
  typedef typename Piece<V>::type piece;
  constexpr uint UINTS = LAYOUT == 2 ? V / 4 : V / 2, IN_PIECE = sizeof(piece) / 4;
  uint shifted[V], bits[V / 2];
  float q[V];
  UNROLL
  for (uint i = 0; i < V; i++) {
    const float sum = add_rn(mul_rn(p[i], factor), ROUNDING);
    shifted[i] = as_type<uint>(sum);
    q[i] = add_rn(sum, -ROUNDING);
  }
  if (LAYOUT == 0) {
    const float scale[8] = {1.0f, 0.25f, 0.0625f, 0.015625f, 0.00390625f, 32.0f, -4.0f, -0.0009765625f};
    const float added[6] = {1025.0f, 257.0f, 65.0f, 17.0f, 5.0f, 1.0f};
    UNROLL
    for (uint i = 0; i < 8; i++) bits[i] = half_pair(q[i] * scale[i], q[i + 8] * scale[i]);
    UNROLL
    for (uint i = 0; i < 6; i++) {
      bias[0] += q[i] * added[i];
      bias[1] += q[i + 8] * added[i];
    }
  } else {
    UNROLL
    for (uint i = 0; i < V; i++) bias[0] += q[i];
  }
  if (LAYOUT == 1) {
    UNROLL
    for (uint i = 0; i < V / 2; i++) bits[i] = half_pair(q[i], q[i + V / 2]);
  }
  if (LAYOUT == 2) {
    UNROLL
    for (uint i = 0; i < 4; i++) {
      bits[i] = (shifted[i] & 255u) | (shifted[i + 4] & 255u) << 8 | (shifted[i + 8] & 255u) << 16 | shifted[i + 12] << 24;
    }
  }
  if (LAYOUT == 3) {
    UNROLL
    for (uint i = 0; i < V / 2; i++) bits[i] = half_pair(q[2 * i], q[2 * i + 1]);
  }
  UNROLL
  for (uint i = 0; i < UINTS / IN_PIECE; i++) {
    piece whole;
    join(bits + i * IN_PIECE, whole);
    to[i] = whole;
  }
}
