// Sums of a group over the SHARE neighbouring lanes that hold it, for R rows at once (both powers of two).
// Each round swaps half of the rows with the lane's partner and keeps the other half, so that lanes end with different
// rows; once one row is left, partners add it whole. A lane ends with rows first .. first + kept - 1 in a[0 ..].
template <int R, int SHARE>
struct GroupRows {
  enum { kept = R > SHARE ? R / SHARE : 1 };
  static FN uint first(uint lane) {
    uint row = 0, half_rows = R / 2;
    for (uint o = 1; o < SHARE && half_rows > 0; o *= 2, half_rows /= 2) row += lane & o ? half_rows : 0u;
    return row;
  }
  static FN void sum(uint lane, thread float (&a)[R]) {
    uint half_rows = R / 2;
    UNROLL for (uint o = 1; o < SHARE; o *= 2) {
      const bool upper = lane & o;
      if (half_rows == 0) a[0] += simd_shuffle_xor(a[0], o);
      UNROLL for (uint i = 0; i < R / 2; i++) {
        if (i < half_rows) {
          const float low = a[i], high = a[i + half_rows];  // read first: a chosen element would keep the array in memory
          a[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, o);
        }
      }
      half_rows /= 2;
    }
  }
};
