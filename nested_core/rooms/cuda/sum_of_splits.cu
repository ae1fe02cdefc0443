#include "common.cuh"

// out[i] = sum of parts[s, i] over splits, for up to four outputs that follow one another in a
// part; a thread takes four neighbours. Ends are those of the first three outputs.
KERNEL sum_of_splits(
    const float* parts, T* out0, T* out1, T* out2, T* out3, int splits, int end0, int end1,
    int end2, int total) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i >= total) return;
  float4 sum = *reinterpret_cast<const float4*>(parts + i);
  for (int s = 1; s < splits; ++s) {
    float4 next = *reinterpret_cast<const float4*>(parts + (long)s * total + i);
    sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
  }
  T* out = out3;
  int start = end2;
  if (i < end2) out = out2, start = end1;
  if (i < end1) out = out1, start = end0;
  if (i < end0) out = out0, start = 0;
  struct alignas(8) Four { T value[4]; };
  *reinterpret_cast<Four*>(out + i - start) = {{narrowed(sum.x), narrowed(sum.y),
                                                narrowed(sum.z), narrowed(sum.w)}};
}
