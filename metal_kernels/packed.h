// Pieces of memory as 32-bit words, and the values of T in a word.
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
FN void split(uint piece, thread uint* to) { to[0] = piece; }

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
