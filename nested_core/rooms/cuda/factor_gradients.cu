#include "common.cuh"

// Two neighbours in a row of z, with zeros from `end` on; rows are even.
__device__ inline unsigned two(const T* z, int row, int end) {
  return row < end ? load_two(z + row) : 0;
}

// out[r, column] = sum of z[r, row] x[row, column] over rows from begin to end, for 8 n <= 8 MOST
// rows of z and 64 columns a block. A warp takes every WARPS-th 16 rows; the warps' sums are added
// in their order. It goes to `out`, or narrowed to `whole` where that is given.
__device__ inline void product(
    const T* z, const T* x, float* out, T* whole, int rows, int n, int width, int tile, int begin,
    int end) {
  __shared__ float shared[WARPS * 8 * 66];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float c[MOST][4][4] = {};
  const T* from = x + tile * 64 + 8 * g;
  #pragma unroll 2
  for (int first = begin + 16 * warp; first < end; first += 16 * WARPS) {
    unsigned w[4][4];  // rows 2t, 2t + 1, 2t + 8, 2t + 9; eight columns of each
    #pragma unroll
    for (int q = 0; q < 4; ++q) {
      int row = first + 2 * t + q % 2 + 8 * (q / 2);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (row < end) v = load_eight(from + (long)row * width);
      w[q][0] = v.x, w[q][1] = v.y, w[q][2] = v.z, w[q][3] = v.w;
    }
    #pragma unroll
    for (int i = 0; i < MOST; ++i) {
      if (i >= n) break;
      const T* factor = z + (long)(8 * i + g) * rows;
      unsigned b0 = two(factor, first + 2 * t, end), b1 = two(factor, first + 2 * t + 8, end);
      #pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_add(c[i][j],
            __byte_perm(w[0][j], w[1][j], 0x5410), __byte_perm(w[0][j], w[1][j], 0x7632),
            __byte_perm(w[2][j], w[3][j], 0x5410), __byte_perm(w[2][j], w[3][j], 0x7632), b0, b1);
      }
    }
  }
  #pragma unroll
  for (int i = 0; i < MOST; ++i) {
    if (i >= n) break;
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
      #pragma unroll
      for (int p = 0; p < 4; ++p) {
        int r = 2 * t + p % 2, column = 8 * g + 2 * j + p / 2;
        shared[(warp * 8 + r) * 66 + column] = c[i][j][p];
      }
    }
    __syncthreads();
    for (int place = threadIdx.x; place < 8 * 64; place += 32 * WARPS) {
      int r = place / 64, column = place % 64;
      float sum = 0;
      for (int u = 0; u < WARPS; ++u) sum += shared[(u * 8 + r) * 66 + column];
      long at = (long)(8 * i + r) * width + tile * 64 + column;
      if (whole) whole[at] = narrowed(sum);
      else out[at] = sum;
    }
    __syncthreads();
  }
}

// Up to four pairs, side by side in the grid's x; its y splits the rows, and each split has a part
// of its own in `parts`, where the pairs' results follow one another. Rows that are not split give
// each pair's result at once.
KERNEL factor_gradients(
    const T* z0, const T* x0, const T* z1, const T* x1, const T* z2, const T* x2, const T* z3,
    const T* x3, float* parts, T* whole0, T* whole1, T* whole2, T* whole3, int rows, int n0, int w0,
    int n1, int w1, int n2, int w2, int n3, int w3) {
  const int span = (rows + 16 * gridDim.y - 1) / (16 * gridDim.y) * 16;
  const int begin = blockIdx.y * span, end = min(rows, begin + span);
  const long size0 = 8l * n0 * w0, size1 = 8l * n1 * w1, size2 = 8l * n2 * w2;
  parts += blockIdx.y * (size0 + size1 + size2 + 8l * n3 * w3);
  const int end0 = w0 / 64, end1 = end0 + w1 / 64, end2 = end1 + w2 / 64, tile = blockIdx.x;
  const T *z = z3, *x = x3;
  int n = n3, width = w3, first = end2;
  long at = size0 + size1 + size2;
  if (tile < end2) z = z2, x = x2, n = n2, width = w2, first = end1, at = size0 + size1;
  if (tile < end1) z = z1, x = x1, n = n1, width = w1, first = end0, at = size0;
  if (tile < end0) z = z0, x = x0, n = n0, width = w0, first = 0, at = 0;
  T* whole = tile < end0 ? whole0 : tile < end1 ? whole1 : tile < end2 ? whole2 : whole3;
  if (gridDim.y > 1) whole = nullptr;
  product(z, x, parts + at, whole, rows, n, width, tile - first, begin, end);
}
