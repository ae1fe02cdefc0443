#include "common.cuh"

// out[i] = sum of parts[s, i] over splits; a thread takes four neighbours.
KERNEL sum_of_splits(const float* parts, T* out, int splits, int total) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i >= total) return;
  float4 sum = *reinterpret_cast<const float4*>(parts + i);
  for (int s = 1; s < splits; ++s) {
    float4 next = *reinterpret_cast<const float4*>(parts + (long)s * total + i);
    sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
  }
  struct alignas(8) Four { T value[4]; };
  *reinterpret_cast<Four*>(out + i) = {{narrowed(sum.x), narrowed(sum.y),
                                        narrowed(sum.z), narrowed(sum.w)}};
}
