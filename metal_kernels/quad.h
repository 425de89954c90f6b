// Four neighbouring values of a row, one thread's at a time. After packed.h.

// As they lie in memory, 0 from column k on. WHOLE: k and the row's start are whole pieces of 16 bytes.
template <typename T, bool WHOLE>
FN uint4 quad_bits(const device T* row, uint at, uint k) {
  uint4 bits = uint4();
  if (WHOLE && at < k) {
    if (sizeof(T) == 4) {
      bits = *(const device uint4*)(row + at);
    } else {
      const uint2 half_as_wide = *(const device uint2*)(row + at);
      bits.x = half_as_wide.x;
      bits.y = half_as_wide.y;
    }
  } else if (!WHOLE && sizeof(T) == 4) {
    const device uint* from = (const device uint*)row + at;
    if (at < k) bits.x = from[0];
    if (at + 1 < k) bits.y = from[1];
    if (at + 2 < k) bits.z = from[2];
    if (at + 3 < k) bits.w = from[3];
  } else if (!WHOLE) {
    const device ushort* from = (const device ushort*)row + at;
    if (at < k) bits.x = from[0];
    if (at + 1 < k) bits.x |= uint(from[1]) << 16;
    if (at + 2 < k) bits.y = from[2];
    if (at + 3 < k) bits.y |= uint(from[3]) << 16;
  }
  return bits;
}

// The same as floats.
template <typename T>
FN void quad_values(uint4 bits, thread float* to) {
  if (sizeof(T) == 4) {
    to[0] = as_type<float>(bits.x);
    to[1] = as_type<float>(bits.y);
    to[2] = as_type<float>(bits.z);
    to[3] = as_type<float>(bits.w);
  } else {
    Packed<T>::values(bits.x, to);
    Packed<T>::values(bits.y, to + 2);
  }
}
