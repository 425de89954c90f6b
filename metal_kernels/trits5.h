// trits5 words: twenty weights, four bytes, each byte a base 3 fraction v / 256 of five digits c = t + 1 (formats/trits5.py).
// Two bytes are read at once, one in each 16-bit half of a register, v in bits 2 to 9: in 3v the next digit lies in bits 10
// and 11, which are a half's exponent, so the masked digit is the half c * 2^-14 as it stands: 0, 2^-14 or 2^-13, exact
// and normal. Nothing is shifted out, or-ed in or converted; what is left of 3v below the digit is the next v.
enum : uint { TRITS_DIGIT = 0x0C000C00u, TRITS_REST = 0x03FC03FCu };

// The first and third byte of a word, and the second and fourth: v in bits 2 to 9 of each half.
FN uint trits_first(uint w) { return (w & 0x00FF00FFu) << 2; }
FN uint trits_second(uint w) { return (w >> 6) & TRITS_REST; }

// Five digits of each of the two bytes in v, as half2; the first weight's digit first.
FN void trits_digits(uint v, thread uint* c) {
  UNROLL for (uint j = 0; j < 5; j++) {
    const uint u = v + v + v;
    c[j] = u & TRITS_DIGIT;
    v = u & TRITS_REST;
  }
}

// Two weights: halves widen in the fma itself.
FN float trits_mac(uint c, uint x, float acc) {
  const half2 h = as_type<half2>(c), a = as_type<half2>(x);
  return fma(float(h.y), float(a.y), fma(float(h.x), float(a.x), acc));
}
