// The instructions of NVIDIA GPUs that C++ has no name for. The tests replace this file to run the bodies on a CPU.
// Dynamic shared memory, as 16-byte pieces.
#define SHARED_PIECES(name) extern __shared__ uint4 name[]

// Start a copy of 16 bytes from global to shared memory, or of 16 zero bytes where there is nothing to copy.
inline __device__ void copy_piece(uint4* to, const void* from, bool there) {
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// The copies that this thread started since the last call are one batch.
inline __device__ void close_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most LEFT of this thread's batches are still on their way.
template <int LEFT>
inline __device__ void wait_batches() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// A warp adds to its 16 x 8 sums c the product of 16 x 32 bytes a and 32 x 8 bytes b. Lane 4 g + t has of a row g (a0,
// a2) and row g + 8 (a1, a3), of b column g, each at k = 4 t (a0, a1, b0) and 16 + 4 t (a2, a3, b1); of c row g
// (c[0], c[1]) and row g + 8 (c[2], c[3]) at columns 2 t and 2 t + 1.
inline __device__ void mma(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
