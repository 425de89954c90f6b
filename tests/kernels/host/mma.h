// Stands for metal_kernels/mma.h on a CPU.
#define SHARED_PIECES(name) uint4* const name = (uint4*)host::shared
inline void copy_piece(uint4* to, const void* from, bool there) { host::start_copy(to, there ? from : nullptr); }
inline void close_batch() { host::close_batch(); }
template <int LEFT>
void wait_batches() { host::wait_batches(LEFT); }
struct Operands {
  unsigned a[4], b[2];
};
inline void mma(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  host::hand_over(Operands{{a0, a1, a2, a3}, {b0, b1}});
  const unsigned g = host::lane() / 4, t = host::lane() % 4;
  for (unsigned k = 0; k < 4; k++) {  // 4 k ... 4 k + 3, and 16 more
    const Operands left = host::slot_of<Operands>(4 * g + k);
    for (unsigned e = 0; e < 2; e++) {
      const Operands right = host::slot_of<Operands>(4 * (2 * t + e) + k);
      for (unsigned h = 0; h < 2; h++) {
        c[e] = __dp4a(int(left.a[2 * h]), int(right.b[h]), c[e]);
        c[2 + e] = __dp4a(int(left.a[2 * h + 1]), int(right.b[h]), c[2 + e]);
      }
    }
  }
}
