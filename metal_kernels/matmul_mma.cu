// Ternary matrix product for CUDA: int8 activations in layout "bytes" times words2 codes in the int8 tensor cores.
// A sum does not care about the order of k. So lane 4 g + t takes whole words: word t of four, its codes 0..2 by masks,
// and the 16 bytes of activations that meet them; two products of 32 cover the four words. The codes are 1 too large:
// the sum of the row's activations is subtracted at the end.
// Template: T output; WM, WN, WK warps along M, N and K; MT, NT tiles of 16 rows and 8 columns a warp; CHUNKS of 64
// codes a stage; STAGES in flight; SCALES 0 tensor, 1 row, 2 group of 128 (WK 1, CHUNKS even); BIAS, RESIDUAL.
// xq: int8 [M, 16 words]; xb: float [M, 1]; s: float [M]; w: uint32 [N, words]; y: T [M, N].
constexpr int BM = WM * MT * 16, BN = WN * NT * 8, THREADS = 32 * WM * WN * WK;
// A stage in pieces of 16 bytes, chunk by chunk; four pieces more a chunk keep its neighbour in the other banks.
constexpr int A_CHUNK = BM * 4 + 4, W_CHUNK = BN + 4, W_AT = CHUNKS * A_CHUNK, STAGE = W_AT + CHUNKS * W_CHUNK;
SHARED_PIECES(pieces);
const int rows = xq_shape[0], columns = w_shape[0], words = w_shape[1];
const int id = threadIdx.x + 32 * threadIdx.y, lane = threadIdx.x, g = lane >> 2, t = lane & 3;
const int wk = threadIdx.y / (WM * WN), wn = threadIdx.y / WM % WN, wm = threadIdx.y % WM;
const int row0 = blockIdx.x * BM, column0 = blockIdx.y * BN;
const int steps = (words + 4 * CHUNKS - 1) / (4 * CHUNKS);
const int8_t* x_from = xq + size_t(row0) * words * 16;
const uint32_t* w_from = w + size_t(column0) * words;

auto load = [&](int step) {
  uint4* to = pieces + step % STAGES * STAGE;
#pragma unroll
  for (int i0 = 0; i0 < BM * CHUNKS * 4; i0 += THREADS) {
    const int i = i0 + id, row = i / (CHUNKS * 4), piece = i % (CHUNKS * 4), at = step * CHUNKS * 4 + piece;
    if (BM * CHUNKS * 4 % THREADS == 0 || i < BM * CHUNKS * 4) {
      const bool there = row0 + row < rows && at < words;
      copy_piece(to + piece / 4 * A_CHUNK + row * 4 + piece % 4, there ? x_from + (row * words + at) * 16 : xq, there);
    }
  }
#pragma unroll
  for (int i0 = 0; i0 < BN * CHUNKS; i0 += THREADS) {
    const int i = i0 + id, row = i / CHUNKS, piece = i % CHUNKS, at = (step * CHUNKS + piece) * 4;
    if (BN * CHUNKS % THREADS == 0 || i < BN * CHUNKS) {
      const bool there = column0 + row < columns && at < words;
      copy_piece(to + W_AT + piece * W_CHUNK + row, there ? w_from + row * words + at : w, there);
    }
  }
};

int acc[MT][NT][4], sums[MT][4];
float out[MT][NT][4];  // with group scales; not used, and so not there, without
#pragma unroll
for (int mt = 0; mt < MT; mt++)
#pragma unroll
  for (int e = 0; e < 4; e++) {
    sums[mt][e] = 0;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) acc[mt][nt][e] = 0, out[mt][nt][e] = 0.0f;
  }
float my_s[MT][2];  // the scales of this lane's rows of activations
int my_row[MT][2];
#pragma unroll
for (int mt = 0; mt < MT; mt++)
#pragma unroll
  for (int h = 0; h < 2; h++) {
    my_row[mt][h] = row0 + (wm * MT + mt) * 16 + h * 8 + g;
    my_s[mt][h] = my_row[mt][h] < rows ? s[my_row[mt][h]] : 1.0f;
  }

