#include "common.cuh"

// x and out are (tokens, heads, 2 half), table (length, 2 half): cosines, then sines; sign is -1 for
// the way back. A thread has eight pairs of a head.
KERNEL rotate(
    const T* x, const float* table, T* out, int tokens, int length, int heads, int half,
    float sign) {
  const int columns = half / W, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens * heads * columns) return;
  const int column = i % columns * W, head = i / columns, token = head / heads;
  const float* angle = table + token % length * 2 * half + column;
  const long at = (long)head * 2 * half + column;
  Pack low = load(x + at), high = load(x + at + half);
  #pragma unroll
  for (int k = 0; k < W; ++k) {
    float a = wide(low.value[k]), b = wide(high.value[k]);
    float c = angle[k], s = sign * angle[half + k];
    low.value[k] = narrowed(a * c - b * s);
    high.value[k] = narrowed(a * s + b * c);
  }
  store(out + at, low);
  store(out + at + half, high);
}
