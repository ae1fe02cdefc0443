#include "common.cuh"

// RMS normalisation, backwards.
//
// A block takes row after row of n, a thread up to PACKS loads of it; the weight stays in registers.
// With i = 1 / sqrt(mean(x^2) + eps): dx = w g i - x i^3 mean(w g x).
KERNEL rms_norm_gradient(const T* x, const T* w, const T* g, T* dx, int rows, int n, float eps) {
  __shared__ float sums[2][2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Pack weight[PACKS];
  #pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    int at = (p * blockDim.x + threadIdx.x) * W;
    if (at < n) weight[p] = load(w + at);
  }
  for (int row = blockIdx.x, turn = 0; row < rows; row += gridDim.x, turn ^= 1) {
    const long start = (long)row * n;
    Pack given[PACKS], above[PACKS];
    float square = 0, along = 0;
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      int at = (p * blockDim.x + threadIdx.x) * W;
      if (at < n) given[p] = load(x + start + at), above[p] = load(g + start + at);
    }
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      int at = (p * blockDim.x + threadIdx.x) * W;
      if (at >= n) break;
      #pragma unroll
      for (int k = 0; k < W; ++k) {
        float a = wide(given[p].value[k]);
        square += a * a;
        along += a * wide(above[p].value[k]) * wide(weight[p].value[k]);
      }
    }
    #pragma unroll
    for (int o = 16; o > 0; o /= 2) {
      square += __shfl_xor_sync(0xffffffff, square, o);
      along += __shfl_xor_sync(0xffffffff, along, o);
    }
    if (lane == 0) sums[turn][0][warp] = square, sums[turn][1][warp] = along;
    __syncthreads();  // once a row: the next one has the other half of the sums
    square = along = 0;
    for (int i = 0; i < blockDim.x / 32; ++i) {
      square += sums[turn][0][i], along += sums[turn][1][i];
    }
    const float inverse = rsqrtf(square / n + eps);
    const float factor = along / n * inverse * inverse * inverse;
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      int at = (p * blockDim.x + threadIdx.x) * W;
      if (at >= n) break;
      #pragma unroll
      for (int k = 0; k < W; ++k) {
        given[p].value[k] = narrowed(
            wide(above[p].value[k]) * wide(weight[p].value[k]) * inverse
            - wide(given[p].value[k]) * factor);
      }
      store(dx + start + at, given[p]);
    }
  }
}
