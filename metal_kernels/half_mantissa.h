// Half-mantissa products: codes become halves by masks alone, 11 integer operations for 16 codes. After words.h.
//
// A word holds 16 codes c = t + 1 (0, 1 or 2; never 3), code i at bits 2i. Step p makes a half2 of codes p and p + 8 in
// place; a float fma widens half operands for nothing. What code position p becomes, and what its activation is scaled
// by (layout.HALF_SCALE, exact in a half), so that every product is (t + bias) * x in units of 2^-9:
//   p = 0..4  one exponent bit is kept in the mask  2^-9 (1024 + 4^p c)   x 4^-p     bias 1 + 1024 * 4^-p
//   p = 5     the code is the exponent's low bits   2^-14 c               x 2^5      bias 1
//   p = 6     sign and one exponent bit             -2^-11 t              x -(2^2)   no bias
//   p = 7     sign and one exponent bit             -2 t                  x -(2^-10) no bias
//
// Why it is exact: a half times a half is exact in float (22 bits), and is a whole number of units. For a code x of at
// most 128 the sixteen products of a word come to at most 1378 * 128 units in each of the two sums of a lane (codes p
// and codes p + 8), so 95 words a lane stay below 2^24 units and no partial sum is ever rounded: in any order, with or
// without contraction, under fast math, and though half denormals be flushed (none occurs). A lane takes its own bias
// off before lanes are added: what is left is t * x alone, and |sum| <= 128 K is far below 2^24.
FN void halves_of(uint w, thread uint (&h)[8]) {
  const uint m = w | 0xC000C000u;
  h[0] = m & 0x40034003u;
  h[1] = m & 0x400C400Cu;
  h[2] = m & 0x40304030u;
  h[3] = m & 0x40C040C0u;
  h[4] = m & 0x43004300u;
  h[5] = w & 0x0C000C00u;
  h[6] = (m - 0x50005000u) & 0x90009000u;
  h[7] = (w ^ 0x40004000u) & 0xC000C000u;
}

typedef float2 Sums;  // a lane's two sums: of codes p, and of codes p + 8

FN void half_mac(uint h, uint x, thread Sums& acc) {
  const half2 c = as_type<half2>(h), a = as_type<half2>(x);
  acc.x = fma(float(c.x), float(a.x), acc.x);
  acc.y = fma(float(c.y), float(a.y), acc.y);
}

// The first P of eight half2 against prepared activations.
template <int P>
FN void half_dot(thread const uint (&h)[8], uint4 lo, uint4 hi, thread Sums& acc) {
  const uint x[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
  UNROLL for (uint p = 0; p < P; p++) half_mac(h[p], x[p], acc);
}

// One step of a lane: W words of R rows at wp + at[r] against the activations of M rows at xp + m * stride. A word is
// decoded once for all M. BIAS: also what the masks add to each row of activations, which is the product with a word of
// sixteen zeros, up to the position that has a bias.
template <int M, int R, int W, bool BIAS, typename Load>
FN void half_step(const device Load* wp, thread const uint (&at)[R], const device uint4* xp,
                  uint stride, thread Sums (&acc)[M][R], thread Sums (&bias)[M]) {
  Load u[R];
  uint zeros[8];
  halves_of(0x55555555u, zeros);
  UNROLL for (uint r = 0; r < R; r++) u[r] = wp[at[r]];
  UNROLL for (uint j = 0; j < W; j++) {
    uint h[R][8];
    UNROLL for (uint r = 0; r < R; r++) halves_of(Words<W>::at(u[r], j), h[r]);
    UNROLL for (uint m = 0; m < M; m++) {
      const uint4 lo = xp[m * stride + 2 * j], hi = xp[m * stride + 2 * j + 1];
      UNROLL for (uint r = 0; r < R; r++) half_dot<8>(h[r], lo, hi, acc[m][r]);
      if (BIAS) half_dot<6>(zeros, lo, hi, bias[m]);
    }
  }
}
