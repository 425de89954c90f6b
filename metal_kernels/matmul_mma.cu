// Ternary matrix product for CUDA: words2 codes times int8 activations in layout "bytes", in the int8 tensor cores.
// A sum does not care about the order of k. So lane 4 g + t takes whole words: word t of four, its codes 0..2 by masks,
// and the 16 bytes of activations that meet them; two products of 32 cover the four words. The weight is the left
// operand: its registers come out of the masks in any order, and 16 bytes of activations are two right operands as they
// lie. The codes are 1 too large: the sum of the row's activations is subtracted at the end.
// Template: T output; WM, WN, WK warps along M, N and K; MT, NT tiles of 8 rows and 16 columns a warp; CHUNKS of 64
// codes a stage; STAGES in flight; SCALES 0 tensor, 1 row, 2 group of 128 (WK 1, CHUNKS even); BIAS, RESIDUAL.
// x: uint32 [M, 4 words + 4], rows of layout bytes: the codes, as floats their sum and s; w: uint32 [N, words]; y: T [M, N].
constexpr int BM = WM * MT * 8, BN = WN * NT * 16, THREADS = 32 * WM * WN * WK;
// A stage in pieces of 16 bytes, chunk by chunk; four pieces more a chunk keep its neighbour in the other banks.
constexpr int X_CHUNK = BM * 4 + 4, W_CHUNK = BN + 4, W_AT = CHUNKS * X_CHUNK, STAGE = W_AT + CHUNKS * W_CHUNK;
SHARED_PIECES(pieces);
const int rows = x_shape[0], columns = w_shape[0], words = w_shape[1];
const int lane = threadIdx.x, id = lane + 32 * threadIdx.y, g = lane >> 2, t = lane & 3;
const int wk = threadIdx.y / (WM * WN), wn = threadIdx.y / WM % WN, wm = threadIdx.y % WM;
const int row0 = blockIdx.x * BM, column0 = blockIdx.y * BN;
const int steps = (words + 4 * CHUNKS - 1) / (4 * CHUNKS);
// A thread copies the same piece along K of every X_ROWS-th (W_ROWS-th) row.
constexpr int X_ROWS = THREADS / (CHUNKS * 4), W_ROWS = THREADS / CHUNKS;
static_assert(THREADS % (CHUNKS * 4) == 0 && W_ROWS % 16 == 0, "a block has too few threads for its chunks");
const int x_row = id / (CHUNKS * 4), x_piece = id % (CHUNKS * 4), w_row = id / CHUNKS, w_piece = id % CHUNKS;
const int x_left = rows - row0 - x_row, w_left = columns - column0 - w_row;
const uint32_t* x_from = x + (size_t(row0 + x_row) * (words + 1) + x_piece) * 4;
const uint32_t* w_from = w + size_t(column0 + w_row) * words + w_piece * 4;
const size_t x_stride = size_t(X_ROWS) * (words + 1) * 4, w_stride = size_t(W_ROWS) * words;
// Row 2 g + h of sixteen becomes row 8 h + g of a tile: a lane then has neighbours, and stores them together.
const int x_to = x_piece / 4 * X_CHUNK + x_row * 4 + x_piece % 4;
const int w_to = W_AT + w_piece * W_CHUNK + w_row / 16 * 16 + w_row % 2 * 8 + w_row % 16 / 2;
auto load = [&](int step, uint4* to) {
  const bool x_along = CHUNKS == 2 || step * CHUNKS * 4 + x_piece < words;
  const bool w_along = CHUNKS == 2 || (step * CHUNKS + w_piece) * 4 < words;
  const uint32_t* x_at = x_from;
  const uint32_t* w_at = w_from;
#pragma unroll
  for (int i = 0; i < BM; i += X_ROWS, x_at += x_stride)
    if (BM % X_ROWS == 0 || i + x_row < BM) copy_piece(to + x_to + i * 4, x_at, i < x_left && x_along);
#pragma unroll
  for (int i = 0; i < BN; i += W_ROWS, w_at += w_stride)
    if (BN % W_ROWS == 0 || i + w_row < BN) copy_piece(to + w_to + i, w_at, i < w_left && w_along);
  x_from += CHUNKS * 16, w_from += CHUNKS * 4;
};

int acc[MT][NT][4], sums[MT][4];  // element 2 h + e: row 2 t + e, column 2 g + h of a tile
float out[MT][NT][4];  // with group scales; not used, and so not there, without
#pragma unroll
for (int mt = 0; mt < MT; mt++)
#pragma unroll
  for (int e = 0; e < 4; e++) {
    sums[mt][e] = 0;
#pragma unroll
    for (int nt = 0; nt < NT; nt++) acc[mt][nt][e] = 0, out[mt][nt][e] = 0.0f;
  }
