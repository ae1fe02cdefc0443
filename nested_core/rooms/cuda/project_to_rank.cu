#include "common.cuh"

constexpr int AHEAD = MOST < 4 ? 4 : 2;  // chunks that are loaded at once

// out[i, row] = scale sum_k m[i, k] x[row, k], for 8 n <= 8 MOST rows of m and 16 rows of x a block.
// A warp takes every WARPS-th 32 of k; the warps' sums are added in their order.
__device__ inline void product(
    const T* m, const T* x, T* out, int rows, int n, int k, float scale) {
  __shared__ float shared[WARPS * 8 * MOST * 17];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * 16;
  const T* upper = x + (long)min(first + g, rows - 1) * k + W * t;
  const T* lower = x + (long)min(first + 8 + g, rows - 1) * k + W * t;
  const T* factor = m + (long)g * k + W * t;
  float c[MOST][4] = {};
  for (int chunk = warp; chunk < k / 32; chunk += AHEAD * WARPS) {
    uint4 u[AHEAD], l[AHEAD], b[AHEAD][MOST];
    #pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int at = 32 * min(chunk + a * WARPS, k / 32 - 1);
      u[a] = load_eight(upper + at), l[a] = load_eight(lower + at);
      #pragma unroll
      for (int i = 0; i < MOST; ++i) b[a][i] = load_eight(factor + 8l * min(i, n - 1) * k + at);
    }
    #pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (chunk + a * WARPS >= k / 32) break;
      #pragma unroll
      for (int i = 0; i < MOST; ++i) {
        if (i >= n) break;
        multiply_add(c[i], u[a].x, l[a].x, u[a].y, l[a].y, b[a][i].x, b[a][i].y);
        multiply_add(c[i], u[a].z, l[a].z, u[a].w, l[a].w, b[a][i].z, b[a][i].w);
      }
    }
  }
  #pragma unroll
  for (int i = 0; i < MOST; ++i) {
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
      int row = g + 8 * (j / 2), column = 8 * i + 2 * t + j % 2;
      shared[(warp * 8 * MOST + column) * 17 + row] = c[i][j];
    }
  }
  __syncthreads();
  for (int place = threadIdx.x; place < 16 * 8 * n; place += 32 * WARPS) {
    int row = place % 16, column = place / 16;
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += shared[(w * 8 * MOST + column) * 17 + row];
    if (first + row < rows) out[(long)column * rows + first + row] = narrowed(sum * scale);
  }
}

// Up to four pairs, one in each plane of the grid, their results one above the other in `out`;
// n is the height of each m in tiles of 8, k its width.
KERNEL project_to_rank(
    const T* m0, const T* x0, const T* m1, const T* x1, const T* m2, const T* x2, const T* m3,
    const T* x3, T* out, int rows, int n0, int k0, int n1, int k1, int n2, int k2, int n3, int k3,
    float scale) {
  const T *m = m0, *x = x0;
  int n = n0, k = k0, above = 0;
  if (blockIdx.y == 1) m = m1, x = x1, n = n1, k = k1, above = n0;
  if (blockIdx.y == 2) m = m2, x = x2, n = n2, k = k2, above = n0 + n1;
  if (blockIdx.y == 3) m = m3, x = x3, n = n3, k = k3, above = n0 + n1 + n2;
  product(m, x, out + 8l * above * rows, rows, n, k, scale);
}
