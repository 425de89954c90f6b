// One position's keys or values among the lanes of a part of a simdgroup, and softmax in pieces.
#define NO_MAXIMUM -1e38f  // over no score
#define NO_SCORE -2e38f  // of a position that is not there: 2^(NO_SCORE - NO_MAXIMUM) is 0
#define LOG2E 1.44269504f

template <int BYTES>
struct PieceOfBytes {
  typedef uint4 type;
};
template <>
struct PieceOfBytes<8> {
  typedef uint2 type;
};
template <>
struct PieceOfBytes<4> {
  typedef uint type;
};

// A row of D values is cut into pieces of VALUES that lanes take in turn. Where value d is kept, so that what all lanes
// read at once are neighbours:
template <int VALUES, int LANES>
FN uint place(uint d) {
  const uint piece = d / VALUES;
  return (piece / LANES * VALUES + d % VALUES) * LANES + piece % LANES;
}

// The sum over each LANES neighbouring lanes, to the same bits in all of them.
template <int LANES>
FN float part_sum(float v) {
  UNROLL
  for (ushort o = LANES / 2; o > 0; o /= 2) v += simd_shuffle_xor(v, o);
  return v;
}
