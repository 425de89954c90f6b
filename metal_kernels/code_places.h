// Codes of a word as halves at their three natural places, for activations that stay in floating point. After words.h.
//
// Two shifts, by 6 and 12, bring all eight code positions of a half2 to one of three places, where masks make a half of
// a code c = t + 1 without a bias of 1024, which would cost ten bits of precision:
//   place 5  bits 10-11, the exponent's low bits     2^-14 c   (no denormal)   positions 2, 5
//   place 6  bits 12-13, sign and one exponent bit   -2^-11 t                  positions 0, 3, 6
//   place 7  bits 14-15, sign and one exponent bit   -2 t                      positions 1, 4, 7
// Each place has its own sum, so the powers of two cost one operation a row; only place 5 has a bias: the sum of the
// activations that met it.
struct Places {
  float five, six, seven;
};

FN uint place6(uint w) { return ((w | 0xC000C000u) - 0x50005000u) & 0x90009000u; }
FN uint place7(uint w) { return (w ^ 0x40004000u) & 0xC000C000u; }

FN void places_of(uint w, thread uint (&h)[8]) {
  const uint a = w << 12, b = w << 6;
  h[0] = place6(a);
  h[1] = place7(a);
  h[2] = b & 0x0C000C00u;
  h[3] = place6(b);
  h[4] = place7(b);
  h[5] = w & 0x0C000C00u;
  h[6] = place6(w);
  h[7] = place7(w);
}

FN float place_mac(uint h, float x, float x8, float acc) {
  const half2 c = as_type<half2>(h);
  return fma(float(c.y), x8, fma(float(c.x), x, acc));
}

FN void places_dot(thread const uint (&h)[8], thread const float (&x)[16], thread Places& acc) {
  acc.six = place_mac(h[0], x[0], x[8], acc.six);
  acc.seven = place_mac(h[1], x[1], x[9], acc.seven);
  acc.five = place_mac(h[2], x[2], x[10], acc.five);
  acc.six = place_mac(h[3], x[3], x[11], acc.six);
  acc.seven = place_mac(h[4], x[4], x[12], acc.seven);
  acc.five = place_mac(h[5], x[5], x[13], acc.five);
  acc.six = place_mac(h[6], x[6], x[14], acc.six);
  acc.seven = place_mac(h[7], x[7], x[15], acc.seven);
}

FN float place5_bias(thread const float (&x)[16]) { return (x[2] + x[5]) + (x[10] + x[13]); }

// The sum of t * x that the three sums stand for.
FN float places_value(thread const Places& acc, float bias) {
  return (16384.0f * acc.five - bias) - (2048.0f * acc.six + 0.5f * acc.seven);
}

// Sixteen activations as floats; with a ragged K those from `left` on, past the row's end, are 0 and not read.
template <bool RAGGED, typename P>
FN void sixteen(P x, int left, thread float (&to)[16]) {
  if (RAGGED && left < 16) {
    UNROLL for (int i = 0; i < 16; i++) to[i] = i < left ? float(x[i]) : 0.0f;
  } else {
    UNROLL for (int i = 0; i < 16; i++) to[i] = float(x[i]);
  }
}