const int my_row = row0 + wm * MT * 8 + 2 * t, my_column = column0 + wn * NT * 16 + 2 * g;

#pragma unroll
for (int step = 0; step < STAGES - 1; step++) {
  if (step < steps) load(step, pieces + step * STAGE);
  close_batch();
}
int filling = STAGES - 1, reading = 0;
for (int step = 0; step < steps; step++) {
  wait_batches<STAGES - 2>();
  __syncthreads();
  if (step + STAGES - 1 < steps) load(step + STAGES - 1, pieces + filling * STAGE);
  close_batch();
  const uint4* const from = pieces + reading * STAGE;
  filling = filling + 1 == STAGES ? 0 : filling + 1, reading = reading + 1 == STAGES ? 0 : reading + 1;
#pragma unroll(MT * NT < 40 ? CHUNKS / WK : 1)  // the widest tile has no registers for a second chunk's loads
  for (int c0 = 0; c0 < CHUNKS; c0 += WK) {
    const int c = c0 + wk;
    const uint4* const x_at = from + c * X_CHUNK + (wm * MT * 8 + g) * 4 + t;
    const uint32_t* const w_at = (const uint32_t*)(from + W_AT + c * W_CHUNK + wn * NT * 16 + g) + t;
    uint32_t a[NT][8];  // both products' left operands
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t word = w_at[nt * 64 + h * 32];
#pragma unroll
        for (int j = 0; j < 4; j++) a[nt][2 * j + h] = word >> 2 * j & 0x03030303u;
      }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const uint4 x = x_at[mt * 32];
#pragma unroll
      for (int nt = 0; nt < NT; nt++) mma(acc[mt][nt], a[nt][0], a[nt][1], a[nt][2], a[nt][3], x.x, x.y);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) mma(acc[mt][nt], a[nt][4], a[nt][5], a[nt][6], a[nt][7], x.z, x.w);
      if (SCALES == 2) {  // the sums of the activations: a product with ones
        const uint32_t ones = 0x01010101u;
        mma(sums[mt], ones, ones, ones, ones, x.x, x.y);
        mma(sums[mt], ones, ones, ones, ones, x.z, x.w);
      }
    }
    const int group = (step * CHUNKS + c) / 2;
    if (SCALES == 2 && c % 2 == 1 && group < words / 8) {
      float of_group[NT][2];
#pragma unroll
      for (int i = 0; i < NT * 2; i++) {
        const int n = min(my_column + i / 2 * 16 + i % 2, columns - 1);
        of_group[i / 2][i % 2] = scale[size_t(n) * (words / 8) + group];
      }
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float my_s = as_type<float>(x[(size_t(min(my_row + mt * 8 + e, rows - 1) + 1) * (words + 1) - 1) * 4 + 1]);
#pragma unroll
          for (int i = 0; i < NT * 2; i++) {
            int& sum = acc[mt][i / 2][i % 2 * 2 + e];
            float& y_sum = out[mt][i / 2][i % 2 * 2 + e];
            y_sum = add_rn(y_sum, scaled(float(sum - sums[mt][e]), my_s, of_group[i / 2][i % 2]));
            sum = 0;
          }
        }
#pragma unroll
      for (int i = 0; i < MT * 4; i++) sums[i / 4][i % 4] = 0;
    }
  }
}
if (WK > 1) {  // the first of the warps along K adds what the others found
  wait_batches<0>();
  int* const parts = (int*)pieces + (wn * WM + wm) * (MT * NT * 4 * 32) + lane;
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
struct alignas(2 * sizeof(T)) Two {
  T of[2];
};
if (wk == 0)
#pragma unroll
  for (int i = 0; i < MT * 2; i++) {
    const int mt = i / 2, e = i % 2, m = my_row + mt * 8 + e;
    if (m < rows) {
      const uint32_t* tail = x + (size_t(m) * (words + 1) + words) * 4;
      const float my_s = as_type<float>(tail[1]);
      const int sum = SCALES == 2 ? 0 : int(as_type<float>(tail[0]));
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const size_t at = size_t(m) * columns + my_column + nt * 16;
        Two two;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int n = my_column + nt * 16 + h;
          if (n < columns) {
            const float v = SCALES == 2 ? out[mt][nt][2 * h + e]
                                        : scaled(float(acc[mt][nt][2 * h + e] - sum), my_s, scale_of<SCALES>(scale, n));
            two.of[h] = finish<T, BIAS, RESIDUAL>(v, BIAS ? bias[n] : 0.0f, RESIDUAL ? float(residual[at + h]) : 0.0f);
            if (columns % 2) y[at + h] = two.of[h];
          }
        }
        if (columns % 2 == 0 && my_column + nt * 16 < columns) *(Two*)(y + at) = two;
      }
    }
  }
