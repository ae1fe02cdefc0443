#include "common.cuh"

constexpr int COLUMNS = 32;  // of the state, in one block: eight to each of a warp's four threads
constexpr int STRIDE = SIZE + 32;  // in which threads that read together use different banks

// S <- decay S + R - E S, chunk after chunk or from the last to the first, and S before each.
// E is [chunks, matrices, SIZE, SIZE], R [chunks, matrices, SIZE, width]; a decay is of a matrix,
// or of each of its rows. A warp keeps 16 rows of S in registers, as float32.
KERNEL carry_state(
    const float* decay, const T* e, const T* r, const float* state, T* before, float* last,
    int chunks, int matrices, int width, int is_by_row, int is_reversed) {
  __shared__ alignas(16) T shared[2][COLUMNS * STRIDE];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int slices = width / COLUMNS, matrix = blockIdx.x / slices;
  const int row = 16 * warp + g, column = blockIdx.x % slices * COLUMNS + W * t;
  float s[2][W];
  #pragma unroll
  for (int half = 0; half < 2; ++half) {
    const long from = ((long)matrix * SIZE + row + 8 * half) * width + column;
    #pragma unroll
    for (int i = 0; i < W; ++i) s[half][i] = state[from + i];
  }
  for (int step = 0; step < chunks; ++step) {
    const long at = (long)(is_reversed ? chunks - 1 - step : step) * matrices + matrix;
    uint4 a[2][SIZE / 32];
    Pack added[2];
    float factor[2];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long place = at * SIZE + row + 8 * half;
      #pragma unroll
      for (int k = 0; k < SIZE / 32; ++k)
        a[half][k] = load_eight(e + place * SIZE + 32 * k + W * t);
      added[half] = load(r + place * width + column);
      factor[half] = decay[is_by_row ? place : at];
    }
    T* narrow = shared[step % 2];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack kept;
      #pragma unroll
      for (int i = 0; i < W; ++i) {
        kept.value[i] = narrowed(s[half][i]);
        narrow[(W * t + i) * STRIDE + row + 8 * half] = kept.value[i];
      }
      store(before + (at * SIZE + row + 8 * half) * width + column, kept);
    }
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < 4; ++j) {  // columns 2j and 2j + 1 of each thread's eight
      const T* column_of_s = narrow + (W * (g / 2) + 2 * j + g % 2) * STRIDE + W * t;
      float c[4] = {};
      #pragma unroll
      for (int k = 0; k < SIZE / 32; ++k) {
        const uint4 b = *reinterpret_cast<const uint4*>(column_of_s + 32 * k);
        multiply_add(c, a[0][k].x, a[1][k].x, a[0][k].y, a[1][k].y, b.x, b.y);
        multiply_add(c, a[0][k].z, a[1][k].z, a[0][k].w, a[1][k].w, b.z, b.w);
      }
      #pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& element = s[i / 2][2 * j + i % 2];
        element = factor[i / 2] * element + (wide(added[i / 2].value[2 * j + i % 2]) - c[i]);
      }
    }
  }
  #pragma unroll
  for (int half = 0; half < 2; ++half) {
    const long to = ((long)matrix * SIZE + row + 8 * half) * width + column;
    #pragma unroll
    for (int i = 0; i < W; ++i) last[to + i] = s[half][i];
  }
}
