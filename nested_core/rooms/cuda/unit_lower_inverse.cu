#include "common.cuh"

// (I + a)^-1 of strictly lower triangular matrices of SIZE rows in float32, each by one block of
// SIZE threads: forward substitution, a column to each thread, which stays in its registers.
KERNEL unit_lower_inverse(const float* a, float* out) {
  __shared__ alignas(16) float rows[SIZE][SIZE];
  const int column = threadIdx.x;
  const long start = (long)blockIdx.x * SIZE * SIZE + column;
  #pragma unroll 8
  for (int i = 0; i < SIZE; ++i) rows[i][column] = a[start + i * SIZE];
  __syncthreads();
  float x[SIZE];
  #pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    float sum = i == column ? 1.f : 0.f;
    #pragma unroll
    for (int j = 0; j < i; ++j) sum -= rows[i][j] * x[j];
    x[i] = sum;
    out[start + i * SIZE] = sum;
  }
}