#pragma unroll
for (int step = 0; step < STAGES - 1; step++) {
  if (step < steps) load(step);
  close_batch();
}
for (int step = 0; step < steps; step++) {
  wait_batches<STAGES - 2>();
  __syncthreads();
  if (step + STAGES - 1 < steps) load(step + STAGES - 1);
  close_batch();
  const uint4* from = pieces + step % STAGES * STAGE;
#pragma unroll
  for (int c0 = 0; c0 < CHUNKS; c0 += WK) {
    const int c = c0 + wk;
    const uint4* a_from = from + c * A_CHUNK + (wm * MT * 16 + g) * 4 + t;
    const uint32_t* b_from = (const uint32_t*)(from + W_AT + c * W_CHUNK + wn * NT * 8 + g) + t;
    uint4 a[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) a[mt][0] = a_from[mt * 64], a[mt][1] = a_from[mt * 64 + 32];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
      const uint32_t b = b_from[nt * 32];
      const uint32_t b0 = b & 0x03030303u, b1 = b >> 2 & 0x03030303u, b2 = b >> 4 & 0x03030303u, b3 = b >> 6 & 0x03030303u;
#pragma unroll
      for (int mt = 0; mt < MT; mt++) mma(acc[mt][nt], a[mt][0].x, a[mt][1].x, a[mt][0].y, a[mt][1].y, b0, b1);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) mma(acc[mt][nt], a[mt][0].z, a[mt][1].z, a[mt][0].w, a[mt][1].w, b2, b3);
    }
    if (SCALES == 2) {  // the sums of the activations: a product with ones
      const uint32_t ones = 0x01010101u;
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        mma(sums[mt], a[mt][0].x, a[mt][1].x, a[mt][0].y, a[mt][1].y, ones, ones);
        mma(sums[mt], a[mt][0].z, a[mt][1].z, a[mt][0].w, a[mt][1].w, ones, ones);
      }
    }
    const int group = (step * CHUNKS + c) / 2;
    if (SCALES == 2 && c % 2 == 1 && group < words / 8) {
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int n = min(column0 + (wn * NT + nt) * 8 + 2 * t + e, columns - 1);
          const float of_group = scale[size_t(n) * (words / 8) + group];
#pragma unroll
          for (int mt = 0; mt < MT; mt++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const float sum = float(acc[mt][nt][2 * h + e] - sums[mt][2 * h]);
              out[mt][nt][2 * h + e] = add_rn(out[mt][nt][2 * h + e], scaled(sum, my_s[mt][h], of_group));
              acc[mt][nt][2 * h + e] = 0;
            }
        }
#pragma unroll
      for (int mt = 0; mt < MT; mt++) sums[mt][0] = sums[mt][2] = 0;
    }
  }
}
if (WK > 1) {  // the first of the warps along K adds what the others found
  wait_batches<0>();
  int* parts = (int*)pieces + (wn * WM + wm) * (MT * NT * 4 * 32) + lane;
#pragma unroll
  for (int other = 1; other < WK; other++) {
    __syncthreads();
    if (wk == other)
#pragma unroll
      for (int i = 0; i < MT * NT * 4; i++) parts[i * 32] = acc[i / (NT * 4)][i / 4 % NT][i % 4];
    __syncthreads();
    if (wk == 0)
#pragma unroll
      for (int i = 0; i < MT * NT * 4; i++) acc[i / (NT * 4)][i / 4 % NT][i % 4] += parts[i * 32];
  }
}
if (wk == 0)
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int m = my_row[mt][h];
      if (m < rows) {
        const int sum = SCALES == 2 ? 0 : int(xb[m]);
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int n = column0 + (wn * NT + nt) * 8 + 2 * t + e;
            if (n < columns) {
              const size_t at = size_t(m) * columns + n;
              const float v = SCALES == 2 ? out[mt][nt][2 * h + e]
                                          : scaled(float(acc[mt][nt][2 * h + e] - sum), my_s[mt][h], scale_of<SCALES>(scale, n));
              y[at] = finish<T, BIAS, RESIDUAL>(v, BIAS ? bias[n] : 0.0f, RESIDUAL ? float(residual[at]) : 0.0f);
            }
          }
      }
    }
