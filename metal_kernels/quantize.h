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
template <int V>
using PieceOf = typename Piece<V>::type;
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

// V values as they lie in memory, of which `left` are the row's, and as floats: 0 for the others.
template <typename T, int V>
struct Word {
  typedef PieceOf<V> piece;
  enum { PIECES = V * sizeof(T) / sizeof(piece), IN_PIECE = sizeof(piece) / 4, IN_BITS = 4 / sizeof(T) };
  uint bits[PIECES * IN_PIECE];
  FN void read(const device T* from, int left) thread {
    UNROLL
    for (int i = 0; i < PIECES; i++) {
      piece whole = piece();
      if ((i + 1) * IN_PIECE * IN_BITS <= left) whole = ((const device piece*)from)[i];
      split(whole, bits + i * IN_PIECE);
    }
  }
  FN void values(thread float* to) const thread {
    UNROLL
    for (int i = 0; i < PIECES * IN_PIECE; i++) Packed<T>::values(bits[i], to + i * IN_BITS);
  }
};

// What is quantised, v[i] for the column at + i, and the norm's factors; 0 from column k on. row: [K], or with ACT
// [gate K | up K]. WHOLE: every row is a whole number of pieces, which then are on their way all at once.
template <typename T, int V, int ACT, bool NORM, bool WHOLE>
FN void load_values(const device T* row, const device float* weight, uint k, uint at, thread float* v, thread float* factors) {
  float up[V];
  if (WHOLE) {
    const int left = int(k) - int(at);
    Word<T, V> first, second;
    Word<float, V> third;
    first.read(row + at, left);
    if (ACT != 0) second.read(row + k + at, left);
    if (NORM) third.read(weight + at, left);
    first.values(v);
    if (ACT != 0) second.values(up);
    if (NORM) third.values(factors);
  } else {
    UNROLL
    for (uint i = 0; i < V; i++) {
      const bool within = at + i < k;
      v[i] = within ? float(row[at + i]) : 0.0f;
      if (ACT != 0) up[i] = within ? float(row[k + at + i]) : 0.0f;
      if (NORM) factors[i] = within ? weight[at + i] : 0.0f;
    }
  }
  if (ACT != 0) {
    UNROLL
    for (uint i = 0; i < V; i++) v[i] = gated_value<ACT>(v[i], up[i]);
  }
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
FN void store_word(const thread float* p, float factor, device PieceOf<V>* to, thread float* bias) {
  typedef PieceOf<V> piece;
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
